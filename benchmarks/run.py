"""Time the losses: `python -m benchmarks.run [LOSS ...] [--device cuda] [--dtype float32 bfloat16]`.

Each loss writes one CSV, `benchmarks/results/<device>/<loss>.csv`, rewritten whole. A provider that fails, or whose
value or gradient is wrong at that very shape, gets its message in the `note` column and no time.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from benchmarks import measure
from benchmarks.providers import providers
from tests.battery import cast, cast_options, check_error, first, leaves, ops_of, run
from tests.cases import CASES, Case, Draw

RESULTS = pathlib.Path(__file__).parent / "results"
MODES = ("forward", "backward", "both")
COLUMNS = (
    "loss,options,shape,dtype,mode,provider,p20_ms,p50_ms,p80_ms,cost,rate,unit,share,ceiling,peak_mib,error,note,"
    "device,threads,commit,torch,triton"
).split(",")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    named = [case.name for case in CASES if case.bench]
    parser.add_argument("losses", nargs="*", metavar="LOSS", help=f"default: all of {', '.join(named)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", help="default: float32 on the CPU, float32 and bfloat16 on CUDA")
    parser.add_argument("--providers", nargs="+", help="default: all there are")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on each shape, option and mode")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # a child process that measures one provider's peak
    args = parser.parse_args(argv)
    unknown = sorted(set(args.losses) - set(named))
    if unknown:
        parser.error(f"no benchmark row for {', '.join(unknown)}; there are {', '.join(named)}")
    args.losses = args.losses or named
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.device == "cuda" else ["float32"])
    return args


def shape_text(shape: Any) -> str:
    """`8x3x512x512`; the layers of a list of shapes are joined with +."""
    layers = shape if isinstance(shape[0], (tuple, list)) else (shape,)
    return "+".join("x".join(map(str, layer)) for layer in layers)


def shape_of(text: str) -> tuple:
    layers = tuple(tuple(int(n) for n in layer.split("x")) for layer in text.split("+"))
    return layers if len(layers) > 1 else layers[0]


def modes(case: Case, fn: Callable, inputs: tuple, options: dict) -> dict[str, Callable[[], object]]:
    """The three calls to time. The backward runs on a graph made once; nothing accumulates into .grad."""
    assert case.bench
    # a training loop differentiates the prediction, not the target: the last argument, all layers of a list
    chosen = case.grads if case.bench.all_grads else case.grads[-1:]
    wrt = [t for i in chosen for t in tree_flatten(inputs[i])[0] if isinstance(t, torch.Tensor)]

    def loss() -> torch.Tensor:
        out = first(fn(*inputs, **options))
        return out if out.ndim == 0 else out.sum()  # one value a sample

    for t in leaves(case, inputs):
        t.requires_grad_(False)
    for t in wrt:
        t.requires_grad_()
    # A graph whose backward may overwrite what it saved (torch.compile) runs once: this one is compiled without that,
    # the other calls anew, as users have them.
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        made = loss()
    torch._dynamo.reset()
    return {
        "forward": loss,
        "backward": lambda: torch.autograd.grad(made, wrt, retain_graph=True),
        "both": lambda: torch.autograd.grad(loss(), wrt),
    }


def correctness(
    case: Case, name: str, fn: Callable, inputs: tuple, options: dict, dtype: torch.dtype, truth: tuple
) -> tuple[str, str]:
    """(largest relative error of value and gradients, why it is wrong or empty).

    fastloss must keep the one rule of the tests; others may sum less exactly, and their error stands in the row.
    """
    error = 0.0
    try:
        loss, grads, _ = run(case, fn, inputs, options, truth[2])
        for got, eager, exact in zip((loss, *grads), truth[0], truth[1], strict=True):
            if name == "fastloss":
                check_error("result", got, eager, exact, dtype)
            largest = exact.abs().max().clamp(min=torch.finfo(dtype).tiny)
            error = max(error, ((got.double() - exact).abs().max() / largest).item())
        if not error < 1000 * torch.finfo(dtype).eps:
            return f"{error:.1e}", f"wrong: relative error {error:.1e} against float64"
    except (AssertionError, RuntimeError, ValueError) as failure:
        return f"{error:.1e}", f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    return f"{error:.1e}", ""


def truths(case: Case, inputs: tuple, options: dict, dtype: torch.dtype) -> tuple:
    """Eager's results in this dtype and in float64, and the upstream gradient used."""
    eager = run(case, case.eager, cast(inputs, dtype), options)
    exact = run(case, case.eager, cast(inputs, torch.float64), cast_options(options, torch.float64), eager[2])
    return (eager[0], *eager[1]), (exact[0], *exact[1]), eager[2]


def measure_case(case: Case, args: argparse.Namespace, ceiling: dict[str, float]) -> Iterable[dict]:
    assert case.bench
    clock = measure.Clock(args.device)
    for shape in case.bench.shapes:
        for options in case.bench.options:
            for dtype_name in args.dtype:
                dtype = getattr(torch, dtype_name)
                inputs = case.make(Draw(dtype, args.device), shape)
                truth = truths(case, inputs, options, dtype)
                torch._dynamo.reset()
                found, notes, errors = {}, {}, {}
                for name, fn in providers(case).items():
                    if args.providers and name not in args.providers:
                        continue
                    own = cast(inputs, dtype)
                    errors[name], notes[name] = correctness(case, name, fn, own, options, dtype, truth)
                    found[name] = modes(case, fn, own, options) if not notes[name] else None
                del truth
                gc.collect()
                for mode in MODES:
                    calls = {name: timed[mode] for name, timed in found.items() if timed}
                    times = measure.interleaved(calls, clock, args.seconds)
                    for name, note in notes.items():
                        row = dict(loss=case.name, options=json.dumps(options), shape=shape_text(shape),
                                   dtype=dtype_name, mode=mode, provider=name, note=note, error=errors[name])
                        if name in times:
                            row |= figures(case, shape, options, dtype, mode, times[name], ceiling)
                            row["peak_mib"] = memory(case, row, calls[name], args)
                        yield row


def figures(
    case: Case, shape: Any, options: dict, dtype: torch.dtype, mode: str, times: list[float], ceiling: dict
) -> dict:
    bench = case.bench
    assert bench
    p20, p50, p80 = measure.quantiles(times)
    cost = bench.charge(shape, dtype.itemsize, mode, options)
    unit, scale = ("GB/s", 1e6) if bench.unit == "bytes" else ("TFLOP/s", 1e9)
    top = ceiling["copy"] if bench.unit == "bytes" else ceiling[str(dtype)]
    rate = cost / p50 / scale
    return dict(p20_ms=f"{p20:.4f}", p50_ms=f"{p50:.4f}", p80_ms=f"{p80:.4f}", cost=cost, rate=f"{rate:.2f}",
                unit=unit, share=f"{rate / top:.3f}", ceiling=f"{top:.1f}")


def memory(case: Case, row: dict, call: Callable, args: argparse.Namespace) -> str:
    """Peak MiB beyond the inputs. The CPU's is measured in a child process, for it has no allocator statistics."""
    if args.device == "cuda":
        return f"{measure.peak_mib(call, 'cuda'):.1f}"
    if args.memory_of is not None or row["mode"] != "both":
        return ""
    spec = json.dumps([case.name, row["options"], row["shape"], row["dtype"], row["provider"]])
    done = subprocess.run([sys.executable, "-m", "benchmarks.run", "--device", "cpu", "--memory-of", spec],
                          capture_output=True, text=True, env=measure.CHILD_ENV, timeout=600)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""


def memory_child(spec: str) -> None:
    name, options, shape, dtype, provider = json.loads(spec)
    case = next(c for c in CASES if c.name == name)
    inputs = case.make(Draw(getattr(torch, dtype)), shape_of(shape))
    call = modes(case, providers(case)[provider], inputs, json.loads(options))["both"]
    print(f"{measure.peak_mib(call, 'cpu'):.1f}")


def write(path: pathlib.Path, rows: list[dict], common: dict) -> None:
    """Rewritten whole, and atomically: an interrupted run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(row | common for row in rows)
    os.replace(new, path)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.memory_of is not None:
        memory_child(args.memory_of)
        return 0
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    common = dict(device=measure.device_label(args.device), threads=torch.get_num_threads(), commit=measure.commit(),
                  torch=torch.__version__, triton=triton_version)
    ceiling = {"copy": measure.copy_bandwidth(args.device)}
    chosen = [case for case in CASES if case.name in args.losses]
    if any(case.bench and case.bench.unit == "flops" for case in chosen):
        ceiling |= {str(getattr(torch, d)): measure.matmul_rate(args.device, getattr(torch, d)) for d in args.dtype}
    print(f"{common['device']}, {common['threads']} threads, copy bandwidth {ceiling['copy']:.1f} GB/s", flush=True)
    for case in chosen:
        if not ops_of(case.name):
            print(f"{case.name}: reference form only, nothing to compare yet")
            continue
        rows = []
        for row in measure_case(case, args, ceiling):
            rows.append(row)
            shown = f"{row['p50_ms']:>9} ms {row['rate']:>8} {row['unit']}" if not row["note"] else row["note"]
            print(f"{row['loss']:18} {row['options']:24} {row['shape']:14} {row['dtype']:9} {row['mode']:9} "
                  f"{row['provider']:14} {shown}  {row.get('peak_mib', '')}", flush=True)
        path = args.out / measure.device_folder(args.device) / f"{case.name}.csv"
        write(path, rows, common)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    measure.keep_freed_memory()
    sys.exit(main())
