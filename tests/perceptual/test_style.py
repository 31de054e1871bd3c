"""Gram matrices and style distance beyond the conformance tests: other libraries' conventions, one product in the
backward."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastloss import gram_matrix, style_distance
from fastloss.perceptual.style import _Gram


def features(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 6, 7), (2, 3, 4, 4))
    return [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(2)]


@pytest.mark.parametrize("normalization", ["chw", "hw", "none"])
def test_gram_by_hand(normalization):
    (x, _), _ = features(torch.float64)
    count = {"chw": 5 * 42, "hw": 42, "none": 1}[normalization]
    expected = torch.einsum("ncp,ndp->ncd", x.flatten(2), x.flatten(2)) / count
    torch.testing.assert_close(gram_matrix(x, normalization=normalization), expected)


def test_the_gradient_of_gram_is_one_product_and_differentiable_again():
    (x, _), _ = features(torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(gram_matrix, x) and torch.autograd.gradgradcheck(gram_matrix, x)
    gram = gram_matrix(x)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        torch.autograd.grad(gram, x, torch.randn_like(gram))
    assert sum(event.name == "aten::bmm" for event in recorded.events()) == 1
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(gram_matrix, (x.detach(),), (tangent,))
    torch.testing.assert_close(forward, 2 * torch.func.jvp(gram_matrix, (x.detach(),), (tangent / 2,))[1])


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 2, 64, 64), 8.0).half()
    gram = gram_matrix(x, normalization="none")
    assert gram.dtype == torch.float32 and (gram == 64 * 64 * 64).all()  # no float16
    assert torch.equal(gram_matrix(x.bfloat16(), normalization="none"), gram)


@pytest.mark.parametrize("upstream", [2.0**10, 2.0**16])
def test_the_gradient_of_float16_features_does_not_underflow_in_its_first_factor(upstream):
    """As on CUDA, where products of float16 are: divided by C H W = 2^20, a mean's gradient would be 0 in float16
    before C channels are added up; what comes out is not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 64, 128 * 128, generator=generator).half()
    grad = torch.full((1, 64, 64), upstream / 64**2)
    grads = []
    for given in (x, x.double()):
        leaf = given.requires_grad_()
        gram = _Gram.apply(leaf, "chw")
        grads.append(torch.autograd.grad(gram, leaf, grad.to(gram.dtype)))
    got, exact = grads[0][0].double(), grads[1][0]
    assert exact.abs().max() > 2.0**-18
    assert (got - exact).abs().max() <= 2**-10 * exact.abs().max() + 2.0**-24


def test_piqs_gram_and_basicsrs_normalisation():
    piq = pytest.importorskip("piq")
    f, t = features()
    for x in f:
        torch.testing.assert_close(gram_matrix(x, normalization="none"), piq.StyleLoss.gram_matrix(x)[:, 0])
    expected = sum(
        w * (piq.StyleLoss.gram_matrix(a) - piq.StyleLoss.gram_matrix(b)).square().mean()
        for w, a, b in zip((0.5, 2.0), f, t, strict=True)
    )
    ours = style_distance(f, t, weights=[0.5, 2.0], criterion="l2", normalization="none")
    torch.testing.assert_close(ours, expected)
    by_hand = sum(
        (piq.StyleLoss.gram_matrix(a) - piq.StyleLoss.gram_matrix(b)).abs().mean() / a[0].numel()
        for a, b in zip(f, t, strict=True)
    )
    torch.testing.assert_close(style_distance(f, t), by_hand)


def test_a_permutation_of_the_pixels_changes_nothing():
    (x, y), _ = features()
    mixed = [a.flatten(2)[..., torch.randperm(a[0, 0].numel())].view_as(a) for a in (x, y)]
    assert style_distance([x, y], mixed).abs() < 1e-6


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 3, 4, 5), (2, 6, 7, 3), (1, 1, 5, 1)])
def test_gram_matrix_of_symbolic_shapes(shape):
    """One dynamic graph; where sides are 1, a symbolic count in an autograd function broke torch 2.14's compile."""
    torch._dynamo.reset()
    x = torch.rand(shape, requires_grad=True)
    expected = torch.autograd.grad(gram_matrix(x).square().sum(), x)[0]
    compiled = torch.compile(gram_matrix, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)
