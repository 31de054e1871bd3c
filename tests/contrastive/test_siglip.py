"""SigLIP's kernels: blocks, CPUs, large logits, half-precision range, what is computed when, memory, threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss import core, siglip_loss
from fastloss.contrastive.siglip import siglip
from tests.conformance.cases import CASES
from tests.conformance.tools import INTERPRETING, Errors, places, recorded

pytestmark = pytest.mark.kernels

PLACES = places(next(case for case in CASES if case.name == "siglip_loss"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_place = pytest.mark.parametrize("place", PLACES)
cpp_only = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")


def pair(rows: int, width: int, columns: int | None = None, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(columns or rows, width, generator=generator)
    image = torch.randn(rows, width, generator=generator)
    image[: min(rows, len(text))] += text[:rows]
    return image.to(device, dtype), text.to(device, dtype)


def run(backend: str, image: Tensor, text: Tensor, scale: float = 3.0, bias: float = -2.0, **options) -> list[Tensor]:
    """Loss and the gradients of image, text, scale and bias."""
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    leaves = [image, text, *(torch.tensor(v, dtype=dtype, device=image.device) for v in (scale, bias))]
    leaves = [t.detach().requires_grad_() for t in leaves]
    with core.use_backend(backend):
        loss = siglip_loss(*leaves[:2], logit_scale=leaves[2], logit_bias=leaves[3], **options)
        up = torch.linspace(0.5, 2, loss.numel(), dtype=dtype, device=loss.device).reshape(loss.shape)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, up)]


def judge(place: tuple, image: Tensor, text: Tensor, pooled: Errors | None = None, **options) -> None:
    """The one rule for the value and every gradient; over all of `pooled` where the caller checks that.

    Over texts at several lengths, since the value and the gradients of scale and bias are single numbers.
    """
    errors = pooled or Errors(image.dtype)
    for factor in (1.0, 0.97) if INTERPRETING else (1.0, 0.97, 0.9, 0.83):
        texts = factor * text
        results = (run(place[1], image, texts, **options), run("reference", image, texts, **options),
                   run("reference", image.double(), texts.double(), **options))  # fmt: skip
        for name, *each in zip(("value", "image", "text", "scale", "bias"), *results, strict=True):
            errors.add(name, *each, str(len(image)))
    if pooled is None:
        errors.check()


@each_place
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_a_tile(place, dtype, reduction):
    errors = Errors(dtype)
    for rows in (1, 16, 17, 33) if INTERPRETING else (1, 15, 67, 1031):
        image, text = pair(rows, 13, dtype=dtype, device=place[0])
        judge(place, image, text, errors, normalize=True, scale=9.0, reduction=reduction)
    errors.check()


@each_place
@pytest.mark.parametrize("workspace_mib", [1e-6, 0.01])
@pytest.mark.parametrize("columns", [33, 70])
def test_blocks_of_one_tile_and_more(place, workspace_mib, columns):
    image, text = pair(33, 9, columns, device=place[0])
    ids = {"image_ids": torch.arange(33, device=place[0]) % 7, "text_ids": torch.arange(columns, device=place[0]) % 5}
    for reduction in ("sum", "none"):
        judge(place, image, text, normalize=True, workspace_mib=workspace_mib, negative_only=columns != 33,
              reduction=reduction, **ids)  # fmt: skip


@cpp_only
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(monkeypatch, cpu, dtype):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    judge(("cpu", "cpp"), *pair(61, 24, dtype=dtype), normalize=True, scale=10.0, bias=-10.0)


@each_place
def test_large_logits_neither_overflow_nor_vanish(place):
    """Logits of +-3e4: the loss is the sum of the positive parts, the slopes are 0 and 1."""
    image = torch.tensor([[1.0], [-1.0]], device=place[0])
    loss, image_grad, _, scale, bias = run(place[1], image, image, scale=3e4, bias=0.0, reduction="sum")
    assert loss == 0 and not image_grad.any() and scale == 0 and bias == 0
    loss, image_grad, text_grad, _, bias = run(place[1], image, -image, scale=3e4, bias=0.0, reduction="sum")
    assert loss == 4 * 3e4 * 0.5 * 2 and bias == 0  # 2 positives at -3e4, 2 negatives at 3e4
    torch.testing.assert_close(image_grad, image_grad.sign() * 0.5 * 6e4)
    torch.testing.assert_close(text_grad, text_grad.sign() * 0.5 * 6e4)


@each_place
def test_small_probabilities_keep_their_digits(place):
    """At the usual start, bias -10, each negative pulls by e^-10 / M: float16 must not lose it."""
    for dtype in DTYPES:
        image, text = pair(33, 16, dtype=dtype, device=place[0])
        options = {"normalize": True, "scale": 1e-2, "bias": -12.0, "negative_only": True}
        ours, exact = run(place[1], image, text, **options), run("reference", image.double(), text.double(), **options)
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)
        for mine, truth in zip(ours[1:3], exact[1:3], strict=True):
            assert (mine.double() - truth).norm() <= max(2 * torch.finfo(dtype).eps, 1e-5) * truth.norm() + 1e-8


@each_place
def test_only_what_needs_a_gradient_gets_one(place):
    image, text = pair(20, 8, device=place[0])
    both = run(place[1], image, text, normalize=True)
    for which in (0, 1):
        args = [t.clone().requires_grad_(i == which) for i, t in enumerate((image, text))]
        with core.use_backend(place[1]):
            (0.5 * siglip_loss(*args, logit_scale=3.0, logit_bias=-2.0, normalize=True)).backward()
        torch.testing.assert_close(args[which].grad, both[1 + which], rtol=1e-5, atol=1e-8)
        assert args[1 - which].grad is None
    scale = torch.tensor(3.0, device=place[0], requires_grad=True)
    with core.use_backend(place[1]):
        siglip_loss(image, text, logit_scale=scale, logit_bias=-2.0, normalize=True).backward()
    torch.testing.assert_close(scale.grad, both[3] * 2, rtol=1e-5, atol=1e-8)


@each_place
def test_nothing_is_kept_without_gradients(place):
    image, text = pair(20, 8, device=place[0])
    for grads in (False, True):
        with recorded() as calls, core.use_backend(place[1]), torch.set_grad_enabled(grads):
            loss = siglip_loss(image.requires_grad_(), text, logit_scale=1.0, logit_bias=0.0)
        ((op, args),) = calls
        assert op is siglip and dict(zip(op.inputs, args, strict=True))["needs"] == int(grads)
        if place[1] != "reference":
            sizes = [t.numel() for t in op.fwd(*(a.detach() if isinstance(a, Tensor) else a for a in args))]
            assert sizes == ([1, 160, 0, 0, 0] if grads else [1, 0, 0, 0, 0])
        assert loss.requires_grad == grads


@each_place
def test_empty_batches(place):
    image, text = pair(4, 3, device=place[0])
    options = {"logit_scale": 1.0, "logit_bias": 0.0, "negative_only": True, "reduction": "sum"}
    for a, b in ((image[:0], text), (image, text[:0]), (image[:0], text[:0])):
        a, b = (t.detach().requires_grad_() for t in (a, b))
        with core.use_backend(place[1]):
            loss = siglip_loss(a, b, **options)
            grads = torch.autograd.grad(loss, (a, b))
        assert loss == 0 and not any(g.any() for g in grads)
        assert [g.shape for g in grads] == [a.shape, b.shape]


@cpp_only
def test_thread_counts_give_the_same_bits_but_for_the_matrix_products():
    """The products are the library's; with small integers they are exact, and what is left is ours."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (300, 6), generator=generator).float() for _ in range(2))
    before, results = torch.get_num_threads(), []
    share, one, bias = torch.ones(300), torch.ones(1), torch.zeros(1)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(siglip.fwd(q, k, one, bias, None, None, None, None, share, False, False, False, 0, 0.1)[0])
            results.append(siglip.fwd(q, k, one, bias, None, None, None, None, share, False, False, False, 7, 0.1)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
