"""Device times of kernels with other tiles and stretches than the shipped ones: `python -m benchmarks.tune [NAME ...]`.

    softmax_stats   tiles of the contrastive forward, 8192 x 8192 x 768 bfloat16: contrastive/kernels/tile_configs.py
    exps            how saved exponentials are read in its backward: contrastive/kernels/passes.py
    weighted_keys   tiles of a frozen bank, 256 x 65536 x 512 bfloat16: contrastive/kernels/weighted_keys.py
    smoothness      stretches of rows, 8x3x512x512: image/kernels/smoothness_march.py

A line per setting, the shipped one first; each call is timed as replays of a CUDA graph, so that the host has no part
in it. A better setting replaces a number in the file named; nothing is written here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

os.environ["FASTLOSS_PLANS"] = "0"  # a plan would keep what was chosen first

import torch
import torch.nn.functional as F

Calls = dict[str, Callable[[], object]]
Setting = tuple[str, contextlib.AbstractContextManager]
REPEATS = 10  # calls in a graph
TILES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "8 warps": dict(warps=8, registers=None),
    "8 warps, 128 registers": dict(warps=8, registers=128),
    "64 rows, 168 registers": dict(rows=64, registers=168, programs=396),
    "64 columns": dict(columns=64),
    "64 columns, 168 registers": dict(columns=64, registers=168, programs=396),
    "64 columns, 4 stages": dict(columns=64, stages=4),
    "256 rows, 8 warps": dict(rows=256, warps=8, registers=None, programs=132),
    "256 rows, 8 warps, 4 stages": dict(rows=256, warps=8, stages=4, registers=None, programs=132),
    "256 columns, 8 warps": dict(columns=256, warps=8, registers=None, programs=132),
    "2 stages": dict(stages=2),
    "2 stages of 128": dict(dim=128, stages=2),
    "4 stages": dict(stages=4),
    "rows and columns share nothing": dict(shares=False),
    "132 programs": dict(programs=132),
    "528 programs": dict(programs=528),
}
STRETCHES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "tiles (the other kernels)": dict(LEAST_WIDTH=10**9),
    "at least 4 rows": dict(LEAST_ROWS=4),
    "at least 16 rows": dict(LEAST_ROWS=16),
    "2112 warps": dict(WARPS_IN_FLIGHT=2112),
    "8448 warps": dict(WARPS_IN_FLIGHT=8448),
    "programs of 2 warps": dict(WARPS=2),
    "programs of 4 warps": dict(WARPS=4),
    "rows read ahead": dict(READ_AHEAD=True),
    "1 row at once": dict(ROWS_AT_ONCE=1),
    "4 rows at once": dict(ROWS_AT_ONCE=4),
}


def microseconds(call: Callable[[], object]) -> float:
    import triton

    call()
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(REPEATS):
                call()
    return 1000 / REPEATS * triton.testing.do_bench(graph.replay, warmup=20, rep=60, return_mode="median")


def _pair(rows: int, columns: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query, key = (F.normalize(torch.randn(n, dim, device="cuda"), dim=1) for n in (rows, columns))
    return query.bfloat16(), key.bfloat16()


def _softmax_inputs(save: str, symmetric: bool) -> Any:
    from fastloss.contrastive.ops.softmax_stats import Inputs
    from fastloss.contrastive.options import Form

    query, key = _pair(8192, 8192, 768)
    scale, form = torch.full((8192,), 14.3, device="cuda"), Form(diagonal=True, symmetric=symmetric)
    none = dict.fromkeys(("column_scale", "bias", "targets", "row_ids", "column_ids", "logit_limit"))
    return Inputs(query, key, scale, **none, **form._asdict(), hardness=0.0, workspace_mib=256.0, save=save)


def softmax_stats() -> Iterator[tuple[Setting, Calls]]:
    from fastloss.contrastive.kernels import logit_matrix, tile_configs
    from fastloss.contrastive.kernels import softmax_stats as kernels

    forms = {"one direction": ("", False), "symmetric": ("", True), "symmetric, exponentials saved": ("exps", True)}
    inputs = {name: _softmax_inputs(*form) for name, form in forms.items()}
    calls = {name: (lambda x=x: kernels.softmax_stats_fwd(x)) for name, x in inputs.items()}
    for label, setting in TILES.items():
        change = {name: value for name, value in setting.items() if name != "programs"}

        def best(*args: Any, change: dict = change, fixed: int | None = setting.get("programs"), **options: Any) -> Any:
            tile, programs = tile_configs.best_tile(*args, **options)
            return replace(tile, **change), fixed or programs

        yield (label, mock.patch.object(logit_matrix, "best_tile", best)), calls


def exps() -> Iterator[tuple[Setting, Calls]]:
    from fastloss.contrastive.kernels import passes
    from fastloss.contrastive.kernels import softmax_stats as kernels
    from fastloss.contrastive.ops.softmax_stats import Needs

    x = _softmax_inputs("exps", True)
    saved = kernels.softmax_stats_fwd(x)
    grad, needs = torch.randn_like(saved.stats), Needs(True, True, False, False, False)
    calls: Calls = {"backward": lambda: kernels.softmax_stats_bwd(grad, x, saved, needs)}
    for rows in (passes.SAVED_ROWS, 16, 64):
        yield (f"{rows} rows", mock.patch.object(passes, "SAVED_ROWS", rows)), calls


def weighted_keys() -> Iterator[tuple[Setting, Calls]]:
    import fastloss
    from fastloss.contrastive.kernels import softmax_loss_shared
    from fastloss.contrastive.kernels import weighted_keys as kernels

    query, bank = _pair(256, 65536, 512)
    key = query.clone()

    def step() -> object:
        given = query.detach().requires_grad_(), key.detach().requires_grad_()
        return torch.autograd.grad(fastloss.info_nce(*given, bank), given)

    calls: Calls = {"forward and backward": step}
    yield ("as shipped", contextlib.nullcontext()), calls
    yield ("by blocks (the other kernels)", mock.patch.object(softmax_loss_shared, "tile_of", lambda *_: None)), calls
    programs, tiles = kernels.TABLE["sm_90"]
    for rows, columns, stages in ((64, 32, 3), (64, 32, 4), (64, 64, 1), (64, 64, 3)):
        largest, tile = tiles[-1]
        line = (programs, (*tiles[:-1], (largest, replace(tile, rows=rows, columns=columns, stages=stages))))
        yield (f"{rows} x {columns}, {stages} stages", mock.patch.dict(kernels.TABLE, {"sm_90": line})), calls


def smoothness() -> Iterator[tuple[Setting, Calls]]:
    from fastloss.image.kernels import smoothness as kernels
    from fastloss.image.kernels import smoothness_march
    from fastloss.image.smoothness import Inputs

    calls: Calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        image, guide = (torch.rand(8, 3, 512, 512, device="cuda").to(dtype) for _ in range(2))
        weight, one = torch.rand(8, 1, 512, 512, device="cuda").expand(image.shape), torch.ones((), device="cuda")
        name, guided = str(dtype).removeprefix("torch."), Inputs(image, guide, weight, "l1", 1)
        _, saved = kernels.smoothness_mean_fwd(guided)
        calls[f"guide and weight, {name}, forward"] = lambda x=guided: kernels.smoothness_mean_fwd(x)
        calls[f"guide and weight, {name}, backward"] = lambda x=guided, saved=saved, one=one: (
            kernels.smoothness_mean_bwd(one, x, saved)
        )
        for kind, factors in (("isotropic", [0.5]), ("l1", [0.5, 0.5])):
            x = Inputs(image, None, None, kind, 1)
            calls[f"{kind}, {name}, forward"] = lambda x=x, f=factors: kernels.smoothness_total_fwd(x, f)
            calls[f"{kind}, {name}, backward"] = lambda x=x, f=factors, one=one: kernels.smoothness_total_bwd(one, x, f)
    for label, setting in STRETCHES.items():
        change = mock.patch.multiple(smoothness_march, **setting) if setting else contextlib.nullcontext()
        yield (label, change), calls


def result(call: Callable[[], object]) -> str:
    try:
        return f"{microseconds(call):9.1f}"
    except Exception as error:  # a setting may not fit the device
        return f"failed: {type(error).__name__}: {str(error)[:80]}"


FAMILIES = {f.__name__: f for f in (softmax_stats, exps, weighted_keys, smoothness)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(FAMILIES)}")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(FAMILIES))
    if unknown:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA or ROCm device is visible to torch")
    for name in args.names or FAMILIES:
        print(f"{name}, us", flush=True)
        for (label, changed), calls in FAMILIES[name]():
            with changed:
                for what, call in calls.items():
                    print(f"  {label:34}{what:44}{result(call)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
