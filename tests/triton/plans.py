"""Launch plans under a stub driver: Python calls, launches and host time with plans and without, as JSON.

    python -m tests.triton.plans [loss ...]        in the environment of stub_driver.build

Of each loss, forward and backward together: `calls`, Python functions called, and `launches`, without plans and with
them; `same`, whether a replay launches what the launcher does: kernels, grids, numbers, and the same memory for the
same purpose, and `streams`, those of the launches of a replay while another is current. `us` is the least host time
of a thread; the first entry is eager's mse_loss on 64 elements.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.triton import stub_driver

LIBRARY = stub_driver.install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402

from fastloss import (  # noqa: E402  # noqa: E402
    attention_consistency_from_qk,
    attention_consistency_loss,
    clip_loss,
    diversity_loss,
    feature_distance,
    info_nce,
    lpips_distance,
    mode_seeking_loss,
    pixel_loss,
    siglip_loss,
    smoothness_loss,
    ssim_loss,
)
from fastloss.core import plans  # noqa: E402
from fastloss.core.kernels.launch import ODD  # noqa: E402


def losses() -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Small calls and what they are differentiated by: the host's time does not depend on sizes."""

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape).to(dtype).requires_grad_()

    image, pred = torch.rand(2, 3, 32, 32), leaf(2, 3, 32, 32)
    guide, weight = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)
    query, key = (leaf(128, 64, dtype=torch.bfloat16) for _ in range(2))
    bank = leaf(4096, 64, dtype=torch.bfloat16).detach()
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    shapes = ((2, 16, 16, 16), (2, 32, 8, 8), (2, 64, 4, 4), (2, 64, 2, 2), (2, 64, 2, 2))
    features, targets = [leaf(*shape) for shape in shapes], [torch.rand(shape) for shape in shapes]
    lin = [torch.rand(shape[1]) for shape in shapes]
    maps, heads = [leaf(2, 4, 16, 16) for _ in range(6)], [leaf(1, 2, 16, 64, dtype=torch.bfloat16) for _ in range(4)]
    many, others = [leaf(2, 4, 4) for _ in range(10)], [torch.rand(2, 4, 4) for _ in range(10)]
    return {
        "pixel": (lambda: pixel_loss(image, pred), [pred]),
        "pixel, both": (lambda: pixel_loss(guide.requires_grad_(), pred, p=1), [guide, pred]),
        "smoothness": (lambda: smoothness_loss(pred), [pred]),
        "smoothness, guide and weight": (lambda: smoothness_loss(pred, guide=image, weight=weight), [pred]),
        "ssim": (lambda: ssim_loss(image, pred), [pred]),
        "clip": (lambda: clip_loss(query, key, logit_scale=10.0), [query, key]),
        "clip, learned scale": (
            lambda: clip_loss(query, key, logit_scale=scale, normalize=True), [query, key, scale]),
        "info_nce": (lambda: info_nce(query, key), [query, key]),
        "info_nce, bank": (lambda: info_nce(query, key, bank), [query, key]),
        "siglip": (lambda: siglip_loss(query, key, logit_scale=scale, logit_bias=bias), [query, key, scale, bias]),
        "feature_distance": (lambda: feature_distance(features, targets), features),
        "feature_distance, ten layers": (lambda: feature_distance(many, others, criterion="l2"), many),
        "attention, three layers": (
            lambda: attention_consistency_loss(maps[::2], maps[1::2], inputs="logits", metric="kl"), maps),
        "attention from qk": (lambda: attention_consistency_from_qk(*heads), heads),
        "lpips": (lambda: lpips_distance(features, targets, lin).sum(), features),
        "diversity, softmin": (lambda: diversity_loss(pred, image, mode="softmin", metric="l2"), [pred]),
        "mode_seeking": (lambda: mode_seeking_loss(pred, image, image[:, 0], guide[:, 0]), [pred]),
    }  # fmt: skip


def python_calls(fn: Callable[[], Any]) -> int:
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    fn()
    sys.setprofile(None)
    return count - 1  # fn itself


def microseconds(fns: list[Callable[[], Any]], rounds: int = 20, each: int = 4) -> list[float]:
    """Least times of a thread, the functions in turns: what else the machine does meets all of them."""
    least = [float("inf")] * len(fns)
    for _ in range(rounds):
        for i, fn in enumerate(fns):
            start = time.thread_time_ns()
            for _ in range(each):
                fn()
            least[i] = min(least[i], (time.thread_time_ns() - start) / each / 1e3)
    return least


FOREVER: list[Any] = []
OTHER_STREAM = 77


class Spy:
    """Stands before the C launcher and writes down what it is called with."""

    seen: list[tuple] = []
    streams: set[int] = set()
    maps: dict[int, tuple] = {}  # of tensor maps by id
    kept: list[Any] = []  # so that no memory serves twice while calls are compared

    def __init__(self, launch: Any) -> None:
        self.launch = launch

    def __call__(self, *args: Any) -> Any:
        newer = triton.__version__.startswith("3.8.")
        given = args[15] if newer else args[13:]
        Spy.kept.append(given)
        Spy.streams.add(args[3])
        Spy.seen.append((args[:3], args[4], args[7] if newer else args[9], plain(given)))
        return self.launch(*args)


def plain(value: Any) -> Any:
    """Arguments with addresses in the place of tensors, and tensor maps as what they were made of."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    if isinstance(value, Tensor):
        return value.data_ptr()
    return Spy.maps.get(id(value), value)


def spy_on_launches() -> None:
    utils = driver.active.utils
    name = "fill_tma_descriptor_tiled" if hasattr(utils, "fill_tma_descriptor_tiled") else "fill_tma_descriptor"
    fill = getattr(utils, name)

    def filled(*args: Any) -> Any:
        FOREVER.append(made := fill(*args))
        Spy.maps[id(made)] = plain(args)
        return made

    setattr(utils, name, filled)
    if hasattr(utils, "launch"):
        utils.launch = Spy(utils.launch)
        return
    compile_module = nvidia.compile_module_from_src

    def compiled(*args: Any, **kwargs: Any) -> Any:
        module = compile_module(*args, **kwargs)
        if hasattr(module, "launch"):
            module.launch = Spy(module.launch)
        return module

    nvidia.compile_module_from_src = compiled


def spied(fn: Callable[[], Any]) -> list[tuple]:
    """What `fn` launches, with a number for each address in the order of their coming."""
    Spy.seen.clear()
    fn()
    labels: dict[int, int] = {}

    def label(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(label, value))
        if type(value) is int and value >= 1 << 62:
            value = (value - ODD) >> 1 if value % 2 else value
        return ("at", labels.setdefault(value, len(labels))) if type(value) is int and value >= 1 << 32 else value

    return [(*launch[:3], label(launch[3])) for launch in Spy.seen]


def keep_memory() -> None:
    """Let nothing go that a plan allocates, as the launches without plans keep their tensors in the spy."""
    for name in ("cpu", "cuda"):
        allocate = getattr(torch._C._dynamo.guards, f"_empty_strided_{name}")

        def keeping(*args: Any, allocate: Any = allocate) -> Tensor:
            Spy.kept.append(out := allocate(*args))
            return out

        setattr(torch._C._dynamo.guards, f"_empty_strided_{name}", keeping)


def report(names: list[str], compare: bool) -> dict[str, Any]:
    if compare:
        spy_on_launches()
        keep_memory()
    found: dict[str, Any] = {"triton": triton.__version__}
    x, y = torch.rand(64), torch.rand(64, requires_grad=True)

    def eager() -> None:
        torch.autograd.grad(F.mse_loss(x, y), y)

    for name, (loss, wrt) in losses().items():
        if names and name not in names:
            continue

        def both(loss: Any = loss, wrt: Any = wrt) -> None:
            torch.autograd.grad(loss(), wrt)

        row: dict[str, Any] = {}
        seen = []
        for key, on in (("before", False), ("after", True)):
            plans.ENABLED = on
            for _ in range(4):
                both()
            if compare:
                Spy.kept.clear()
                seen.append(spied(both))
                continue
            row[f"{key} calls"] = python_calls(both)
            first = stub_driver.launches(LIBRARY)
            both()
            row[f"{key} launches"] = stub_driver.launches(LIBRARY) - first
            row[f"{key} us"], row["eager us"] = microseconds([both, eager])
        if compare:
            row["launches"], row["same"] = len(seen[0]), seen[0] == seen[1]
            Spy.streams.clear()
            stub_driver.current["stream"] = OTHER_STREAM
            both()
            stub_driver.current["stream"] = 0
            row["streams"] = sorted(Spy.streams)
            if seen[0] != seen[1]:
                row["differ"] = next((repr(pair) for pair in zip(*seen, strict=False) if pair[0] != pair[1]), "length")
        found[name] = row
    return found


if __name__ == "__main__":
    options = sys.argv[1:]
    compare = "--compare" in options
    print(json.dumps(report([o for o in options if o != "--compare"], compare)))
