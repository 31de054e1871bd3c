"""What only a device can show: no host sync, CUDA-graph replay, side streams, more than 2**31 elements."""

from __future__ import annotations

import math

import pytest
import torch

import fastloss
from benchmarks import measure, rows, run
from fastloss import core
from tests.battery import Errors, first, leaves, ops_of, to_device
from tests.cases import CASES, Draw

pytestmark = pytest.mark.gpu
WITH_KERNELS = [c for c in CASES if any(op.kernels["triton"] for op in ops_of(c.name))]
by_case = pytest.mark.parametrize("case", WITH_KERNELS, ids=lambda c: c.name)


def step(case, args, options):
    """One forward and backward; the gradients."""
    return torch.autograd.grad(first(case.fn(*args, **options)).sum(), leaves(case, args))


@by_case
def test_no_host_sync(case):
    options = to_device(case.options[0], "cuda")
    args = case.make(Draw(device="cuda"), case.shapes[0])
    for t in leaves(case, args):
        t.requires_grad_()
    step(case, args, options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, args, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_case
def test_cuda_graph_replay_sees_new_inputs(case):
    options = to_device(case.options[0], "cuda")
    args = case.make(Draw(device="cuda"), case.shapes[0])
    new = case.make(Draw(device="cuda", seed=1), case.shapes[0])
    for a in (args, new):
        for t in leaves(case, a):
            t.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(case, args, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step(case, args, options)
    expected = step(case, new, options)
    with torch.no_grad():
        for old, fresh in zip(leaves(case, args), leaves(case, new), strict=True):
            old.copy_(fresh)
    graph.replay()
    for got, want in zip(grads, expected, strict=True):
        assert torch.equal(got, want)


@by_case
def test_side_streams_do_not_disturb_each_other(case):
    options = to_device(case.options[0], "cuda")
    batches = [case.make(Draw(device="cuda", seed=s), case.shapes[0]) for s in range(2)]
    for args in batches:
        for t in leaves(case, args):
            t.requires_grad_()
    expected = [step(case, args, options) for args in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    got = []
    for stream, args in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            got.append([step(case, args, options) for _ in range(5)][-1])
    torch.cuda.synchronize()
    for mine, theirs in zip(got, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


def test_benchmark_rows_are_measured_on_the_device(tmp_path):
    asked = ["pixel_loss", "--device", "cuda", "--dtype", "bfloat16", "--sizes", "2x3x64x64", "--seconds", "0.1"]
    assert run.main([*asked, "--providers", "eager", "torch.compile", "fastloss", "--out", str(tmp_path)]) == 0
    found = [r for r in rows.read_all(tmp_path / measure.device_folder("cuda")) if r["mode"] == "both"]
    assert found and all(r["note"] == "" and float(r["p50_ms"]) > 0 for r in found)
    ours = next(r for r in found if r["provider"] == "fastloss")
    assert int(ours["launches"]) >= 2 and ours["saved_mib"] == "0.0" and float(ours["peak_mib"]) > 0


def test_pixel_loss_past_two_to_the_31_elements():
    n = 2**31 + 4097
    image = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    pred = torch.zeros(n, dtype=torch.bfloat16, device="cuda").requires_grad_()
    with torch.no_grad():
        pred[-1] = 3.0
    loss = fastloss.pixel_loss(image, pred, reduction="sum")
    (grad,) = torch.autograd.grad(loss, pred)
    assert loss.item() == 9.0
    assert grad[-1].item() == 6.0 and grad[:-1].count_nonzero().item() == 0


def test_clip_loss_past_two_to_the_31_logits():
    """Rows are unit vectors, so that loss and gradient have a formula; the logits are made, but never held."""
    rows, width, scale = 65536, 64, 10.0
    units = torch.eye(width, dtype=torch.bfloat16, device="cuda").repeat(rows // width, 1)
    image, text = units.clone().requires_grad_(), units.clone().requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    loss = fastloss.clip_loss(image, text, logit_scale=scale)
    grads = torch.autograd.grad(loss, (image, text))
    assert torch.cuda.max_memory_allocated() < 2**30
    alike = rows // width
    total = alike * math.exp(scale) + rows - alike
    assert loss.item() == pytest.approx(math.log(total) - scale, rel=1e-5)
    for grad in grads:
        assert grad[0, 1].item() == pytest.approx(scale / rows * alike / total, rel=0.02)
        assert grad[-1, 0].item() == pytest.approx(scale / rows * alike / total, rel=0.02)


def contrastive_inputs(rows, keys, width=256, dtype=torch.bfloat16):
    random = torch.Generator(device="cuda").manual_seed(0)
    return [torch.randn(n, width, generator=random, device="cuda", dtype=dtype) for n in (rows, keys)]


# exponentials kept and not; chunks of rows; frozen keys; the triangle: at sizes of several tiles that divide none
@pytest.mark.parametrize("workspace_mib", [2.0, 256.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["clip", "info_nce", "targets", "frozen", "nt_xent", "supcon", "ids"])
def test_contrastive_paths_against_dense_float64(name, dtype, workspace_mib):
    rows, keys = 1500, 2100
    query, key = contrastive_inputs(rows, keys, dtype=dtype)
    square, labels = name not in ("info_nce", "targets"), torch.arange(rows, device="cuda") // 3
    key = key[:rows] if square else key
    losses = {
        "clip": lambda q, k: fastloss.clip_loss(q, k, logit_scale=14.3, normalize=True, workspace_mib=workspace_mib),
        "info_nce": lambda q, k: fastloss.info_nce(q, k, workspace_mib=workspace_mib),
        "targets": lambda q, k: fastloss.info_nce(q, k, targets=labels * 4, workspace_mib=workspace_mib),
        "frozen": lambda q, k: fastloss.info_nce(q, k, k.detach(), workspace_mib=workspace_mib),
        "nt_xent": lambda q, k: fastloss.nt_xent_loss(q, k, temperature=0.5, workspace_mib=workspace_mib),
        "supcon": lambda q, k: fastloss.supcon_loss(q, labels, workspace_mib=workspace_mib) + 0.0 * k.sum(),
        "ids": lambda q, k: fastloss.info_nce(q, k, symmetric=True, query_ids=labels, workspace_mib=workspace_mib),
    }
    results = []
    for backend, given in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [t.to(given).requires_grad_() for t in (query, key)]
        with core.use_backend(backend):
            loss = losses[name](*leaves)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    errors = Errors(dtype)
    for i, each in enumerate(zip(*results, strict=True)):
        errors.add(str(i), *each)
    errors.check()


@pytest.mark.parametrize("rows", [64, 256, 512, 1024])
def test_small_plain_losses_launch_no_more_than_eager(rows):
    query, key = (t.requires_grad_() for t in contrastive_inputs(rows, rows))

    def eager():
        logits, own = 14.3 * (query @ key.T), torch.arange(rows, device="cuda")
        return torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)

    def launches(loss):
        torch.autograd.grad(loss(), (query, key))  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            torch.autograd.grad(loss(), (query, key))
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages())

    assert launches(lambda: fastloss.clip_loss(query, key, logit_scale=14.3)) <= launches(eager)
