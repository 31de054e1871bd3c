"""The op of attention consistency from queries and keys: equal and near views, long rows, tiles, what is held fixed."""

from __future__ import annotations

import pytest
import torch

from fastloss import attention_consistency_from_qk as from_qk
from tests.conformance.tools import INTERPRETING

METRICS = ("kl", "sym_kl", "js")


def views(*shape, noise, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    b, h, q, k, d = shape
    q1, k1, more_q, more_k = (torch.randn(b, h, n, d, generator=generator) for n in (q, k, q, k))
    return [t.to(dtype).requires_grad_() for t in (q1, k1, q1 + noise * more_q, k1 + noise * more_k)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_equal_views_cost_exactly_nothing(metric, dtype):
    """Rows of several tiles and a rest, with and without what is left out."""
    inputs = views(1, 2, 37, 83, 20, noise=0, dtype=dtype)
    mask = torch.rand(83, generator=torch.Generator().manual_seed(1)) > 0.3
    for options in ({}, {"causal": True}, {"mask": mask}):
        value = from_qk(*inputs, metric=metric, scale=1.0, **options)
        assert value.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(value, inputs))


@pytest.mark.parametrize("metric", METRICS)
def test_near_views_keep_their_digits(metric):
    """Views 1e-3 apart: the divergence is the square of that, and the textbook formula in float32 mostly rounding."""
    inputs = views(1, 2, 40, 70, 16, noise=1e-3)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got, expected = from_qk(*inputs, metric=metric), from_qk(*exact, metric=metric)
    assert abs(got.item() / expected.item() - 1) < 1e-3
    pairs = zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, exact), strict=True)
    for one, other in pairs:
        assert (one - other).norm() < 2e-3 * other.norm()


@pytest.mark.parametrize("metric", METRICS)
def test_rows_whose_weights_move_from_tile_to_tile(metric):
    """Logits that rise along the keys by hundreds, in the two views apart: each tile outweighs all before it."""
    slope, ones = torch.linspace(0, 300, 90), torch.ones(1, 1, 3, 2)
    k1, k2 = (torch.stack([a, b], 1)[None, None] for a, b in ((slope, slope.sin()), (0.9 * slope, slope.cos())))
    single = [t.clone().requires_grad_() for t in (ones, k1, ones, k2)]
    exact = [t.detach().double().requires_grad_() for t in single]
    got, expected = (from_qk(*x, metric=metric, scale=1.0) for x in (single, exact))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    for one, other in zip(torch.autograd.grad(got, single), torch.autograd.grad(expected, exact), strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


def test_stop_gradient_holds_a_view_fixed():
    inputs = views(1, 1, 4, 5, 3, noise=0.5)
    free = torch.autograd.grad(from_qk(*inputs, metric="js"), inputs)
    for view, fixed in (("a", (0, 1)), ("b", (2, 3))):
        held = torch.autograd.grad(from_qk(*inputs, metric="js", stop_gradient=view), inputs, allow_unused=True)
        for i, (gradient, whole) in enumerate(zip(held, free, strict=True)):
            assert gradient is None if i in fixed else torch.equal(gradient, whole)


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
def test_bits_do_not_depend_on_the_number_of_threads():
    inputs = views(2, 2, 100, 130, 17, noise=0.3)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            value = from_qk(*inputs, metric="sym_kl", causal=True)
            results.append([value, *torch.autograd.grad(value, inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
