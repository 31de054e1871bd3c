"""bfloat16 embeddings on the CPU: multiplied as such, sums in float32, gradients rounded once, the same bits always."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import clip_loss, core, info_nce, siglip_loss
from fastloss.contrastive.ops.softmax_stats import Inputs
from tests.conformance.tools import Errors, recorded

pytestmark = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")
BF16 = torch.bfloat16
CPUS = pytest.mark.parametrize("cpu", ["avx512", "avx512_bf16"])  # without and with the instruction


# The by-products keep losses from the op of the plain ones.
def clip(q: Tensor, k: Tensor, s: Tensor, **options) -> Tensor:
    return clip_loss(q, k, logit_scale=s * 14.3, return_lse=True, **options).loss


def plain_clip(q: Tensor, k: Tensor, s: Tensor, **options) -> Tensor:
    return clip_loss(q, k, logit_scale=s * 14.3, **options)


def contrast(q: Tensor, k: Tensor, s: Tensor, **options) -> Tensor:
    return info_nce(q, k, temperature=s * 0.07, return_lse=True, **options).loss


def plain_contrast(q: Tensor, k: Tensor, s: Tensor, **options) -> Tensor:
    return info_nce(q, k, temperature=s * 0.07, **options)


def siglip(q: Tensor, k: Tensor, s: Tensor, **options) -> Tensor:
    return siglip_loss(q, k, logit_scale=s * 10.0, logit_bias=-10.0, **options)


LOSSES = {
    "clip": clip, "plain clip": plain_clip, "info_nce": contrast, "plain info_nce": plain_contrast, "siglip": siglip
}  # fmt: skip
each_loss = pytest.mark.parametrize("name", LOSSES)


def pair(rows: int, width: int, noise: float = 1.0, common: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(rows, width, generator=generator) + common * torch.randn(1, width, generator=generator)
    return (key + noise * torch.randn(rows, width, generator=generator)).to(BF16), key.to(BF16)


def run(backend: str | None, loss, *args: Tensor, **options) -> list[Tensor]:
    """Value, and the gradients of the arguments and of the scale."""
    scale = torch.ones((), dtype=torch.float64 if args[0].dtype == torch.float64 else torch.float32)
    leaves = [t.detach().requires_grad_() for t in (*args, scale)]
    with core.use_backend(backend):
        out = loss(*leaves, **options)
    up = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, up)]


@CPUS
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sizes_around_a_tile(monkeypatch, cpu, name, reduction):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    errors = Errors(BF16)
    options = {"normalize": True, "reduction": reduction}
    for rows, width in ((1, 1), (2, 3), (15, 64), (67, 65), (1031, 13)):
        args = pair(rows, width)
        exact = run("reference", LOSSES[name], *(t.double() for t in args), **options)
        results = run("cpp", LOSSES[name], *args, **options), run("reference", LOSSES[name], *args, **options), exact
        for what, *each in zip(("value", "query", "key", "scale"), *results, strict=True):
            errors.add(what, *each, f"{rows}x{width}")
    errors.check()


@CPUS
@each_loss
@pytest.mark.parametrize("workspace_mib", [1e-6, 0.05, 256])
@pytest.mark.parametrize(("noise", "common"), [(1.0, 0.0), (1.0, 3.0), (0.1, 0.0)])
def test_gradients_are_as_good_as_rounded(monkeypatch, cpu, name, workspace_mib, noise, common):
    """Alike embeddings and late training too, where a gradient is what is left of large parts: the parts add up in
    float32, and rounding what is multiplied adds less than rounding the result."""
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    args = pair(333, 48, noise, common)
    options = {"normalize": True, "workspace_mib": workspace_mib}
    ours = run("cpp", LOSSES[name], *args, **options)
    exact = run("reference", LOSSES[name], *(t.double() for t in args), **options)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)  # logits are exact but for their sums
    for mine, truth in zip(ours[1:3], exact[1:3], strict=True):
        assert (mine - truth).norm() <= 2**-8 * truth.norm()


@CPUS
@pytest.mark.parametrize(("noise", "common"), [(1.0, 0.0), (1.0, 3.0), (0.1, 0.0)])
def test_the_gradient_by_frozen_keys_is_as_good(monkeypatch, cpu, noise, common):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    q, k = pair(333, 48, noise, common)
    ours = run("cpp", lambda q, s: plain_contrast(q, k, s), q)
    exact = run("reference", lambda q, s: plain_contrast(q, k.double(), s), q.double())
    assert (ours[1] - exact[1]).norm() <= 2**-8 * exact[1].norm()


@CPUS
@pytest.mark.parametrize("noise", [0.1, 0.01])
def test_late_training_keeps_the_digits(monkeypatch, cpu, noise):
    """The positive has all but 1e-3 of the probability: every row's loss to 1e-5, though logits are near 32."""
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    q, k = (F.normalize(t.float(), dim=1).to(BF16) for t in pair(64, 48, noise))
    ours = run("cpp", clip, q, k, reduction="none", normalize=False)
    exact = run("reference", clip, q.double(), k.double(), reduction="none", normalize=False)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-5, atol=0)
    for mine, truth in zip(ours[1:3], exact[1:3], strict=True):
        assert (mine - truth).norm() <= 2**-8 * truth.norm()


def test_scale_200_unnormalised():
    q, k = pair(97, 24)
    with core.use_backend("cpp"):
        loss = clip_loss(q, k, logit_scale=200.0)
    exact = clip_loss(q.double(), k.double(), logit_scale=200.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@each_loss
@pytest.mark.parametrize("workspace_mib", [0.05, 256])
def test_thread_counts_give_the_same_bits(name, workspace_mib):
    """Products and all: none of them is a library's."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpp", LOSSES[name], *pair(300, 40), normalize=True, workspace_mib=workspace_mib)[:3])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_which_embeddings_are_multiplied_in_bfloat16():
    q, k = pair(5, 4)
    for one, two, expected in (
        (q, k, True), (q.float(), k, False), (q, k.float(), False), (q.half(), k.half(), False),
    ):  # fmt: skip
        with recorded() as calls, core.use_backend("cpp"):
            clip_loss(one, two, logit_scale=1.0, return_lse=True)
            info_nce(one, one, two)
        assert [Inputs(*args).bfloat16 for op, args in calls] == [expected] * 2


@CPUS
def test_shared_negatives_and_one_wide_float32_operand(monkeypatch, cpu):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    q, k = pair(40, 24)
    bank = pair(130, 24)[0]
    for negatives in (bank, bank.float()):
        ours = run("cpp", lambda q, k, n, s: info_nce(q, k, n, temperature=s * 0.1), q, k, negatives)
        exact = run(
            "reference", lambda q, k, n, s: info_nce(q, k, n, temperature=s * 0.1),
            *(t.double() for t in (q, k, negatives)),
        )  # fmt: skip
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)
        for mine, truth in zip(ours[1:4], exact[1:4], strict=True):
            assert (mine - truth).norm() <= 2**-8 * truth.norm()
