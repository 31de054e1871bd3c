"""What only a device can show: no host sync, CUDA-graph replay, side streams, more than 2**31 elements."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastloss
from benchmarks import run
from benchmarks.harness import measure
from benchmarks.harness.results import read_all
from fastloss.image.image_loss import Inputs, _image_loss, _keep
from tests.conformance.cases import CASES, Draw
from tests.conformance.cases.image import IMAGE_CASES
from tests.conformance.cases.image_loss import IMAGE_LOSS_CASES
from tests.conformance.cases.volumes import VOLUME_CASES
from tests.conformance.tools import Errors, first, leaves, ops_of, to_device

pytestmark = pytest.mark.gpu
WITH_KERNELS = [c for c in CASES if any(op.kernels["triton"] for op in ops_of(c.name))]
# the first options of every case; all of the image-plane losses, whose options are kernels of their own
WHOLE = (*IMAGE_CASES, *IMAGE_LOSS_CASES, *VOLUME_CASES)  # with each of their options
ROWS = [(c, o) for c in WITH_KERNELS for o in (c.options if c in WHOLE else c.options[:1])]
by_case = pytest.mark.parametrize(("case", "options"), [pytest.param(c, o, id=f"{c.name} {o}") for c, o in ROWS])


def step(case, args, options):
    """One forward and backward; the gradients."""
    return torch.autograd.grad(first(case.fn(*args, **options)).sum(), leaves(case, args))


@by_case
def test_no_host_sync(case, options):
    options = to_device(options, "cuda")
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
def test_cuda_graph_replay_sees_new_inputs(case, options):
    options = to_device(options, "cuda")
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
    with torch.no_grad():  # guides, weights and frozen keys too
        for old, fresh in zip(tree_leaves(args), tree_leaves(new), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(fresh)
    graph.replay()
    for got, want in zip(grads, expected, strict=True):
        assert torch.equal(got, want)


@by_case
def test_side_streams_do_not_disturb_each_other(case, options):
    options = to_device(options, "cuda")
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
    asked = ["pixel_loss", "--device", "cuda", "--dtype", "bfloat16", "--sizes", "2x3x512x512", "--seconds", "0.1"]
    assert run.main([*asked, "--providers", "eager", "torch.compile", "fastloss", "--out", str(tmp_path)]) == 0
    found = [r for r in read_all(tmp_path / measure.device_folder("cuda")) if r["mode"] == "both"]
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


def large_pair():
    """Black images of more than 2**31 elements in one plane but for a white pixel in the last corner of the second."""
    image = torch.zeros(1, 1, 65536, 32776, dtype=torch.bfloat16, device="cuda")
    pred = torch.zeros_like(image)
    pred[..., -1, -1] = 1.0
    return image, pred.requires_grad_()


def test_smoothness_of_an_image_past_two_to_the_31_elements():
    _, pred = large_pair()
    loss = fastloss.smoothness_loss(pred, convention="torchmetrics", reduction="sum")
    (grad,) = torch.autograd.grad(loss, pred)
    assert loss.item() == 2.0
    assert grad[0, 0, -2:, -2:].tolist() == [[0.0, -1.0], [-1.0, 2.0]] and grad.count_nonzero().item() == 3


def test_ssim_of_an_image_past_two_to_the_31_elements():
    """The corner has the sums and gradients of itself alone."""
    image, pred = large_pair()
    part = pred.detach()[..., -64:, -64:].clone().requires_grad_()
    found = []
    for x, y in ((image, pred), (image[..., -64:, -64:].contiguous(), part)):
        loss = fastloss.ssim_loss(x, y) * y.numel()
        found.append((loss.detach(), torch.autograd.grad(loss, y)[0][..., -32:, -32:]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 11])
def test_image_loss_of_an_image_past_two_to_the_31_elements(window):
    image, pred = large_pair()
    part = pred.detach()[..., -64:, -64:].clone().requires_grad_()
    found = []
    for x, y in ((image, pred), (image[..., -64:, -64:].contiguous(), part)):
        ssim = {"window": window, "sigma": 1.5, "same": True, "c1": 1e-4, "c2": 9e-4}
        inputs = Inputs(x, y, pixel_kind="l1", smoothness_kind="l1", **ssim)
        sums = _image_loss(*inputs._replace(keep=_keep(inputs)))
        upstream = torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda")
        found.append((sums.detach(), torch.autograd.grad(sums, y, upstream)[0][..., -32:, -32:]))
    assert found[0][0][:3].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"smoothness": (1, 0.1)}, {"smoothness": (1, 0.1), "ssim": 0.2}], ids=str)
def test_image_loss_is_one_launch_a_direction(options):
    """Beside the second stage of the sums and the few numbers that make a total of them."""
    image, pred = (torch.rand(2, 3, 64, 64, device="cuda") for _ in range(2))
    pred.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fastloss.image_loss(image, pred, pixel=(1, 1.0), **options).total.backward()
        torch.cuda.synchronize()
    ours = [e.key for e in profile.key_averages() if "image" in e.key]
    assert len(ours) == 2


def test_clip_loss_past_two_to_the_31_logits():
    """Rows are unit vectors, so that loss and gradient have a formula; the logits are made, but never held."""
    rows, width, scale = 65536, 64, 10.0
    units = torch.eye(width, dtype=torch.bfloat16, device="cuda").repeat(rows // width, 1)
    image, text = units.clone().requires_grad_(), units.clone().requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = fastloss.clip_loss(image, text, logit_scale=scale)
    grads = torch.autograd.grad(loss, (image, text))
    assert torch.cuda.max_memory_allocated() - before < 2**30
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
    case, call = {
        "clip": ("clip_loss", lambda loss, q, k, o: loss(q, k, logit_scale=14.3, normalize=True, **o)),
        "info_nce": ("info_nce", lambda loss, q, k, o: loss(q, k, **o)),
        "targets": ("info_nce", lambda loss, q, k, o: loss(q, k, targets=labels * 4, **o)),
        "frozen": ("info_nce bank", lambda loss, q, k, o: loss(q, k, k.detach(), **o)),
        "nt_xent": ("nt_xent_loss", lambda loss, q, k, o: loss(q, k, temperature=0.5, **o)),
        "supcon": ("supcon_loss", lambda loss, q, k, o: loss(q, labels, **o) + 0.0 * k.sum()),
        "ids": ("info_nce", lambda loss, q, k, o: loss(q, k, symmetric=True, query_ids=labels, key_ids=labels, **o)),
    }[name]
    row = next(c for c in CASES if c.name == case)
    results = []
    for loss_of, given, options in (
        (row.fn, dtype, {"workspace_mib": workspace_mib}), (row.eager, dtype, {}), (row.eager, torch.float64, {})
    ):  # fmt: skip
        leaves = [t.to(given).requires_grad_() for t in (query, key)]
        loss = call(loss_of, *leaves, options)
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
