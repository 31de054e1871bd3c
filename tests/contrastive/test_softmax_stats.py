"""What the conformance tests cannot say of the chunked softmax kernels: memory, chunks, CPUs, threads, late
training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import clip_loss, core, info_nce
from fastloss.contrastive.ops.softmax_stats import Inputs, softmax_stats
from fastloss.contrastive.options import Form
from tests.conformance.tools import Errors

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built"),
]


def pair(rows: int, width: int, keys: int | None = None, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(keys or rows, width, generator=generator)
    return key[:rows] + noise * torch.randn(rows, width, generator=generator), key


def run(backend: str | None, loss, *args: Tensor, **options) -> list[Tensor]:
    args = tuple(t.detach().requires_grad_() for t in args)
    with core.use_backend(backend):
        out = loss(*args, **options)
    up = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, args, up)]


def judge(loss, *args: Tensor, **options) -> None:
    """The kernels against float64 by the one rule: at most twice the reference's error, plus eps."""
    errors = Errors(torch.float32)
    collect(errors, loss, *args, **options)
    errors.check()


def collect(errors: Errors, loss, *args: Tensor, backend: str | None = "cpp", **options) -> None:
    """Samples at several scales."""
    for factor in (1.0, 0.97, 0.9, 0.83):
        given = *args[:-1], factor * args[-1]
        exact = run("reference", loss, *(t.double() for t in given), **options)
        results = (run(backend, loss, *given, **options), run("reference", loss, *given, **options), exact)
        for name, ours, eager, truth in zip(("value", "query", "key", "scale"), *results, strict=True):
            errors.add(name, ours, eager, truth, str(len(args[0])))


def clip(scale: float = 14.3, **options):
    """By the op that makes statistics: the by-products keep it from the one of the plain losses."""
    return lambda q, k, s: clip_loss(q, k, logit_scale=s * scale, return_lse=True, **options).loss


@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_instruction_set_and_odd_sizes(monkeypatch, cpu, reduction):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    errors = Errors(torch.float32)
    for rows in (1, 2, 15, 67, 1031):
        collect(errors, clip(normalize=True, reduction=reduction), *pair(rows, 13), torch.ones(()))
    errors.check()


@pytest.mark.parametrize("workspace_mib", [1e-6, 0.01, 0.05, 0.2])
def test_chunks_of_one_row_and_more(workspace_mib):
    judge(clip(normalize=True, workspace_mib=workspace_mib), *pair(133, 9), torch.ones(()))


@pytest.mark.parametrize(("rows", "keys"), [(5, 9), (70, 131), (131, 131)])
def test_one_direction_with_more_keys_than_queries(rows, keys):
    def loss(q, k, t):
        return info_nce(q, k, temperature=t * 0.07, reduction="none", return_lse=True).loss

    judge(loss, *pair(rows, 11, keys), torch.ones(()))


def test_scale_200_unnormalised():
    judge(clip(200.0, reduction="none"), *pair(97, 24), torch.ones(()))


@pytest.mark.parametrize("noise", [0.3, 0.1, 0.01])
def test_late_training_keeps_the_digits(noise):
    """The positive has almost all of the probability: relative error of every row's loss, and of the gradient."""
    q, k = pair(64, 48, noise=noise)
    q, k = (F.normalize(t, dim=1).mul(2**10).round() / 2**10 for t in (q, k))  # products exact, so are the logits
    ours, exact = (
        run(b, clip_loss, q.to(t), k.to(t), logit_scale=32.0, reduction="none")
        for b, t in (("cpp", torch.float32), ("reference", torch.float64))
    )
    assert exact[0].max() < 1e-3
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert (mine - truth).norm() <= 1e-5 * truth.norm()


def test_bias_cancels_and_weights_reach_the_gradient():
    q, k = pair(33, 8)
    bias = torch.tensor(3.0, requires_grad=True)
    weights = torch.linspace(0, 1, 33)
    loss = clip_loss(q, k, logit_scale=0.5, logit_bias=bias, weights=weights)
    (grad,) = torch.autograd.grad(loss, bias)
    assert grad == 0
    plain = clip(0.5, weights=weights)(q, k, torch.ones(()))  # by the same op
    torch.testing.assert_close(loss, plain, rtol=0, atol=0)
    judge(clip(0.5, weights=weights), q, k, torch.ones(()))


def saved_bytes(rows: int, workspace_mib: float) -> int:
    saved: dict[int, int] = {}
    q, k = (t.requires_grad_() for t in pair(rows, 8))
    scale = torch.tensor(9.0, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.__setitem__(t.data_ptr(), t.untyped_storage().nbytes()), t)[1], lambda t: t
    ):
        clip(normalize=True, workspace_mib=workspace_mib)(q, k, scale)
    return sum(saved.values())


def test_saved_tensors_grow_with_the_rows_not_with_the_pairs():
    little, more = saved_bytes(256, 0.2), saved_bytes(512, 0.2)
    assert more <= 2.1 * little and more < 512 * 512
    assert saved_bytes(512, 256) <= more + 4 * 512 * 512  # the logits of small batches, once


def test_only_what_needs_a_gradient_gets_one():
    q, k = pair(40, 8)
    both = run("cpp", clip_loss, q, k, logit_scale=1.0)
    for which in (0, 1):
        args = [t.clone().requires_grad_(i == which) for i, t in enumerate((q, k))]
        with core.use_backend("cpp"):
            (0.5 * clip_loss(*args, logit_scale=1.0)).backward()
        torch.testing.assert_close(args[which].grad, both[1 + which], rtol=1e-6, atol=1e-9)
        assert args[1 - which].grad is None


def test_infinite_logits_of_negatives_and_empty_batches():
    q, k = torch.zeros(3, 1), torch.zeros(3, 1)
    q[0], k[:, 0] = 1, torch.tensor([0.0, -torch.inf, -torch.inf])
    with core.use_backend("cpp"):
        assert clip_loss(q[:1], k[:1], logit_scale=1.0) == 0
        assert info_nce(q[:1], k, normalize=False) == 0
        empty = torch.zeros(0, 4, requires_grad=True)
        loss = clip_loss(empty, torch.zeros(0, 4), logit_scale=1.0, reduction="sum")
        assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 4)


def test_thread_counts_give_the_same_bits_but_for_the_matrix_products():
    """The products are the library's; with small integers they are exact, and what is left is ours."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (300, 6), generator=generator).float() for _ in range(2))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = Inputs(q, k, torch.ones(300), *[None] * 6, *Form(diagonal=True, symmetric=True), 0.0, 0.1)
            results.append(softmax_stats.fwd(*x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_backward_under_autocast_stays_in_float32():
    q, k = pair(40, 16)
    plain = run("cpp", clip_loss, q, k, logit_scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        under = run("cpp", clip_loss, q, k, logit_scale=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
