"""What the conformance tests cannot say of feature_distance's kernels: what they keep, every CPU, threads, layouts,
lists."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import core
from fastloss.perceptual.layer_layout import layout_of

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built"),
]
CRITERIA = ({"criterion": "l1"}, {"criterion": "l2"}, {"criterion": "charbonnier", "eps": 0.1},
            {"criterion": "smooth_l1", "beta": 0.3})  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 5, 37, 41), (3, 2, 150, 149), (3, 1), (3, 33), (3, 7, 2, 2))  # the second spans several blocks a sample


def lists(dtype: torch.dtype = torch.float32, shapes: tuple = SHAPES) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    noise = [torch.randn(s, generator=generator) for s in shapes]
    moved = [torch.where(n.abs() < 0.3, f, f + 0.5 * n) for f, n in zip(features, noise, strict=True)]  # with ties
    return features, [t.to(dtype) for t in moved]


def run(backend: str, features: list[Tensor], targets: list[Tensor], options: dict) -> list[Tensor]:
    features, targets = ([t.detach().requires_grad_() for t in side] for side in (features, targets))
    with core.use_backend(backend):
        out = fastloss.feature_distance(features, targets, **options)
        upstream = torch.linspace(0.5, 2, out.numel()).reshape(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, (*features, *targets), upstream)]


@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CRITERIA, ids=str)
def test_every_instruction_set(monkeypatch, cpu, dtype, options):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    features, targets = lists(dtype)
    for reduction in ("sum", "none"):
        chosen = options | {"reduction": reduction, "weights": [1.0, 0.5, 2.0, 0.0, -1.0]}
        exact = run("reference", [f.double() for f in features], [t.double() for t in targets], chosen)
        eager = run("reference", features, targets, chosen)
        ours = run("cpp", features, targets, chosen)
        for truth, theirs, mine in zip(exact, eager, ours, strict=True):
            eps = torch.finfo(mine.dtype).eps * truth.abs().max()
            assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + eps


@pytest.mark.parametrize("options", CRITERIA, ids=str)
def test_thread_counts_give_the_same_bits(options):
    features, targets = lists()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([*run("cpp", features, targets, options),
                            *run("cpp", features, targets, options | {"reduction": "none"})])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def saved_bytes(features: list[Tensor], targets: list[Tensor], **options) -> int:
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with core.use_backend("cpp"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fastloss.feature_distance(features, targets, **options)
    return sum(held.values())


def test_l1_keeps_two_bits_an_element():
    shapes = ((4, 64, 32, 32), (4, 128, 16, 16), (4, 256, 8, 8), (4, 512, 4, 4), (4, 512, 2, 2))
    features, targets = lists(shapes=shapes)
    for f in features:
        f.requires_grad_()
    count = sum(f.numel() for f in features)
    assert saved_bytes(features, targets) == count / 4
    assert saved_bytes(features, targets, reduction="none") == count / 4
    assert saved_bytes(features, targets, criterion="l2") == 8 * count  # both lists, which are alive anyway


def test_l1_frees_the_targets_after_the_forward():
    features, targets = lists()
    for f in features:
        f.requires_grad_()
    gone = [weakref.ref(t) for t in targets]
    with core.use_backend("cpp"):
        loss = fastloss.feature_distance(features, targets)
        del targets
        assert all(t() is None for t in gone)
        loss.backward()
    assert all(f.grad.isfinite().all() for f in features)


LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "gaps": lambda t: torch.cat([t, t], 1)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("options", CRITERIA, ids=str)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_layouts(options, first, second):
    features, targets = lists(shapes=((4, 6, 20, 10), (4, 2, 3, 5)))
    features, targets = [LAYOUTS[first](f) for f in features], [LAYOUTS[second](t) for t in targets]
    for reduction in ("sum", "none"):
        chosen = options | {"reduction": reduction}
        ours, theirs = (run(backend, features, targets, chosen) for backend in ("cpp", "reference"))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        if first == second == "channels last":
            assert all(g.is_contiguous(memory_format=torch.channels_last) for g in ours[1:])


def test_equal_strides_are_walked_in_memory_order():
    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert layout_of([x], [x], "none") == [4, 2, 3, 4, 5, 60, 1, 15, 3]
    samples_last = torch.zeros(3, 4, 5, 2).permute(3, 0, 1, 2)
    assert layout_of([samples_last], [samples_last], "mean")[5:] == [1, 40, 10, 2]
    assert layout_of([samples_last], [samples_last], "none")[5:] == [60, 20, 5, 1]  # rows must be whole: copied
    assert layout_of([x], [x.contiguous()], "mean")[5:] == [60, 1, 15, 3]  # the features'; the targets are copied
    assert layout_of([x[:1].expand(x.shape)], [x], "mean")[5:] == [60, 1, 15, 3]


@pytest.mark.parametrize("options", CRITERIA, ids=str)
def test_forty_layers_of_any_size(options):
    features, targets = lists(shapes=tuple((2, 1 + i % 7, 1 + i % 3, 1 + i) for i in range(40)))
    ours, theirs = (run(backend, features, targets, options) for backend in ("cpp", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", CRITERIA, ids=str)
def test_empty_layers_and_numbers(options):
    features, targets = [torch.zeros(0, 3), torch.tensor(2.0)], [torch.zeros(0, 3), torch.tensor(0.5)]
    ours, theirs = (run(backend, features, targets, options | {"reduction": "sum"}) for backend in ("cpp", "reference"))
    torch.testing.assert_close(ours, theirs)
    empty = run("cpp", features[:1], targets[:1], options | {"reduction": "none"})
    assert empty[0].shape == (0,) and empty[1].shape == (0, 3)


@pytest.mark.parametrize("options", CRITERIA, ids=str)
def test_mixed_dtypes_keep_their_gradients_dtypes(options):
    features, targets = lists()
    features[0], targets[1] = features[0].bfloat16(), targets[1].half()
    ours, theirs = (run(backend, features, targets, options) for backend in ("cpp", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-6)
    assert [g.dtype for g in ours[1:]] == [t.dtype for t in (*features, *targets)]


@pytest.mark.parametrize("options", CRITERIA, ids=str)
def test_one_side_and_one_layer_may_need_gradients(options):
    features, targets = lists()
    _, *both = run("cpp", features, targets, options)
    for side, offset in ((features, 0), (targets, len(features))):
        side[2].requires_grad_()
        with core.use_backend("cpp"):
            (got,) = torch.autograd.grad(fastloss.feature_distance(features, targets, **options), [side[2]])
            upstream = 0.5  # what run() gives for a scalar
        torch.testing.assert_close(upstream * got, both[offset + 2])
        side[2].requires_grad_(False)


@pytest.mark.parametrize("options", CRITERIA, ids=str)
def test_double_backward_through_the_upstream_gradient(options):
    second = []
    for backend in ("cpp", "reference"):
        features, targets = lists()
        for t in (*features, targets[0]):
            t.requires_grad_()
        with core.use_backend(backend):
            loss = fastloss.feature_distance(features, targets, reduction="none", **options)
            first = torch.autograd.grad((loss**2).sum(), (*features, targets[0]), create_graph=True)
            second.append(torch.autograd.grad(sum((g**3).sum() for g in first), (*features, targets[0])))
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-8)


def test_large_gradients_are_streamed_whole():
    features, targets = lists(shapes=((2, 3 * 2**19 + 5), (2, 2**20)))
    for reduction in ("mean", "none"):
        for options in CRITERIA[:2]:
            chosen = options | {"reduction": reduction}
            ours, theirs = (run(backend, features, targets, chosen) for backend in ("cpp", "reference"))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
