"""Drawn calls: a few of every public name, and that the tables behind them leave nothing out; `make fuzz` has more."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

import fastloss
from fastloss import core
from fastloss.core import Loss
from tests.conformance.tools import INTERPRETING
from tests.fuzz import targets
from tests.fuzz.draw import Call, draw
from tests.fuzz.judge import Failure, judge
from tests.fuzz.rounding import RandomRounding
from tests.fuzz.run import Worker, report, run
from tests.fuzz.shrink import shrunk
from tests.fuzz.unit_width import cancelled
from tests.fuzz.values import Raw, T, code, evaluate, make, plain, tensors

CALLS = 2 if INTERPRETING else 16  # of each public name
not_interpreted = pytest.mark.skipif(INTERPRETING, reason="nothing here depends on the backend")
by_name = pytest.mark.parametrize("name", targets.names())


@by_name
def test_drawn_calls_are_right(name):
    """Never a wrong number, a raw error, or nonsense taken: the first seeds, the same in every run."""
    failed = []
    for seed in range(CALLS):
        call = draw(name, seed)
        found = judge(call)
        if isinstance(found, Failure):
            failed.append(f"{found}\n{call.code()}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.skipif(INTERPRETING, reason="the compiler runs none of the interpreted kernels")
@pytest.mark.parametrize("name", ["pixel_loss", "clip_loss", "supcon_loss", "ssim_loss"])
def test_drawn_calls_compiled(name):
    call = draw(name, 3, "compile")
    found = judge(call)
    assert not isinstance(found, Failure), f"{found}\n{call.code()}"


FAILED_ONCE = {  # seeds of the fuzzer, by what was wrong
    "weights of 0 and a NaN key": "info_nce:3000036 loss_and_grads:3000538",
    "a NaN in another gradient of the same call": "loss_and_grads:4000354",
    "upstream infinite in float16": "tap:4000786",
    "width 1, normalised": "clip_loss:4000619 info_nce:4000404 ContrastiveLoss:4001278",
    "coefficients below the smallest normal number": "info_nce:4000288",
    "a part of a second gradient beyond float16": "smoothness_loss:3000279 ContrastiveLoss:4000962",
    "denormal bfloat16": "clip_loss:3001416",
    "rows that are views of one": "clip_loss:6000175 info_nce:6000191",
    "no pixels": "PerceptualLoss:3000526",
}


@not_interpreted
@pytest.mark.parametrize("what", FAILED_ONCE)
def test_calls_that_failed_once(what):
    for case in FAILED_ONCE[what].split():
        name, seed = case.split(":")
        found = judge(draw(name, int(seed), later=False))
        assert not isinstance(found, Failure), f"{case}: {found}"


@not_interpreted
def test_the_size_of_what_cancels_at_width_one():
    """By hand, of unit vectors +-1: the largest gradient, of the row with logits -2 and 2, over the least length."""
    query, key = T((2, 1), seed=1, grad=True), T((2, 1), seed=7)
    q, k = query.make().flatten().double(), key.make().flatten().double()
    assert k.sign().unique().numel() == 2 and (q.sign() == q.sign()[0]).all()
    call = Call("info_nce", (query, key), {"temperature": 0.5}, seed="info_nce:0")
    upstream = (32 * torch.randn((), generator=torch.Generator().manual_seed(7), dtype=torch.float64)).round() / 32
    wanted = 2 * torch.tensor(4.0, dtype=torch.float64).sigmoid() * upstream.abs() / torch.cat((q, k)).abs().min()
    assert cancelled(call, 1, torch.zeros(2, 1)) == pytest.approx(wanted.item(), rel=1e-12)
    assert cancelled(call, 0, torch.zeros(())) is None  # the loss is no gradient
    assert cancelled(call, 1, torch.ones(2, 1)) is None  # nor is this noise


@not_interpreted
def test_a_compiled_call_may_take_longer():
    worker = Worker(None, None, collections.deque([("ssim_loss", 1, "compile"), ("ssim_loss", 2, None)]))
    assert worker.limit(60) == 600
    worker.left.popleft()
    assert worker.limit(60) == 60


@not_interpreted
def test_every_public_name_is_drawn():
    """A new function or class has to be drawn, be the module form of what is, or belong to what is."""
    modules = {targets.module_of(name) for name in targets.names()}
    for name in fastloss.__all__:
        item = getattr(fastloss, name)
        if inspect.isclass(item) and issubclass(item, Loss) and name not in targets.SPECIAL:
            assert name in modules, f"{name}: its function is not drawn"
        else:
            assert name in targets.names() or name in targets.PARTS, f"{name}: draw it, see tests/fuzz/targets.py"


@not_interpreted
@by_name
def test_every_option_is_drawn(name):
    """Each option comes, with a value that is not its default."""
    seen: dict[str, set[str]] = {}
    for seed in range(600):
        call = draw(name, seed, "backward")
        for option, value in call.options.items():
            seen.setdefault(option, set()).add(code(value))
    for inner in ("info_nce", "clip_loss") if name == "loss_and_grads" else ("",):
        _, options = targets.parameters(name, "dwa" if name == "CompositeLoss" else "", inner)
        for option, default in options.items():
            assert seen.get(option, set()) - {repr(default)}, f"{name}: {option} is never drawn"


def test_a_seed_is_a_case():
    """The same seed gives the same call, whatever came before it, and the code of a call gives its tensors."""
    first = [draw(name, 11).code() for name in targets.names()]
    draw("pixel_loss", 5)
    assert first == [draw(name, 11).code() for name in targets.names()]
    for name in targets.names():
        for one in tensors(draw(name, 12).args):
            assert torch.equal(one.make().nan_to_num(), evaluate(code(one)).nan_to_num())


@pytest.mark.parametrize(
    "layout", ["transposed", "reversed", "sliced", "columns", "alternate", "channels_last", "offset"]
)
def test_layouts_keep_values(layout):
    dense, other = (make(T((3, 4, 2, 5), "float16", "mixed", 3, layout=form)) for form in ("dense", layout))
    assert torch.equal(dense, other)
    assert layout in ("offset", "alternate") or other.stride() != dense.stride()


def test_plain_values_are_those_of_the_call():
    one = T((4, 3), "bfloat16", "normal", 2, layout="expanded", grad=True)
    assert plain(one).dtype == torch.float64 and plain(one).requires_grad
    assert torch.equal(plain(one), make(one).double())


def test_random_rounding_is_that_of_the_dtype():
    """The result of one operation moves by at most half an eps; that of a sum of n terms by about sqrt(n) of them."""
    x = torch.linspace(1, 2, 1000, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    with RandomRounding(eps, 0):
        product, kept, total = x * x, x.flip(0), (x - 1.5).sum()
    assert 0 < ((product - x * x) / (x * x)).abs().max() <= eps / 2
    assert torch.equal(kept, x.flip(0))
    assert 0 < total.abs() < 1000**0.5 * eps


@not_interpreted
def test_crashes_hangs_and_wrong_values_are_reported(monkeypatch):
    """A call may end its process, or not end: the cases after it are judged all the same."""
    import tests.fuzz.run as module

    monkeypatch.setattr(module, "_work", _work_with_faults)
    todo = [("pixel_loss", seed, None) for seed in range(6)]
    totals = run(iter(todo), len(todo), processes=1, timeout=3, seconds=None, quiet=True)
    found = {one.seed: one.kind for one in totals.failures}
    assert totals.calls == 6 and found[1] == "crash" and found[3] == "hang" and found[4] == "numbers"
    told = report(totals)
    assert "pixel_loss:1" in told and "fastloss.pixel_loss(" in told and "3 failures of 3 kinds" in told


def _work_with_faults(pipe) -> None:
    import os
    import time

    from tests.fuzz.run import Found

    while (batch := pipe.recv()) is not None:
        for case in batch:
            pipe.send(("begins",))
            if case[1] == 1:
                os.abort()
            if case[1] == 3:
                time.sleep(60)
            wrong = Found(case[0], case[1], "numbers", "out", "", draw(*case).code()) if case[1] == 4 else None
            pipe.send(("ends", case, wrong, None))
        pipe.send(("idle",))


def test_the_command_replays_a_case():
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--replay", "gram_matrix:0"], capture_output=True, text=True
    )
    assert "fastloss.gram_matrix(" in done.stdout and "as the reference has it" in done.stdout, (
        done.stdout + done.stderr
    )
    assert done.returncode == 0


def _raise(error):
    raise error


FAULTS = {  # of the kernels alone: what the judge says of a value that they change so
    "numbers": lambda out, args: out * (1 + 1e-5),
    "numbers gradient": lambda out, args: out + 0.001 * (out - out.detach()),
    "not finite": lambda out, args: out + torch.where(args[1] == args[1].max(), torch.nan, 0.0).sum(),
    "shape": lambda out, args: out[None],
    "dtype": lambda out, args: out.double() * (1 + 1e-5),
    "graph": lambda out, args: out.detach(),
    "raw error": lambda out, args: _raise(RuntimeError("expected all tensors to be on the same device")),
    "unnamed error": lambda out, args: _raise(ValueError("the truth value is ambiguous")),
    "a legitimate call is refused": lambda out, args: _raise(ValueError("weight: expected something else")),
    "an input is changed": lambda out, args: (args[0].add_(0), out)[1],
}


@not_interpreted
@pytest.mark.parametrize("fault", FAULTS)
def test_the_judge_sees_each_kind_of_fault(monkeypatch, fault):
    """And nothing where there is none."""
    right = fastloss.pixel_loss
    call = Call("pixel_loss", (T((3, 4), seed=1), T((3, 4), seed=2, grad=True)), {"p": 2}, seed="pixel_loss:0")
    if fault == "an input is changed":  # with a graph torch says so itself
        call = dataclasses.replace(call, mode="no_grad")
    assert judge(call) is None

    def wrong(*args, **options):
        out = right(*args, **options)
        return out if core.backends.state.forced == "reference" else FAULTS[fault](out, args)

    monkeypatch.setattr(fastloss, "pixel_loss", wrong)
    found = judge(call)
    assert isinstance(found, Failure) and found.kind == fault.split(" gradient")[0], found


@not_interpreted
@pytest.mark.parametrize("which", [(0,), (0, 1)])
def test_the_judge_wants_one_gradient_that_is_not_finite(monkeypatch, which):
    """Of a NaN in an embedding: gradients that all are numbers hide it, those of one embedding alone do not."""
    right = fastloss.info_nce

    def hidden(*given, **options):
        if core.backends.state.forced == "reference":
            return right(*given, **options)
        given = [x * 1 for x in given]
        for i in which:
            given[i].register_hook(lambda g: g.nan_to_num(0.0))
        return right(*given, **options)

    args = (T((3, 4), fill="nan", seed=1, grad=True), T((3, 4), seed=2, grad=True))
    call = Call("info_nce", args, {}, seed="info_nce:0")
    monkeypatch.setattr(fastloss, "info_nce", hidden)
    found = judge(call)
    assert (found is None) == (len(which) == 1) and (found is None or found.kind == "hides"), found


def test_nonsense_must_be_refused():
    args = (T((3, 4), seed=1), T((3, 4), seed=2))
    told = judge(Call("pixel_loss", args, {"p": Raw("'l3'")}, spoiled="p 'l3'", sure=True))
    assert isinstance(told, str) and told.startswith("p: expected")
    taken = judge(Call("pixel_loss", args, {"p": 2}, spoiled="p 2", sure=True))
    assert isinstance(taken, Failure) and taken.kind == "accepted nonsense"


def test_a_failing_call_is_made_simpler(monkeypatch):
    """Options, sizes, layouts and dtypes that do not matter go; what matters stays."""
    right = fastloss.smoothness_loss
    monkeypatch.setattr(
        fastloss, "smoothness_loss",
        lambda image, **options: right(image, **options) * (1 if options.get("p") != 2 or len(image) < 2 else
                                                            1 + (core.backends.state.forced != "reference")),
    )  # fmt: skip
    call = Call("smoothness_loss", (T((6, 3, 9, 8), "bfloat16", "uniform", 3, layout="channels_last"),),
                {"p": 2, "order": 2, "reduction": "sum"})  # fmt: skip
    simpler = shrunk(call, judge(call), seconds=30)
    assert simpler.options == {"p": 2}
    (image,) = simpler.args
    assert image.shape[0] == 2 and image.dtype == "float32" and image.layout == "dense" and max(image.shape) <= 2
