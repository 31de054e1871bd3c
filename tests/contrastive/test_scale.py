"""Loss scales: a gradient is multiplied by its upstream before it is rounded to half precision."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastloss import NegativeSampling, clip_loss, core, info_nce, loss_and_grads, nt_xent_loss, siglip_loss, supcon_loss
from tests.conformance.tools import INTERPRETING, Errors
from tests.contrastive.test_weights import by_backend

UP = 65536.0
M, K, D = (24, 8, 16) if INTERPRETING else (96, 40, 24)
FORMS = {  # Name: (loss of (query, key, negatives), shape of the negatives, frozen)
    "in batch": (info_nce, None, ()),
    "frozen keys": (info_nce, None, (1,)),
    "all sums": (partial(info_nce, label_smoothing=0.1, sampling=NegativeSampling(hardness=0.5)), None, (1,)),
    "smoothed": (partial(info_nce, label_smoothing=0.1), None, ()),
    "symmetric": (partial(info_nce, symmetric=True), None, ()),
    "little memory": (partial(info_nce, symmetric=True, workspace_mib=1e-3), None, ()),
    "shared": (info_nce, (K, D), ()),
    "bank": (info_nce, (K, D), (1, 2)),
    "per query": (info_nce, (M, K, D), ()),
    "per query, frozen": (info_nce, (M, K, D), (2,)),
    "per query, smoothed": (partial(info_nce, label_smoothing=0.1), (M, K, D), ()),
    "clip": (lambda q, k, temperature, **o: clip_loss(q, k, logit_scale=1 / temperature, **o), None, ()),
    "clip with ids": (
        lambda q, k, temperature, **o: clip_loss(q, k, logit_scale=1 / temperature, text_ids=torch.arange(M) // 2, **o),
        None, (),
    ),
    "siglip": (
        lambda q, k, temperature, **o: siglip_loss(q, k, logit_scale=1 / temperature, logit_bias=-5.0, **o), None, (),
    ),
    "nt_xent": (nt_xent_loss, None, ()),
    "supcon": (lambda q, k, **o: supcon_loss(q, torch.arange(M) // 3, **o), None, (1,)),
}  # fmt: skip


def inputs(shape: tuple[int, ...] | None, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(M, D), (M, D)] + ([] if shape is None else [shape])
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def gradients(loss, tensors, frozen, backend, up, **options) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    with core.use_backend(backend):
        out = up * loss(*leaves, temperature=1e6, **options)
        return list(torch.autograd.grad(out.sum(), [t for t in leaves if t.requires_grad]))


@by_backend
@pytest.mark.parametrize("name", FORMS)
def test_an_upstream_scale_saves_what_half_precision_would_round_to_zero(name, backend):
    loss, shape, frozen = FORMS[name]
    tensors = inputs(shape)
    wide = [t.double() for t in tensors]
    for reduction in ("mean",) if INTERPRETING else ("mean", "none"):
        up, errors = (UP if reduction == "mean" else UP / M), Errors(torch.float16)
        ours, eager = (gradients(loss, tensors, frozen, b, up, reduction=reduction) for b in (backend, "reference"))
        exact = gradients(loss, wide, frozen, "reference", up, reduction=reduction)
        lost = 0.0
        for i, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
            assert mine.dtype == torch.float16
            zeros, wanted = ((g == 0).float().mean().item() for g in (mine, truth.half()))
            assert zeros <= wanted + 0.01, f"{zeros:.0%} of gradient {i} are zeros, rightly {wanted:.0%}"
            lost = max(lost, (truth / up).half().eq(0).float().mean().item())
            errors.add(str(i), mine, theirs, truth)
        errors.check()
        assert lost > 0.01  # what is at stake: without a scale these are 0


@by_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_and_grads_scales_before_it_rounds(dtype, backend):
    q, k = inputs(None, dtype)
    t = torch.tensor(3e4, requires_grad=True)
    with core.use_backend(backend):
        plain = loss_and_grads(q, k, temperature=t)
        number = loss_and_grads(q, k, temperature=t, scale=UP)
        tensor = loss_and_grads(q, k, temperature=t, scale=torch.tensor([UP]))
    exact = loss_and_grads(q.double(), k.double(), temperature=t.detach().double(), scale=UP)
    assert torch.equal(plain.loss, number.loss) and not number.query.requires_grad
    for a, b in ((number.query, tensor.query), (number.key, tensor.key)):
        assert torch.equal(a, b) and a.dtype == dtype
    torch.testing.assert_close(number.options["temperature"], plain.options["temperature"] * UP)
    for mine, truth in ((number.query, exact.query), (number.key, exact.key)):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-2, atol=1e-2 * truth.abs().max().item())
        assert (mine == 0).float().mean() <= 0.01
    if dtype == torch.float16:
        assert (plain.query == 0).float().mean() > 0.01


def test_loss_and_grads_checks_its_scale_and_leaves_that_of_the_loss_alone():
    q, k = inputs(None, torch.float32)
    for bad in (0.0, -1.0, float("inf"), 1e39):
        with pytest.raises(ValueError, match="scale: expected"):
            loss_and_grads(q, k, scale=bad)
    with pytest.raises(TypeError, match="scale: expected a number"):
        loss_and_grads(q, k, scale="2")

    def mine(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
        return scale * info_nce(q, k)

    out = loss_and_grads(q, k, loss_fn=partial(mine, scale=2.0), scale=8.0)
    one = loss_and_grads(q, k)
    torch.testing.assert_close(out.loss, 2 * one.loss)
    torch.testing.assert_close(out.query, 16 * one.query)
    with torch.inference_mode():
        scale = torch.tensor(8.0)
    torch.testing.assert_close(loss_and_grads(q, k, scale=scale).query, 8 * one.query)


def test_gradient_caching_under_a_grad_scaler():
    """The docstring's recipe: the step is that of float32 embeddings."""

    def train(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        encoder = torch.nn.Linear(D, D, bias=False)
        x, y = inputs(None, torch.float32)
        optimizer, scaler = torch.optim.SGD(encoder.parameters(), lr=1e6), torch.amp.GradScaler("cpu")
        with torch.no_grad():
            q, k = encoder(x).to(dtype), encoder(y).to(dtype)
        scale = scaler.scale(torch.ones(()))
        out = loss_and_grads(q, k, scale=scale, temperature=3e4)
        for rows, grads in ((x, out.query), (y, out.key)):
            for piece, grad in zip(rows.split(M // 4), grads.split(M // 4), strict=True):
                encoder(piece).to(dtype).backward(grad)
        scaler.step(optimizer)
        scaler.update()
        return encoder.weight.detach()

    half, single = train(torch.float16), train(torch.float32)
    torch.manual_seed(0)
    start = torch.nn.Linear(D, D, bias=False).weight.detach()
    assert (half - single).norm() <= 1e-2 * (single - start).norm()
