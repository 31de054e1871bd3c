"""What the conformance tests cannot say of the LPIPS head's kernels: every CPU, threads, layouts, what they keep,
edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import core
from tests.conformance.tools import INTERPRETING, Errors

AVAILABLE = core.backend_report()
KERNELS = "triton" if INTERPRETING else "cpp"
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(AVAILABLE[KERNELS] != "available", reason=AVAILABLE[KERNELS]),
]
on_cpu = pytest.mark.skipif(INTERPRETING, reason="the C++ kernels only")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((2, 5, 7, 9), (2, 64, 24, 24), (2, 70, 3, 1), (2, 1, 6, 6), (2, 515, 8, 4))  # the second: several blocks


def lists(dtype: torch.dtype = torch.float32, shapes: tuple = SHAPES) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(s, generator=generator).relu() for s in shapes]
    targets = [(f + 0.5 * torch.randn(f.shape, generator=generator)).relu() for f in features]
    features[0][:1, :, 1:3], targets[0][:1, :, 2:4] = 0, 0
    lins = [torch.rand(s[1], generator=generator) for s in shapes]
    return [f.to(dtype) for f in features], [t.to(dtype) for t in targets], lins


def run(backend: str, features, targets, lins, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (*features, *targets)]
    with core.use_backend(backend):
        out = fastloss.lpips_distance(leaves[: len(features)], leaves[len(features) :], lins, **options)
        upstream = torch.linspace(0.5, 2, out.numel()).reshape(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def check(features, targets, lins, together: bool = False, **options) -> None:
    """The one rule, against the reference in the same dtype and in float64; `together` for layers of few numbers."""
    dtype, errors = features[0].dtype, Errors(features[0].dtype)
    wide = [[t.double() for t in side] for side in (features, targets)]
    exact, eager = run("reference", *wide, lins, **options), run("reference", features, targets, lins, **options)
    for i, (mine, theirs, truth) in enumerate(
        zip(run(KERNELS, features, targets, lins, **options), eager, exact, strict=True)
    ):
        assert i == 0 or mine.dtype == dtype
        errors.add("value" if i == 0 else "gradient" if together else f"gradient {i}", mine, theirs, truth)
    errors.check()


@on_cpu
@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_instruction_set(monkeypatch, cpu, dtype, layout):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    features, targets, lins = lists(dtype)
    features, targets = ([t.contiguous(memory_format=layout) for t in side] for side in (features, targets))
    check(features, targets, lins)
    check(features, targets, None, spatial=True, size=(5, 5))


@on_cpu
def test_thread_counts_give_the_same_bits():
    features, targets, lins = lists()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpp", features, targets, lins) + run("cpp", features, targets, lins, spatial=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "gaps": lambda t: torch.cat([t, t], 1)[:, ::2],
}


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_layouts(first, second):
    features, targets, lins = lists(shapes=((2, 6, 5, 4), (2, 2, 3, 5)))
    check([LAYOUTS[first](f) for f in features], [LAYOUTS[second](t) for t in targets], lins)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_keep_the_memory_format(dtype):
    features, targets, lins = lists(dtype, ((2, 6, 5, 4),))
    for form in ("contiguous", "channels last"):
        x = LAYOUTS[form](features[0])
        assert run(KERNELS, [x], targets, lins)[1].stride() == x.stride()


def test_one_side_at_a_time_gives_the_gradients_of_both():
    features, targets, lins = lists(shapes=((2, 6, 5, 4), (2, 3, 2, 2)))
    both = run(KERNELS, features, targets, lins)[1:]
    with core.use_backend(KERNELS):
        for side, expected in ((0, both[:2]), (1, both[2:])):
            args = [features, targets]
            args[side] = [t.clone().requires_grad_() for t in args[side]]
            out = fastloss.lpips_distance(*args, lins)
            got = torch.autograd.grad(out, args[side], torch.linspace(0.5, 2, 2))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_equal_features_are_exactly_zero():
    """Fused into one operation, x a - y b would leave the rounding of a product."""
    features, _, lins = lists()
    for layout in ("contiguous", "channels last"):
        x = [LAYOUTS[layout](f) for f in features]
        out, *grads = run(KERNELS, x, [f.clone() for f in x], lins)
        assert torch.equal(out, torch.zeros(2)) and all((g == 0).all() for g in grads)


def test_near_convergence_the_difference_is_direct():
    """|f|^2 + |t|^2 - 2 f.t would be off by its whole value here."""
    f = torch.rand(96, 64, 2, 2, generator=torch.Generator().manual_seed(1))  # of one value eager may be exact by luck
    check([f], [f * (1 + 1e-4 * torch.sin(torch.arange(64.0)).view(1, -1, 1, 1))], None)


def test_zero_pixels_have_zero_gradients_and_large_ones_are_as_eagers():
    features, targets, lins = lists(shapes=((2, 5, 7, 9),))
    grad_f, grad_t = run(KERNELS, features, targets, lins)[1:]
    assert (grad_f[0, :, 1:3] == 0).all() and (grad_t[0, :, 2:4] == 0).all()
    assert all(g.isfinite().all() for g in (grad_f, grad_t))
    for scale in (1e-15, 1e15):
        check([scale * f for f in features], [scale * t for t in targets], lins)


def test_forty_layers():
    features, targets, lins = lists(shapes=tuple((2, 1 + i % 7, 1 + i % 3, 2) for i in range(40)))
    check(features, targets, lins, together=True)


def test_no_sample_and_no_lin_gradient_needed():
    features, targets, lins = lists(shapes=((0, 3, 2, 2), (0, 2, 1, 1)))
    out, *grads = run(KERNELS, features, targets, lins)
    assert out.shape == (0,) and [g.shape for g in grads] == [f.shape for f in (*features, *targets)]
    features, targets, lins = lists(shapes=((2, 3, 2, 2),))
    lins[0].requires_grad_()
    with core.use_backend(None):  # goes to the reference, which has that gradient
        out = fastloss.lpips_distance(features, targets, lins)
    (grad,) = torch.autograd.grad(out.sum(), lins)
    u, v = (f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in (features[0], targets[0]))
    torch.testing.assert_close(grad, ((u - v) ** 2).mean((2, 3)).sum(0))


def test_what_the_backward_keeps():
    """Beside the lists, which are alive anyway: four numbers of a pixel."""
    shapes = ((4, 64, 32, 32), (4, 128, 16, 16), (4, 256, 8, 8))
    features, targets, lins = lists(shapes=shapes)
    for f in features:
        f.requires_grad_()
    held: dict[int, int] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.__setitem__(t.data_ptr(), t.numel() * t.element_size()) or t, lambda t: t
    )
    with core.use_backend(KERNELS), hooks:
        fastloss.lpips_distance(features, targets, lins)
    count = sum(f.numel() for f in features)
    pixels = sum(f.numel() // f.shape[1] for f in features)
    assert sum(held.values()) == 8 * count + 16 * pixels + 4 * sum(s[1] for s in shapes)
    assert 16 * pixels < 0.23 * count
