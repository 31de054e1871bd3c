"""The kernels of attention maps against the reference: long rows, lists of many shapes, masks of every stride."""

from __future__ import annotations

import math

import pytest
import torch

from fastloss import attention_consistency_loss as loss_of
from fastloss import core
from tests.conformance.tools import INTERPRETING, Errors

pytestmark = pytest.mark.kernels

AVAILABLE = core.backend_report()
KERNELS = "triton" if INTERPRETING else "cpp"
needs_kernels = pytest.mark.skipif(AVAILABLE[KERNELS] != "available", reason=AVAILABLE[KERNELS])
METRICS = ("js", "kl", "sym_kl", "mse", "l1", "cosine")


def pair(*shape: int, seed: int = 0, inputs: str = "logits") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (2 * torch.randn(*shape, generator=generator) for _ in range(2))
    b = torch.where(torch.rand(shape, generator=generator) < 0.25, a, b)
    return (a.softmax(-1), b.softmax(-1)) if inputs == "probs" else (a, b)


def check(a, b, errors=None, **options) -> None:
    """Value and gradients of single maps or lists, on kernels, by the rule of the battery; `errors`: of more calls
    together, which the caller judges."""
    judged, results = errors is None, []
    errors = Errors(torch.float32) if errors is None else errors
    for dtype, backend in ((torch.float32, KERNELS), (torch.float32, "reference"), (torch.float64, None)):
        x, y = ([t.to(dtype).requires_grad_() for t in side] for side in (a, b))
        with core.use_backend(backend):
            out = loss_of(x, y, **options) if len(x) > 1 else loss_of(x[0], y[0], **options)
            rows = torch.cat([r.flatten() for r in out]) if isinstance(out, list) else out
            upstream = torch.linspace(0.5, 1.5, rows.numel(), dtype=rows.dtype).reshape(rows.shape)
            results.append([rows, *torch.autograd.grad(rows, (*x, *y), upstream)])
    for i, (got, eager, exact) in enumerate(zip(*results, strict=True)):
        errors.add("gradient" if i else "value", got, eager, exact)
    if judged:
        errors.check()


@needs_kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("inputs", ["probs", "logits"])
def test_rows_longer_than_a_block(metric, inputs):
    a, b = pair(1, 8, 4500, inputs=inputs)
    check([a], [b], inputs=inputs, metric=metric, reduction="none")
    keep = torch.ones(4500, dtype=torch.bool)
    keep[:2100] = False  # the whole first block of a row
    check([a], [b], inputs=inputs, metric=metric, mask=keep)


@needs_kernels
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inputs", ["probs", "logits"])
def test_lists_of_many_layers_and_shapes(reduction, inputs):
    """More layers than go by arguments, three shapes in turn: rows of a launch are not one after the other."""
    shapes = [((2, 1, 5, 7), (1, 2, 3, 20), (3, 2, 2, 7))[i % 3] for i in range(28)]
    a, b = zip(*(pair(*shape, seed=i, inputs=inputs) for i, shape in enumerate(shapes)), strict=True)
    weights = [0.5 + i / 10 for i in range(28)]
    check(a, b, inputs=inputs, metric="sym_kl", layer_weights=weights, reduction=reduction)


@needs_kernels
@pytest.mark.parametrize("metric", METRICS)
def test_means_over_heads_of_logits(metric):
    """Layers with heads and keys of their own, heads without a key in a row, rows without one in any head."""
    shapes = ((2, 3, 5, 33), (1, 2, 3, 16))
    a, b = zip(*(pair(*shape, seed=i) for i, shape in enumerate(shapes)), strict=True)
    a[0][0, 1, 2], a[0][1, :, 3], b[0][0, 0, 0], b[1][0, :, 1] = (-math.inf,) * 4
    options = {"inputs": "logits", "metric": metric, "head_mean": True, "temperature": 1.5}
    check(a, b, reduction="none", **options)
    check(a[:1], b[:1], mask=torch.rand(2, 1, 5, 33, generator=torch.Generator().manual_seed(2)) > 0.3, **options)


@needs_kernels
def test_masks_of_every_stride():
    """Broadcast over every set of axes, transposed, and over more separate axes than a kernel walks."""
    a, b = pair(2, 3, 4, 9)
    generator, errors = torch.Generator().manual_seed(1), Errors(torch.float32)
    for axes in range(16):
        shape = [n if axes >> d & 1 else 1 for d, n in enumerate(a.shape)]
        keep = torch.rand(*shape, generator=generator) > 0.3
        check([a], [b], errors, inputs="logits", mask=keep, reduction="none")
    errors.check()
    added = torch.randn(9, 4, generator=generator).T.bfloat16()
    check([a], [b], inputs="logits", mask=added.float())
    a, b = pair(2, 2, 2, 2, 2, 2, 3)
    keep = torch.rand(2, 1, 2, 1, 2, 1, 3, generator=generator) > 0.3
    check([a], [b], inputs="logits", mask=keep, reduction="none")


@needs_kernels
@pytest.mark.parametrize("metric", METRICS)
def test_rows_without_keys_and_with_nan(metric):
    """Rows whose logits are all -inf, in one map or both, count for nothing; NaN in a row reaches that row alone."""
    a, b = pair(4, 6)
    a[0], b[0], a[1], a[2, 3] = -math.inf, -math.inf, -math.inf, math.nan
    x, y = a.requires_grad_(), b.requires_grad_()
    with core.use_backend(KERNELS):
        rows = loss_of(x, y, inputs="logits", metric=metric, reduction="none")
        mean = loss_of(x[:2], y[:2], inputs="logits", metric=metric)
        grads = torch.autograd.grad(rows.sum(), (x, y))
    assert mean == 0 and (rows[:2] == 0).all() and rows[2].isnan() and rows[3].isfinite()
    for g in grads:
        assert (g[:2] == 0).all() and g[3].isfinite().all()
    assert grads[0][2].isnan().any()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_hot_rows(dtype):
    """log 0 in one map or both, in half precision, as in the reference: infinite where that is infinite or NaN."""
    a = torch.eye(5, dtype=dtype)
    b = torch.stack((a[0], a[2], torch.full((5,), 0.2, dtype=dtype), a[3], torch.zeros(5, dtype=dtype)))
    for metric in METRICS:
        results = []
        for backend in (KERNELS, "reference"):
            x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
            with core.use_backend(backend):
                rows = loss_of(x, y, metric=metric, reduction="none")
                results.append((rows, *torch.autograd.grad(rows.sum(), (x, y))))
        for mine, theirs in zip(*results, strict=True):
            assert torch.equal(mine.isfinite(), theirs.isfinite())
            torch.testing.assert_close(*(t.nan_to_num(0, 0, 0) for t in (mine, theirs)))


@needs_kernels
@pytest.mark.parametrize("backend", [KERNELS, "reference"])
@pytest.mark.parametrize("metric", ["js", "kl", "sym_kl", "cosine"])
def test_what_is_no_probability_is_seen(metric, backend):
    """Negative numbers, and an infinite row of cosine's: NaN in the value and in the gradients."""
    a, b = (torch.rand(1, 5, generator=torch.Generator().manual_seed(i)) for i in range(2))
    a[0, 1] = torch.inf if metric == "cosine" else -0.3
    a, b = a.requires_grad_(), b.requires_grad_()
    with core.use_backend(backend):
        loss = loss_of(a, b, metric=metric)
        grads = torch.autograd.grad(loss, (a, b))
    assert loss.isnan() and grads[0][0, 1].isnan() and grads[1][0, 1].isnan()
