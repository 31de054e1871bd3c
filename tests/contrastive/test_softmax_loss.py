"""The op of the plain softmax losses: each way of what it saves, its bounds, and its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastloss import clip_loss, core, info_nce
from fastloss.contrastive.ops.softmax_loss import Inputs, softmax_loss
from fastloss.contrastive.save_plan import KEY, QUERY, SCALE, save_of_loss
from tests.conformance.tools import Errors, recorded

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(core.backend_report()["cpp"] != "available", reason="the C++ kernels are not built"),
]

ONE, ALL = {"temperature": 0.07}, {"temperature": 0.07, "symmetric": True}
NONE, MEAN = {"reduction": "none"}, {"reduction": "mean"}
WAYS = {  # (rows, keys), what needs a gradient, options, what is saved
    "row grads": ((67, 131), QUERY, ONE | MEAN, ("row_grads", 0)),
    "row grads, unreduced": ((67, 67), QUERY + SCALE, ONE | NONE, ("row_grads", 0)),
    "row grads in blocks": ((70, 1100), QUERY, ONE | MEAN | {"workspace_mib": 0.05}, ("row_grads", 0)),
    "grads": ((67, 131), QUERY + KEY + SCALE, ONE | MEAN, ("grads", 0)),
    "grads in chunks": ((200, 300), QUERY + KEY, ONE | {"reduction": "sum", "workspace_mib": 0.25}, ("grads", 0)),
    "grads of both": ((131, 131), QUERY + KEY + SCALE, ALL | MEAN, ("grads", 0)),
    "grads of keys": ((131, 131), KEY, ALL | MEAN, ("grads", 0)),
    "logits": ((67, 131), QUERY + KEY, ONE | NONE, ("logits", 67)),
    "logits of both": ((131, 131), QUERY + KEY + SCALE, ALL | NONE, ("logits", 131)),
    "logits of some": ((131, 140), QUERY + KEY + SCALE, ONE | MEAN | {"workspace_mib": 0.02}, ("logits", 9)),
    "logits of some, both": ((131, 131), QUERY + KEY, ALL | MEAN | {"workspace_mib": 0.02}, ("logits", 10)),
    "logits of some tiles": ((300, 300), QUERY + KEY, ALL | MEAN | {"workspace_mib": 0.3}, ("logits", 64)),
    "logits of no row": ((35, 35), QUERY + KEY, ALL | NONE | {"workspace_mib": 1e-6}, ("logits", 0)),
}


def embeddings(rows: int, keys: int, width: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(keys, width, generator=generator)
    return key[:rows] + noise * torch.randn(rows, width, generator=generator), key


def run(backend: str | None, query: Tensor, key: Tensor, needs: int, options: dict) -> list[Tensor]:
    scale = torch.ones((), dtype=query.dtype)
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, scale)]
    args = [leaf if needs & bit else leaf.detach() for leaf, bit in zip(leaves, (QUERY, KEY, SCALE), strict=True)]
    temperature = options["temperature"] * args[2] if needs & SCALE else options["temperature"]
    with core.use_backend(backend):
        out = info_nce(args[0], args[1], **(options | {"temperature": temperature}))
    up = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    wrt = [leaf for leaf in args if leaf.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wrt, up)]


def collect(errors: Errors, query: Tensor, key: Tensor, needs: int, options: dict) -> None:
    exact = run("reference", query.double(), key.double(), needs, options)
    results = (run("cpp", query, key, needs, options), run("reference", query, key, needs, options), exact)
    for i, (ours, eager, truth) in enumerate(zip(*results, strict=True)):
        errors.add(str(i), ours, eager, truth, str(tuple(query.shape)))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_every_save_plan(way, include_positive, normalize):
    (rows, keys), needs, options, expected = WAYS[way]
    meta = [torch.empty(n, 19, device="meta") for n in (rows, keys)]
    given = (options.get("symmetric", False), options["reduction"], needs, options.get("workspace_mib", 256))
    assert save_of_loss("cpp", *meta, *given) == expected
    options = options | {"include_positive": include_positive, "normalize": normalize}
    errors = Errors(torch.float32)
    for factor in (1.0, 0.97, 0.93, 0.9, 0.87, 0.83, 0.79, 0.75):
        query, key = embeddings(rows, keys, 19)
        query[1] = 0
        with recorded() as calls:
            run("cpp", query, key, needs, options)
        assert [op.name for op, _ in calls] == ["softmax_loss"]
        collect(errors, query * factor * (1 if normalize else 0.1), key, needs, options)
    errors.check()


@pytest.mark.parametrize("cpu", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("way", ["row grads", "grads", "grads of both", "logits of some"])
def test_every_instruction_set_and_odd_sizes(monkeypatch, cpu, way):
    monkeypatch.setenv("FASTLOSS_CPU", cpu)
    _, needs, options, _ = WAYS[way]
    errors = Errors(torch.float32)
    for rows, width in ((1, 3), (2, 1), (15, 16), (33, 5), (300, 300)):
        collect(errors, *embeddings(rows, rows, width), needs, options)
    errors.check()


@pytest.mark.parametrize("way", WAYS)
def test_targets_and_weights(way):
    (rows, keys), needs, options, _ = WAYS[way]
    more = {"weights": torch.linspace(0, 1, rows)}
    if not options.get("symmetric"):
        more["targets"] = torch.arange(rows) * 7 % keys
    errors = Errors(torch.float32)
    for width in (8, 9, 21):
        collect(errors, *embeddings(rows, keys, width), needs, options | more)
    errors.check()
    nothing = run("cpp", *embeddings(rows, keys, 8), needs, options | {"weights": torch.zeros(rows)})
    assert all((t == 0).all() for t in nothing)


@pytest.mark.parametrize("way", WAYS)
def test_late_training_keeps_the_digits(way):
    """The positive has almost all of the probability: relative error of the losses and of the gradient."""
    (rows, keys), needs, options, _ = WAYS[way]
    query, key = embeddings(rows, keys, 48, noise=0.05)
    query, key = (F.normalize(t, dim=1).mul(2**10).round() / 2**10 for t in (query, key))  # the products are exact
    options = options | {"normalize": False, "temperature": 2.0**-5}
    ours, exact = (run(b, query.to(t), key.to(t), needs, options) for b, t in
                   (("cpp", torch.float32), ("reference", torch.float64)))  # fmt: skip
    assert exact[0].max() < (0.1 if options["reduction"] == "sum" else 1e-3)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert (mine - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("way", WAYS)
def test_edges(way):
    """Scale 200 on unnormalised embeddings, identical rows, zero vectors, one row."""
    (rows, keys), needs, options, _ = WAYS[way]
    errors = Errors(torch.float32)
    for factor in (1.0, 0.97, 0.93, 0.9, 0.87, 0.83, 0.79, 0.75):
        query, key = embeddings(rows, keys, 24)
        collect(errors, factor * query, key, needs, options | {"normalize": False, "temperature": 1 / 200})
    errors.check()
    for fill in (1.0, 0.0):
        same = torch.full((rows, 5), fill), torch.full((keys, 5), fill)
        loss, *grads = run("cpp", *same, needs, options)
        exact, *_ = run("reference", *(t.double() for t in same), needs, options)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        assert all(g.isfinite().all() for g in grads)
    one = run("cpp", torch.ones(1, 4), torch.ones(1, 4), needs, options)
    assert all((t == 0).all() for t in one)


def test_infinities_and_nans_arrive():
    for value in (torch.nan, torch.inf):
        for way, (_, needs, options, _) in WAYS.items():
            query, key = embeddings(9, 9, 4)
            key[3, 2] = value
            assert not run("cpp", query, key, needs, options)[0].isfinite().all(), way
    q, k = torch.zeros(3, 1), torch.zeros(3, 1)
    q[0], k[:, 0] = 1, torch.tensor([0.0, -torch.inf, -torch.inf])
    assert info_nce(q[:1], k, normalize=False) == 0  # all negatives out of the way


def peak_bytes(function) -> int:
    """What the function holds at once, at most, of torch's memory."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("kind", ["grads", "rows", "symmetric", "none", "bank"])
@pytest.mark.parametrize("workspace_mib", [1, 4])
def test_the_workspace_bounds_what_is_held(kind, workspace_mib):
    """Beyond saved logits, copies of the embeddings, their gradients and those' sums: six times the embeddings."""
    rows, width = 1024, 32
    query, key = (t.requires_grad_() for t in embeddings(rows, 2048 if kind == "bank" else rows, width))
    options = {"symmetric": kind == "symmetric", "reduction": "none" if kind == "none" else "mean"}
    if kind in ("rows", "bank"):
        key = key.detach()

    def step():
        given = (query, key[:rows], key) if kind == "bank" else (query, key)
        info_nce(*given, workspace_mib=workspace_mib, **options).sum().backward()

    logits = 4 * rows * rows if kind in ("none", "symmetric") and workspace_mib == 4 else 0
    assert peak_bytes(step) <= logits + workspace_mib * 2**20 + 6 * 4 * width * (rows + key.shape[0])


def saved_bytes(way: str) -> int:
    (rows, keys), needs, options, _ = WAYS[way]
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.__setitem__(t.data_ptr(), t.untyped_storage().nbytes()), t)[1], lambda t: t
    ):
        query, key = embeddings(rows, keys, 4)
        query, key = query.requires_grad_(bool(needs & QUERY)), key.requires_grad_(bool(needs & KEY))
        info_nce(query, key, **options)
    return sum(saved.values())


@pytest.mark.parametrize("way", WAYS)
def test_saved_bytes(way):
    (rows, keys), _, options, expected = WAYS[way]
    assert saved_bytes(way) <= 4 * keys * expected[1] + 2 * 4 * 4 * (rows + keys) + 6 * 4 * (rows + keys)


PARTS = [(8192, 256, 2048), (300, 0.3, 64), (140, 0.02, 9), (35, 1e-6, 0)]


@pytest.mark.parametrize("columns, workspace_mib, rows", PARTS)
def test_saved_rows_fit_a_quarter_of_the_workspace(columns, workspace_mib, rows):
    key = torch.empty(columns, 4, device="meta")
    assert save_of_loss("cpp", key, key, True, "none", QUERY + KEY, workspace_mib) == ("logits", rows)
    assert rows <= workspace_mib * 2**20 / 4 / (4 * columns)


def test_options_that_need_softmax_stats():
    q, k = embeddings(5, 5, 4)
    ids = torch.arange(5)
    for options in ({"return_lse": True}, {"label_smoothing": 0.1}, {"image_ids": ids},
                    {"logit_bias": torch.zeros(())}):  # fmt: skip
        with recorded() as calls:
            clip_loss(q, k, logit_scale=1.0, **options)
        assert [op.name for op, _ in calls] == ["softmax_stats"], options
    with recorded() as calls:
        clip_loss(q, k, logit_scale=1.0, logit_bias=0.5, weights=torch.ones(5))
        clip_loss(q.bfloat16(), k.bfloat16(), logit_scale=1.0)
        info_nce(q, torch.cat((k, k)), include_positive=False, bias=-1.0)
    assert [op.name for op, _ in calls] == 3 * ["softmax_loss"]
    with core.use_backend("reference"), recorded() as calls:
        clip_loss(q, k, logit_scale=1.0)
    assert [op.name for op, _ in calls] == ["softmax_stats"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_are_rounded_once(monkeypatch, dtype):
    """Where bfloat16 is widened, too; tests/contrastive/test_bf16.py has what is multiplied as such."""
    monkeypatch.setenv("FASTLOSS_CPU", "avx512")
    q, k = (t.to(dtype) for t in embeddings(40, 40, 16))
    for options in (ALL | MEAN, ONE | MEAN, ALL | NONE):
        ours, single = (run("cpp", q.to(t), k.to(t), QUERY + KEY, options) for t in (dtype, torch.float32))
        assert torch.equal(ours[0], single[0])
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(ours[1:], single[1:], strict=True))


def test_thread_counts_give_the_same_bits_but_for_the_matrix_products():
    """With small integers the products are exact; those of the gradients, which are not, come before the backward."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (700, 6), generator=generator).float() for _ in range(2))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = Inputs(q, k, None, None, None, 0.1, True, True, True, "none", QUERY + KEY, "logits", 700, 16.0)
            results.append(softmax_loss.fwd(*x)[:4])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_targets_do_not_reach_memory():
    q, k = embeddings(3, 3, 4)
    with pytest.raises(RuntimeError, match="targets are out of key's rows"):
        softmax_loss.fwd(q, k, None, None, torch.tensor([0, 1, 3]), 1.0, True, False, True, "mean", 0, "", 0, 1.0)
