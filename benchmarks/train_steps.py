"""Whole training steps, where a loss is one part: `python -m benchmarks.train_steps [--device cuda]`.

    imagen_step   the reference system: encoders, decoder, its eight losses, backward, clipping, Adam; the same loop
                  with the fast losses and with the eager references
    clip_step     two small encoders, the symmetric contrastive loss with a learnt scale, backward, Adam

Inputs and weights are random, from fixed seeds: no data set and no file is needed. The loss of the first step and the
norms of its gradients must be those of the eager step (in float64 for clip_step) before a time is kept.
"""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import measure
from benchmarks.harness.memory import Child
from benchmarks.harness.progress import Progress
from benchmarks.harness.results import RESULTS, read, write
from benchmarks.workloads.items import shape_of
from benchmarks.workloads.providers import providers
from benchmarks.workloads.train_steps import CLIP_OPTIONS, STEPS, WIDTH, Step
from tests.conformance.cases import CASES

BATCHES = {"cpu": (256, 1024, 4096), "cuda": (1024, 4096, 16384, 65536)}
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}


def first(step: Step) -> tuple[float, Tensor]:
    """Loss of the first step, and the norms of its gradients by parameter (Adam hides their scale)."""
    loss = step().item()
    model: nn.Module = step.model  # type: ignore[attr-defined]
    none = torch.zeros((), dtype=torch.float64)  # of the scale, where a library takes a fixed one
    return loss, torch.stack([none if p.grad is None else p.grad.double().norm().cpu() for p in model.parameters()])


def work(device: str, batches: Sequence[int]) -> Iterator[tuple[str, str, str]]:
    """(step, shape, dtype) of a device."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    yield "imagen_step", "64x1x32x32", "float32"
    for rows in batches:
        yield "clip_step", f"{rows}x{WIDTH}", dtype


def names_of(step: str, device: str, asked: Sequence[str] | None = None) -> list[str]:
    if step == "imagen_step":
        return ["eager", "fastloss"]
    return list(providers(next(c for c in CASES if c.name == "clip_loss"), CLIP_OPTIONS, device, list(asked or ())))


def measure_step(
    loss: str, shape: str, dtype: str, device: str, seconds: float, child: Child | None,
    asked: Sequence[str] | None = None,
) -> list[dict]:  # fmt: skip
    """The rows of one step, one per provider, or per provider asked for."""
    make = functools.partial(STEPS[loss], shape)
    true = None
    try:
        # the noise of z is drawn in the dtype of the model, so there float64 would be another step
        true = first(make("float32" if loss == "imagen_step" else "float64", device, "eager"))
    except Exception as error:
        if not measure.reason(error).startswith("out of memory"):
            raise
    torch._dynamo.reset()
    notes: dict[str, str] = {}
    errors: dict[str, str] = {}
    facts: dict[str, dict[str, str]] = {}
    calls: dict[str, measure.Pass] = {}
    for name in names_of(loss, device, asked):
        notes[name], errors[name], facts[name] = "", "", {}
        try:
            step = make(dtype, device, name)
            value, norms = first(step)
            if true is not None:
                worst = ((norms - true[1]).abs().max() / true[1].max()).item()
                off = max(abs(value / true[0] - 1), worst)
                errors[name] = f"{off:.1e}"
                notes[name] = "" if off <= TOLERANCE[dtype] else f"wrong: relative error {off:.1e}"
            if not notes[name]:
                calls[name] = (step, lambda out: None)
                facts[name]["launches"] = str(measure.counts(step, lambda out: None, [], device)[1])
        except ImportError as error:
            notes[name] = str(error) if str(error).startswith("absent") else f"absent: {error}"
        except Exception as error:
            notes[name] = measure.reason(error)
    times, failed = measure.interleaved(calls, measure.Clock(device, ahead=False), seconds, least=5)
    columns = dict(loss=loss, options="{}", shape=shape, dtype=dtype, mode="step", headline=1)
    checked = "eager" if loss == "imagen_step" else "float64"
    columns["checked"] = checked if true is not None else "no, for float64 does not fit"
    rows = []
    for name, note in notes.items():
        row = columns | {"provider": name, "note": note, "error": errors[name]}
        if name in failed:
            row["note"] = measure.reason(failed[name])
        if name in times:
            p20, p50, p80 = measure.quantiles([forward for forward, _ in times[name]])
            row |= dict(p20_ms=f"{p20:.4f}", p50_ms=f"{p50:.4f}", p80_ms=f"{p80:.4f}") | facts[name]
            if device == "cuda":
                row["peak_mib"] = f"{measure.peak_mib(calls[name][0], device):.1f}"
            elif child is not None:
                row["peak_mib"] = child.peak(row, name)[0]
        rows.append(row)
    return rows


def step_of(row: dict) -> tuple[str, str, str]:
    return row["loss"], row["shape"], row["dtype"]


def run(
    device: str, batches: Sequence[int], out: pathlib.Path, seconds: float, minutes: float = 0.0,
    asked: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Measures the steps; of the file's rows those of other batches stay, each with its own commit."""
    common = measure.common_columns(device)
    path = out / measure.device_folder(device) / "train_step.csv"
    todo = [row for row in work(device, batches) if not asked or row[0] == "clip_step"]
    written: list[dict] = read(path) if path.exists() else []
    end = time.monotonic() + 60 * minutes if minutes else math.inf
    with Child() as child, Progress(len(todo)) as progress:
        for loss, shape, dtype in todo:
            if time.monotonic() > end:
                progress.say(f"not measured, for the {minutes:g} minutes are over: {loss} {shape} and what follows")
                break
            progress.start(f"{loss} {shape} {dtype}")
            try:
                # what does not fit is an exception, not the end of this process; the child needs memory as well
                with measure.address_limit(0.6 * measure.free_mib() if device == "cpu" else 0):
                    rows = measure_step(loss, shape, dtype, device, seconds, child, asked)
            except Exception as error:
                rows = [
                    dict(
                        loss=loss,
                        options="{}",
                        shape=shape,
                        dtype=dtype,
                        mode="step",
                        provider="all",
                        note=measure.reason(error),
                    )
                ]
            for row in rows:
                figures = f"{row['p50_ms']} ms, {row.get('peak_mib') or '-'} MiB" if row.get("p50_ms") else row["note"]
                progress.say(f"  {row['provider']:26}{figures}")
            written = [row for row in written if step_of(row) != (loss, shape, dtype)] + [row | common for row in rows]
            write(path, sorted(written, key=lambda row: (row["loss"] == "clip_step", shape_of(row["shape"])[0])))
            progress.done()
            if device == "cuda":
                torch.cuda.empty_cache()
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.train_steps", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batches", nargs="+", type=int, help="of clip_step; default: 256 to 4096, on CUDA to 65536")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on each step and batch")
    parser.add_argument("--minutes", type=float, default=0.0, help="after which no other step is begun")
    parser.add_argument("--providers", nargs="+", help="of clip_step, which alone is measured then; default: all")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    run(args.device, args.batches or BATCHES[args.device], args.out, args.seconds, args.minutes, args.providers)
    return 0


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
