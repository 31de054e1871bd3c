"""The LPIPS head beyond the conformance tests: its formula, lpips' conventions, zero features, maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastloss import lpips_distance


def test_lpips_against_its_formula_by_hand():
    x, y = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([0.0, -2.0]).view(1, 2, 1, 1)
    lin = torch.tensor([0.5, 2.0])
    expected = 0.5 * 0.6**2 + 2.0 * 1.8**2
    torch.testing.assert_close(lpips_distance([x], [y], [lin]), torch.tensor([expected]))
    torch.testing.assert_close(lpips_distance([x], [y], [lin.view(1, 2, 1, 1)]), torch.tensor([expected]))
    torch.testing.assert_close(lpips_distance([x], [y], None), torch.tensor([0.6**2 + 1.8**2]))


def test_lpips_eps_is_outside_the_root():
    """Features of size 1e-10: outside, the norm 1e-10 + 1e-10 halves them; sqrt(|x|^2 + 1e-10) would give 0."""
    x, y = torch.full((1, 1, 1, 1), 1e-10, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(lpips_distance([x], [y], None), torch.tensor([0.25], dtype=torch.float64))


def test_lpips_gradient_at_zero_features_is_zero_and_elsewhere_eagers():
    torch.manual_seed(5)
    x, y = torch.randn(2, 3, 4, 4).relu(), torch.randn(2, 3, 4, 4).relu()
    x[:, :, 0], y[:, :, 1] = 0, 0
    x[:, :, 2], y[:, :, 2] = 0, 0
    lin = torch.rand(3)

    def eager(a, b):
        u, v = (i / ((i**2).sum(1, keepdim=True).sqrt() + 1e-10) for i in (a, b))
        return F.conv2d((u - v) ** 2, lin.view(1, 3, 1, 1)).mean([2, 3]).flatten()

    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    lin = lin.double()
    ours, theirs = lpips_distance([x], [y], [lin]), eager(x, y)
    torch.testing.assert_close(ours, theirs)
    for ours_g, eager_g, leaf in zip(
        torch.autograd.grad(ours.sum(), (x, y)), torch.autograd.grad(theirs.sum(), (x, y)), (x, y), strict=True
    ):
        zero = (leaf.detach() == 0).all(1, keepdim=True).expand_as(leaf)
        assert zero.sum() >= 48 and eager_g[zero].isnan().all()
        assert (ours_g[zero] == 0).all()
        torch.testing.assert_close(ours_g[~zero], eager_g[~zero])


def test_lpips_map_is_that_of_lpips_and_averages_to_the_distance():
    torch.manual_seed(6)
    features = [torch.rand(2, 4, 8, 8), torch.rand(2, 6, 4, 4)]
    targets = [torch.rand_like(f) for f in features]
    lins = [torch.rand(4), torch.rand(6)]
    got = lpips_distance(features, targets, lins, spatial=True, size=(16, 16))
    total = 0
    for f, t, lin in zip(features, targets, lins, strict=True):
        u, v = F.normalize(f, dim=1, eps=0), F.normalize(t, dim=1, eps=0)
        at = F.conv2d((u - v) ** 2, lin.view(1, -1, 1, 1))
        total = total + nn.Upsample(size=(16, 16), mode="bilinear", align_corners=False)(at)
    torch.testing.assert_close(got, total)
    for size in ([16, 16], torch.Size((16, 16)), torch.tensor([16, 16])):
        torch.testing.assert_close(lpips_distance(features, targets, lins, spatial=True, size=size), got)
    assert lpips_distance(features, targets, lins, spatial=True).shape == (2, 1, 8, 8)
    one = lpips_distance(features[:1], targets[:1], lins[:1], spatial=True)
    torch.testing.assert_close(one.mean((1, 2, 3)), lpips_distance(features[:1], targets[:1], lins[:1]))


def test_lpips_of_equal_features_is_zero_and_an_empty_batch_is_empty():
    x = torch.rand(3, 5, 2, 2, requires_grad=True)
    value = lpips_distance([x], [x.detach().clone()], None)
    assert torch.equal(value, torch.zeros(3))
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.zeros_like(x))
    assert lpips_distance([x[:0]], [x[:0]], None).shape == (0,)


def test_lpips_double_backward():
    torch.manual_seed(8)
    x, y = (torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda a, b: lpips_distance([a], [b], None), (x, y))
