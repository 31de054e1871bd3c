"""A weight of 0 leaves a row out, whatever it holds; bool masks and large numbers as weights."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from fastloss import NegativeSampling, clip_loss, core, info_nce, nt_xent_loss, siglip_loss, supcon_loss
from tests.conformance.tools import INTERPRETING, Errors

BACKENDS = ["triton"] if INTERPRETING else ["reference", "cpp"]
if not INTERPRETING and core.backend_report()["cpp"] != "available":
    BACKENDS = ["reference"]
by_backend = pytest.mark.parametrize("backend", BACKENDS)
GONE = 2
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
M, K, D = len(WEIGHTS), 4, 6
learned = pytest.mark.parametrize("learned", [True, False], ids=["learned scale", "number"])

# Name: (loss of (query, key, negatives), negatives' shape or None, which of the inputs only its own row sees)
FORMS = {
    "in batch": (info_nce, None, (0,)),
    "in batch, all statistics": (
        partial(info_nce, label_smoothing=0.1, sampling=NegativeSampling(0.1, 0.5, 0.6)), None, (0,)
    ),
    "column bias": (partial(info_nce, bias=torch.linspace(-1, 1, M)), None, (0,)),
    "decoupled": (partial(info_nce, include_positive=False, normalize=False), None, (0,)),
    "targets": (partial(info_nce, targets=torch.tensor([4, 4, 0, 1, 2])), None, (0,)),
    "ids": (partial(info_nce, key_ids=torch.tensor([1, 0, 1, 2, 3])), None, (0,)),
    "shared": (info_nce, (K, D), (0, 1)),
    "shared, smoothed": (partial(info_nce, label_smoothing=0.1), (K, D), (0, 1)),
    "shared, in batch": (partial(info_nce, in_batch=True), (K, D), (0,)),
    "per query": (info_nce, (M, K, D), (0, 1, 2)),
    "per query, plain products": (partial(info_nce, normalize=False), (M, K, D), (0, 1, 2)),
    "per query, smoothed": (partial(info_nce, label_smoothing=0.1), (M, K, D), (0, 1, 2)),
    "per query, all statistics": (
        partial(info_nce, label_smoothing=0.1, sampling=NegativeSampling(0.1, 0.5, 0.6)), (M, K, D), (0, 1, 2)
    ),
    "per query, in batch": (partial(info_nce, in_batch=True), (M, K, D), (0, 2)),
    "per query, symmetric": (partial(info_nce, in_batch=True, symmetric=True), (M, K, D), (2,)),
    "siglip": (lambda q, k, temperature, **o: siglip_loss(q, k, logit_scale=1 / temperature, logit_bias=-1.0, **o),
               None, (0,)),
}  # fmt: skip


def inputs(shape: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(M, D), (M, D)] + ([] if shape is None else [shape])
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def run(loss, tensors, backend, learned=True, **options):
    """The reduced loss and all gradients, of the temperature too."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    temperature = torch.tensor(0.3, dtype=core.result_dtype(*tensors), requires_grad=True) if learned else 0.3
    with core.use_backend(backend):
        out = loss(*leaves, temperature=temperature, **options)
        wanted = [*leaves, temperature] if learned else leaves
        up = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
        return [out.detach(), *torch.autograd.grad(out, wanted, up, allow_unused=True)]


def poisoned(tensors, private, value):
    tensors = [t.clone() for t in tensors]
    for i in private:
        tensors[i][GONE].view(-1)[-1] = value
    return tensors


@by_backend
@learned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_what_only_an_excluded_row_sees_reaches_nobody(name, dtype, learned, backend):
    """Value and gradients are those of the row with numbers in it; the row's own gradients are 0."""
    loss, shape, private = FORMS[name]
    clean = inputs(shape, dtype)
    for reduction in ("mean",) if INTERPRETING else ("mean", "sum", "none"):
        options = {"weights": WEIGHTS, "reduction": reduction, "learned": learned}
        expected = run(loss, clean, backend, **options)
        for value in (torch.nan,) if INTERPRETING else (torch.nan, torch.inf):
            got = run(loss, poisoned(clean, private, value), backend, **options)
            for ours, wanted in zip(got, expected, strict=True):
                assert ours.isfinite().all()
                torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
            for i in private:
                assert (got[1 + i][GONE] == 0).all()


@by_backend
@pytest.mark.parametrize("name", FORMS)
def test_the_value_is_that_of_the_rows_that_count(name, backend):
    """Against float64, with the weights multiplied by hand."""
    loss, shape, private = FORMS[name]
    clean, errors = inputs(shape), Errors(torch.float32)
    ours = run(loss, poisoned(clean, private, torch.nan), backend, weights=WEIGHTS)
    eager = run(loss, clean, "reference", weights=WEIGHTS)
    wide = [t.double().requires_grad_() for t in clean]
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rows = loss(*wide, temperature=t, reduction="none")
    exact_loss = (rows * WEIGHTS).sum() / WEIGHTS.sum()
    exact = [exact_loss, *torch.autograd.grad(exact_loss, [*wide, t])]
    for i, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        errors.add(str(i), mine, theirs, truth)
    errors.check()


BOTH = {
    "clip": lambda q, k, temperature, **o: clip_loss(q, k, logit_scale=1 / temperature, **o),
    "symmetric": partial(info_nce, symmetric=True),
    "nt_xent": nt_xent_loss,
    "supcon": lambda q, k, **o: supcon_loss(q, torch.tensor([0, 1, 0, 1, 0]), **o) + 0 * k.sum(),
}


@by_backend
@pytest.mark.parametrize("name", [*FORMS, *BOTH])
def test_bool_masks_and_weights_of_any_size(name, backend):
    """A mask is 0 and 1; of a mean only the weights' ratios count, even where their sum is past float32."""
    loss, shape = BOTH.get(name), None
    if loss is None:
        loss, shape, _ = FORMS[name]
    tensors, mask = inputs(shape), WEIGHTS > 0
    for reduction in ("none", "mean", "sum"):
        got, wanted = (run(loss, tensors, backend, weights=w, reduction=reduction) for w in (mask, mask.float()))
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)
    expected = run(loss, tensors, backend, weights=WEIGHTS)
    for large in (WEIGHTS * 1.5e38, WEIGHTS * 1e-38, WEIGHTS.double() * 1e300, WEIGHTS.half() * 3e4):
        for a, b in zip(run(loss, tensors, backend, weights=large), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a in run(loss, tensors, backend, weights=torch.zeros(M)):
        assert (a == 0).all()


@by_backend
def test_a_symmetric_weight_is_that_of_both_directions(backend):
    """Pair i counts in neither, and remains a negative of the other pairs."""
    q, k = inputs(None, torch.float64 if backend == "reference" else torch.float32)
    rows = [run(info_nce, pair, backend, reduction="none")[0] for pair in ((q, k), (k, q))]
    expected = ((rows[0] + rows[1]) / 2 * WEIGHTS).sum() / WEIGHTS.sum()
    got = run(BOTH["symmetric"], (q, k), backend, weights=WEIGHTS)[0]
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-5, atol=1e-6)
    views = run(nt_xent_loss, (q, k), backend, reduction="none")[0]
    got = run(nt_xent_loss, (q, k), backend, weights=WEIGHTS)[0]
    torch.testing.assert_close(got, ((views * WEIGHTS.repeat(2)).sum() / WEIGHTS.sum() / 2).to(got.dtype))
    broken = q.clone()
    broken[GONE] = torch.nan  # every other key has it among its negatives
    assert run(BOTH["symmetric"], (broken, k), backend, weights=WEIGHTS)[0].isnan()


@by_backend
@learned
@pytest.mark.parametrize("name", [*FORMS, *BOTH])
def test_where_no_row_counts_no_input_does(name, learned, backend):
    """Be there NaN or infinity in any of them: value and all gradients are 0."""
    loss, shape = BOTH.get(name), None
    if loss is None:
        loss, shape, _ = FORMS[name]
    clean = inputs(shape)
    seen = 1 if name == "supcon" else len(clean)
    for value, i in itertools.product((torch.nan, torch.inf), range(seen)):
        for reduction in ("mean",) if INTERPRETING else ("mean", "sum", "none"):
            got = run(loss, poisoned(clean, [i], value), backend, learned, weights=torch.zeros(M), reduction=reduction)
            for part in got:
                assert part is None or (part == 0).all()


@by_backend
def test_the_by_products_of_an_excluded_row_are_zero_and_false(backend):
    for name in ("in batch", "shared", "per query", "per query, in batch", "per query, symmetric"):
        loss, shape, private = FORMS[name]
        with core.use_backend(backend):
            plain = loss(*inputs(shape), return_lse=True)
            got = loss(*poisoned(inputs(shape), private, torch.nan), weights=WEIGHTS, return_lse=True)
        keep = WEIGHTS > 0
        torch.testing.assert_close(got.lse[..., keep], plain.lse[..., keep])
        assert torch.equal(got.top1[..., keep], plain.top1[..., keep])
        assert (got.lse[..., GONE] == 0).all() and not got.top1[..., GONE].any()
    q, k = inputs(None)
    with core.use_backend(backend):
        both = nt_xent_loss(q, k, weights=WEIGHTS, return_lse=True)
        one = supcon_loss(q, torch.tensor([0, 1, 0, 1, 0]), weights=WEIGHTS, return_lse=True)
    assert both.lse[[GONE, M + GONE]].eq(0).all() and not both.top1[[GONE, M + GONE]].any()
    assert one.lse[GONE] == 0 and not one.top1[GONE]


def test_other_weights_are_refused():
    q, k = inputs(None)
    for weights in (torch.ones(M, dtype=torch.int64), [1.0] * M):
        with pytest.raises(TypeError, match="weights: expected a"):
            info_nce(q, k, weights=weights)
    with pytest.raises(ValueError, match="weights: expected one per row"):
        info_nce(q, k, weights=torch.ones(M, 1, dtype=torch.bool))
