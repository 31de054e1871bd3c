"""What the conformance tests cannot say of the C++ kernels: every instruction set, thread counts, layouts, the stable
ABI."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import core

pytestmark = pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built")
KINDS = ({"p": 1}, {"p": 1.5}, {"p": 2}, {"p": 2.7}, {"p": 3}, {"p": 4}, {"p": "charbonnier"}, {"p": "huber"})
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pair(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=generator).to(dtype)
    return image, (image + 0.5 * torch.randn(shape, generator=generator)).to(dtype)


def run(backend: str, image: Tensor, pred: Tensor, options: dict) -> list[Tensor]:
    image, pred = image.detach().requires_grad_(), pred.detach().requires_grad_()
    with core.use_backend(backend):
        out = fastloss.pixel_loss(image, pred, **options)
        return [out.detach(), *torch.autograd.grad(out, (image, pred), torch.ones_like(out))]


@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_instruction_set(monkeypatch, cpu, dtype, options):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    image, pred = pair(dtype, 3, 5, 37, 41)  # ends in the middle of a vector, spans more than one block
    for reduction in ("sum", "none"):
        chosen = options | {"reduction": reduction}
        exact = run("reference", image.double(), pred.double(), chosen)
        eager = run("reference", image, pred, chosen)
        ours = run("cpp", image, pred, chosen)
        for truth, theirs, mine in zip(exact, eager, ours, strict=True):
            eps = torch.finfo(mine.dtype).eps * truth.abs().max()
            assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + eps


@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
def test_float16_extremes_round_like_torch(monkeypatch, cpu):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        got = run("cpp", torch.zeros_like(x), x, {"p": 1, "reduction": "none"})[0]
        torch.testing.assert_close(got, x.float().abs(), rtol=0, atol=0, equal_nan=True)
        # the gradient 2 g d / 2 rounds g d back to the dtype, through subnormals and overflow
        ones, upstream = torch.ones_like(x), torch.logspace(-12, 40, len(x), base=2) * 1.0001
        grad = torch.ops.fastloss.pixel_bwd(upstream, torch.zeros_like(x), ones, None, "l1", 1.0, False, False, True)[1]
        torch.testing.assert_close(grad, upstream.to(dtype), rtol=0, atol=0)
        tiny = torch.logspace(-30, 18, len(x), base=2) * 1.0001
        grad = torch.ops.fastloss.pixel_bwd(tiny, torch.zeros_like(x), ones, None, "l1", 1.0, False, False, True)[1]
        torch.testing.assert_close(grad, tiny.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_special_values_come_out_as_the_references(options):
    large = 1e18 if options["p"] == "charbonnier" else 1e30  # whose kernels square it
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 1.0, -1.0, large] * 7)
    zero = torch.zeros_like(special)
    ours = run("cpp", zero, special, options | {"reduction": "none"})
    theirs = run("reference", zero, special, options | {"reduction": "none"})
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-38, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_counts_give_the_same_bits(dtype):
    image, pred = pair(dtype, 2, 3, 333, 217)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpp", image, pred, {"p": "charbonnier"}))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "gaps": lambda t: torch.cat([t, t], 1)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("weight_shape", [(4, 1, 60, 50), (4, 1, 1, 1), (1, 6, 1, 1), (50,), (4, 6, 60, 50)], ids=str)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", ["channels last", "gaps"])
def test_layouts_and_broadcast_weights(weight_shape, first, second):
    image, pred = pair(torch.float32, 4, 6, 60, 50)
    image, pred = LAYOUTS[first](image), LAYOUTS[second](pred)
    drawn = torch.rand(weight_shape, generator=torch.Generator().manual_seed(1))
    for weight in (drawn, drawn.to(torch.bfloat16)):
        for reduction in ("sum", "none"):
            options = {"p": 1.5, "weight": weight, "reduction": reduction}
            ours, theirs = (run(backend, image, pred, options) for backend in ("cpp", "reference"))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            if reduction == "none":
                assert ours[0].stride() == torch.empty_like(image).stride()
            assert ours[1].stride() == torch.empty_like(image).stride()
            assert ours[2].stride() == torch.empty_like(pred).stride()


def test_large_gradients_are_streamed_whole():
    image, pred = pair(torch.float32, 3 * 2**20 + 5)
    ours, theirs = (run(backend, image, pred, {"p": 1}) for backend in ("cpp", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_unknown_cpu_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTLOSS_CPU", "pentium")
    with pytest.raises(RuntimeError, match="FASTLOSS_CPU: expected default, avx2, avx512 or avx512_bf16, got pentium"):
        run("cpp", torch.zeros(3), torch.ones(3), {})


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_only_the_stable_abi_is_used():
    library = next(pathlib.Path(fastloss.__file__).parent.glob("_C*.so"))
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    assert "torch_call_dispatcher" in listing.stdout
    assert not re.findall(r" (?:_ZN[KR]?(?:2at|3c10|5torch)|_ZT[IV]N3c10|GOMP_)\S*", listing.stdout)
