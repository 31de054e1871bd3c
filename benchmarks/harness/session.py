"""An item measured: every provider checked against float64, then timed in turn; the rows that come of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.harness import measure
from benchmarks.harness.memory import Child
from benchmarks.harness.progress import Progress
from benchmarks.workloads.items import MODES, Item, passes
from benchmarks.workloads.providers import Function, absent, providers, version_of
from tests.conformance.tools import cast, cast_options, to_device

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # tf32 passes


@dataclass
class Session:
    """What the measurements of a run share: the clock, and the child that knows the memory."""

    device: str
    seconds: float
    asked: list[str] | None = None
    child: Child | None = None
    common: dict[str, object] = field(default_factory=dict)
    autotune: bool = False

    def __post_init__(self) -> None:
        self.clock = measure.Clock(self.device)


@dataclass
class Candidate:
    """A provider at one item: its pass, or why it has no time."""

    note: str = ""
    error: str = ""
    checked: str = ""
    timed: measure.Pass | None = None
    facts: dict[str, str] = field(default_factory=dict)


def once(item: Item, fn: Callable, dtype: torch.dtype, inputs: tuple, device: str) -> list[torch.Tensor]:
    """The value, and the gradients of what is differentiated, in this dtype."""
    options = cast_options(to_device(item.options, device), dtype)
    forward, _, wrt = passes(item.case, fn, cast(inputs, dtype), options)
    value = forward()
    return [value.detach(), *torch.autograd.grad(value, wrt)]


def judge(name: str, got: list, eager: list | None, exact: list, dtype: torch.dtype) -> tuple[str, str]:
    """(largest relative error of value and gradients, why it is wrong or empty).

    fastloss must keep the rule of the tests, error at most 2x eager's plus eps; as a single scalar may be exact by
    luck, eager's counts as one eps at least. Others may sum less exactly or multiply in tf32, and their error stands
    in the row: it is wrong only beyond the dtype's tolerance and beyond four times eager's.
    """
    error, eps, wrong = 0.0, torch.finfo(dtype).eps, ""
    for i, true in enumerate(exact):
        scale = true.abs().max().clamp(min=torch.finfo(dtype).tiny)
        own, eagers = (
            0.0 if result is None else ((result[i].to(true.dtype) - true).abs().max() / scale).item()
            for result in (got, eager)
        )
        allowed = 2 * max(eagers, eps) + eps if name == "fastloss" else max(TOLERANCE[dtype], 4 * eagers)
        error = error if own <= error else own  # NaN stays
        if not own <= allowed and not wrong:
            wrong = f"wrong: relative error {own:.1e}, allowed {allowed:.1e}"
        if error != error:
            break
    return f"{error:.1e}", wrong


def truth(item: Item, inputs: tuple, device: str) -> tuple[list | None, list | None, str]:
    """Eager's results in this dtype and in float64, and what to call the check. None where they do not fit."""
    try:
        with measure.address_limit(0.6 * measure.free_mib() if device == "cpu" else 0):
            eager = once(item, item.case.eager, getattr(torch, item.dtype), inputs, device)
            return eager, once(item, item.case.eager, torch.float64, inputs, device), "float64"
    except (RuntimeError, MemoryError) as error:
        if not measure.reason(error).startswith("out of memory"):
            raise
        return None, None, ""


def candidates(item: Item, session: Session, functions: dict[str, Function | str]) -> dict[str, Candidate]:
    """Every provider checked, compiled and counted at this item; in a function's place may be why there is none."""
    device, dtype = session.device, getattr(torch, item.dtype)
    inputs = item.inputs(device)
    eager, exact, checked = truth(item, inputs, device)
    torch._dynamo.reset()
    if exact is None:  # the others are held against fastloss, itself checked at smaller sizes
        functions = {n: functions[n] for n in sorted(functions, key=lambda n: n != "fastloss")}
    found: dict[str, Candidate] = {}
    for name, function in functions.items():
        found[name] = candidate = Candidate()
        if isinstance(function, str):
            candidate.note = function
            continue
        own = cast(inputs, dtype)
        options = to_device(item.options, device)
        try:
            got = eager if name == "eager" and eager else once(item, function, dtype, own, device)
            candidate.checked = checked
            if exact is None:
                exact, checked = got, f"{name}, for float64 does not fit"
                candidate.checked = "not at this size, for float64 does not fit"
            candidate.error, candidate.note = judge(name, got, eager, exact, dtype)
            del got
            if not candidate.note:
                forward, backward, wrt = passes(item.case, function, own, options)
                candidate.timed = (forward, backward)
                candidate.facts = counts(forward, backward, own, device)
        except ImportError as error:
            candidate.note = absent(name, error)
        except Exception as error:
            candidate.note, candidate.timed = measure.reason(error), None
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def counts(forward: Callable, backward: Callable, inputs: tuple, device: str) -> dict[str, str]:
    """What autograd saves and how much is launched; nothing where the profiler cannot say."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    try:
        saved, launched = measure.counts(forward, backward, tensors, device)
    except Exception:
        return {}
    return {"saved_mib": f"{saved / measure.MIB:.1f}", "launches": str(launched)}


def measure_item(item: Item, session: Session, left_out: dict[str, str] | None = None) -> list[dict]:
    """The rows of one item: every mode of every provider. A failure of the whole item is a row as well."""
    try:
        rows = _measured_rows(item, session, left_out or {})
    except Exception as error:
        rows = [{"mode": "both", "provider": "all", "note": measure.reason(error)}]
    gc.collect()
    return [item.columns() | session.common | row for row in rows]


def _measured_rows(item: Item, session: Session, left_out: dict[str, str]) -> list[dict]:
    functions = providers(item.case, item.options, session.device, session.asked, session.autotune)
    functions |= {name: why for name, why in left_out.items() if name in functions}
    names = [name for name, function in functions.items() if not isinstance(function, str)]
    child = session.child if session.device == "cpu" else None
    if child:
        child.start()
    with ThreadPoolExecutor(1) as beside:  # nothing is timed while the child works
        peaks = beside.submit(lambda: {n: child.peak(item.columns(), n)[0] for n in names} if child else {})
        found = candidates(item, session, functions)
    gc.collect()
    ready = {name: c.timed for name, c in found.items() if c.timed}
    top, times, failed = 0.0, {}, {}
    if ready:
        unit = item.case.bench.unit  # type: ignore[union-attr]
        before = measure.ceiling(session.device, unit, item.dtype)
        times, failed = measure.interleaved(ready, session.clock, session.seconds)
        top = (before + measure.ceiling(session.device, unit, item.dtype)) / 2
    for name, failure in failed.items():
        found[name].note = measure.reason(failure)
    rows = []
    for name, candidate in found.items():
        peak = device_peak(candidate) if session.device == "cuda" else peaks.result().get(name, "")
        for mode in MODES if name in times else MODES[-1:]:
            row = {"mode": mode, "provider": name, "version": version_of(name), "note": candidate.note}
            row |= {"error": candidate.error, "checked": candidate.checked}
            if name in times:
                row |= figures(item, mode, times[name], top)
                row |= candidate.facts | {"peak_mib": peak} if mode == "both" else {}
                if mode == "both" and candidate.timed and (host := session.clock.host.get(candidate.timed[0])):
                    row["host_ms"] = f"{measure.quantiles(host)[1]:.4f}"
            rows.append(row)
    return sorted(rows, key=lambda row: MODES.index(row["mode"]))


def figures(item: Item, mode: str, pairs: list[tuple[float, float]], top: float) -> dict[str, Any]:
    """Quantiles, the bytes or FLOPs that the row's formula charges, the rate and its share of the ceiling."""
    bench = item.case.bench
    assert bench
    take = {"forward": lambda f, b: f, "backward": lambda f, b: b, "both": lambda f, b: f + b}[mode]
    p20, p50, p80 = measure.quantiles([take(*pair) for pair in pairs])
    cost = bench.charge(item.shape, getattr(torch, item.dtype).itemsize, mode, item.options)
    unit, scale = ("GB/s", 1e6) if bench.unit == "bytes" else ("TFLOP/s", 1e9)
    rate = cost / p50 / scale
    return dict(
        p20_ms=f"{p20:.4f}",
        p50_ms=f"{p50:.4f}",
        p80_ms=f"{p80:.4f}",
        cost=cost,
        rate=f"{rate:.4g}",
        unit=unit,
        share=f"{rate / top:.3f}",
        ceiling=f"{top:.4g}",
    )


def device_peak(candidate: Candidate) -> str:
    """Peak MiB beyond the inputs, forward and backward, of CUDA's allocator."""
    if not candidate.timed:
        return ""
    forward, backward = candidate.timed
    try:
        return f"{measure.peak_mib(lambda: backward(forward()), 'cuda'):.1f}"
    except Exception:
        return ""


def measured(work: list[Item], session: Session, minutes: float, progress: Progress) -> Iterator[tuple[Item, list]]:
    """Items with their rows; each gets its share of the time that is left, compiling included.

    A loss that was begun is finished, for its file is rewritten whole.
    """
    start, seconds, overhead = time.monotonic(), session.seconds, 8.0
    for done, item in enumerate(work):
        left = minutes * 60 - (time.monotonic() - start)
        if minutes and left < 0 and not (done and work[done - 1].case.name == item.case.name):
            rest = ", ".join(i.name for i in work[done:])
            progress.say(f"not measured, for the {minutes:g} minutes are over: {rest}")
            return
        session.seconds = min(seconds, max(0.3, left / (len(work) - done) - overhead)) if minutes else seconds
        begun = time.monotonic()
        progress.start(item.name)
        rows = measure_item(item, session)
        overhead = (overhead * done + time.monotonic() - begun - session.seconds) / (done + 1)
        progress.done()
        yield item, rows


def show(rows: list[dict], say: Callable[[str], None]) -> None:
    for row in rows:
        timed = row.get("p50_ms")
        figure = f"{timed:>9} ms {row['rate']:>8} {row['unit']:7} {row['share']:>6}" if timed else ""
        peak = f"{row['peak_mib']:>8} MiB" if row.get("peak_mib") else ""
        say(f"  {row['mode']:9}{row['provider']:26}{figure}{peak}{row['note']}")
