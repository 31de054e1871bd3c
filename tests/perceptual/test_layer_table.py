"""Lists of layers of every length on the kernels: values, launches, and how often Triton compiles."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from fastloss import core, dists_distance, feature_distance, lpips_distance
from tests.conformance.tools import INTERPRETING, Errors

pytestmark = pytest.mark.kernels

AVAILABLE = core.backend_report()
KERNELS = "triton" if INTERPRETING else "cpp"
needs_kernels = pytest.mark.skipif(AVAILABLE[KERNELS] != "available", reason=AVAILABLE[KERNELS])
LOSSES = {
    "l1": feature_distance,
    "smooth_l1": lambda f, t: feature_distance(f, t, criterion="smooth_l1", beta=0.4, weights=[0.5] * len(f)),
    "per sample": lambda f, t: feature_distance(f, t, criterion="l2", reduction="none"),
    "lpips": lambda f, t: lpips_distance(f, t, [torch.linspace(0.5, 1, x.shape[1]) for x in f]),
    "lpips map": lambda f, t: lpips_distance(f, t, None, spatial=True),
    "dists": dists_distance,
}


def lists(count: int) -> list[list[torch.Tensor]]:
    """Layers of mixed sizes, some of one pixel, some of one channel, in both memory formats; the last of more rows."""
    generator = torch.Generator().manual_seed(count)
    shapes = [(2, 1 + 5 * i % 23, 1 + i % 4, 1 + 3 * i % 5) for i in range(count - 1)] + [(2, 3, 16, 16)]
    features = [torch.randn(s, generator=generator) for s in shapes]
    targets = [f + 0.5 * torch.randn(f.shape, generator=generator) for f in features]
    for side in (features, targets):
        side[1::3] = [x.contiguous(memory_format=torch.channels_last) for x in side[1::3]]
    return [features, targets]


def names_and_lengths():
    """Interpreted, 5 and 70 layers of two losses are enough: the others take the paths of 1, 9, 40 and 64 there."""
    few = ("l1", "dists") if INTERPRETING else LOSSES
    return [(name, count) for count in (1, 5, 9, 40, 64, 70) for name in (few if count in (5, 70) else LOSSES)]


@needs_kernels
@pytest.mark.parametrize(("name", "count"), names_and_lengths())
def test_lists_of_every_length(name, count):
    fn, features, errors = LOSSES[name], *lists(count)[:1], Errors(torch.float32)
    targets, found = lists(count)[1], {}
    for key, backend, dtype in (("ours", KERNELS, torch.float32), ("eager", "reference", torch.float32),
                                ("exact", "reference", torch.float64)):  # fmt: skip
        sides = [[x.detach().to(dtype).requires_grad_() for x in side] for side in (features, targets)]
        with core.use_backend(backend):
            out = fn(*sides)
            upstream = torch.linspace(0.5, 2, out.numel()).reshape(out.shape).to(out.dtype)
            found[key] = (out.detach(), *torch.autograd.grad(out, [*sides[0], *sides[1]], upstream))
    for i, each in enumerate(zip(found["ours"], found["eager"], found["exact"], strict=True)):
        errors.add("gradients" if i else "value", *each, where=str(i))
    errors.check()


LAUNCHES = """
    import torch
    from tests.triton import aot
    from tests.triton import fake_driver
    aot._start_worker()
    from fastloss.perceptual.kernels import dists, feature_distance, lpips
    from fastloss.perceptual.layer_layout import layout_of, sign_count

    def calls(shapes):
        f = [torch.empty(s, device="meta") for s in shapes]
        layout, ones = layout_of(f, f, "mean"), [1.0] * len(f)
        signs = torch.empty(sign_count(layout, "mean"), dtype=torch.int32, device="meta")
        grad = torch.empty((), device="meta")
        stats = torch.empty(5, 2, sum(s[1] for s in shapes), device="meta")
        kept = torch.empty(4, sum(s[0] * s[2] * s[3] for s in shapes), device="meta")
        lins = [torch.empty(s[1], device="meta") for s in shapes]
        x = feature_distance.Inputs(f, f, ones, layout, torch.float32, "l1", 1.0, "mean")
        yield feature_distance.feature_l1_fwd, (x,)
        x = feature_distance.LayerInputs(ones, layout, torch.float32, "mean")
        saved, needs = feature_distance.Saved(signs), feature_distance.Needs(True, False)
        yield feature_distance.feature_l1_bwd, (grad, saved, [], x, needs)
        x = lpips.Inputs(f, f, lins, 1e-10, 0.0, False)
        yield lpips.lpips_fwd, (x,)
        yield lpips.lpips_bwd, (torch.empty(2, device="meta"), lpips.Saved(kept), x, needs)
        x = dists.Inputs(f, f)
        yield dists.dists_fwd, (x,)
        yield dists.dists_bwd, (stats, x, stats, dists.Saved(stats[:3]), needs)

    def launched(shapes):
        found = []
        for launch, args in calls(shapes):
            aot._seen.clear()
            launch(*args)
            found.append([name for name, _ in aot._seen])
        return found
"""


def in_a_process(code: str) -> None:
    """Launchers on the driver without a device, which stays in the process it is installed in."""
    source = textwrap.dedent(LAUNCHES) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


needs_triton = pytest.mark.skipif(
    INTERPRETING or not AVAILABLE["triton"].startswith(("available", "no GPU", "no CUDA")), reason=AVAILABLE["triton"]
)


@pytest.mark.slow
@needs_triton
def test_one_launch_a_pass_for_up_to_64_layers():
    in_a_process("""
        main = [["_distance_fwd_kernel"], ["_distance_bwd_kernel"], ["_lpips_fwd_kernel"], ["_lpips_bwd_kernel"],
                ["_dists_fwd_kernel"], ["_dists_bwd_kernel"]]
        for count in (1, 5, 8):
            assert launched([(2, 16, 8, 8)] * count) == main, count
        for count in (9, 40, 64):  # and the small one that writes the table
            assert launched([(2, 16, 8, 8)] * count) == [["_write_table_kernel", *names] for names in main], count
        assert launched([(2, 16, 8, 8)] * 65) == [["_write_table_kernel", *names * 2] for names in main]
    """)


@pytest.mark.slow
@needs_triton
def test_sizes_and_lengths_compile_nothing_anew():
    in_a_process("""
        sizes = [[(2, 16, 16 * k, 16 * k)] * 3 for k in (2, 3, 4)]  # the tile of LPIPS: whole, or not
        long = [[(2, 16, 4 * k, 8)] * n for k, n in ((2, 17), (5, 40), (3, 64))]
        for shapes in (sizes, long):
            kernels = [set() for _ in range(6)]
            for one in shapes:
                for found, (launch, args) in zip(kernels, calls(one)):
                    aot._seen.clear()
                    launch(*args)
                    found |= {id(kernel) for _, kernel in aot._seen}
            assert all(len(found) <= 2 for found in kernels), [len(found) for found in kernels]
    """)
