"""The conformance tests at the edges: axes of no elements, weights of 0, NaN that must arrive in a gradient."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastloss import core
from tests.conformance.cases import Case, Draw
from tests.conformance.tools import INTERPRETING, grid, leaves, reductions, run, to_device, with_reduction


def emptied(shape: Any) -> Iterator[Any]:
    """The shape of a case, which may have shapes within, with each of its sizes 0 in turn."""
    for i, part in enumerate(shape):
        for inner in (0,) if isinstance(part, int) else emptied(part):
            yield (*shape[:i], inner, *shape[i + 1 :])


def made(case: Case, shape: Any, device: str) -> tuple | None:
    """The inputs of a shape; None where there are none (labels of no class, say)."""
    try:
        return to_device(case.make(Draw(), shape), device)
    except (RuntimeError, ValueError, ZeroDivisionError, IndexError):
        return None


def outcome(case: Case, backend: str, args: tuple, options: dict) -> str | tuple[Tensor, list[Tensor]]:
    """Loss and gradients, or the message of an error that names the argument."""
    args = tree_map_only(Tensor, lambda t: t.detach().clone(), args)
    try:
        with core.use_backend(backend):
            return run(case, case.fn, args, options)[:2]
    except (ValueError, TypeError) as error:
        assert re.match(r"[a-z_]\w*(\[\d+\])?(, \w+)*: ", str(error)), f"no argument is named: {error!r}"
        return str(error)


@grid(dtypes=(torch.float32,))
def test_empty_axes(case, place, options, dtype):
    """Any size 0: what the reference gives, with finite gradients, or a ValueError that names the argument."""
    options = to_device(options, place[0])
    for shape in emptied(case.shapes[0]):
        args = made(case, shape, place[0])
        for reduction in reductions(case) if args is not None else ():
            chosen = with_reduction(case, options, reduction)
            got, expected = (outcome(case, backend, args, chosen) for backend in (place[1], "reference"))
            assert isinstance(got, str) == isinstance(expected, str), f"{shape} {reduction}: {got}, not {expected}"
            if isinstance(got, str):
                continue
            torch.testing.assert_close(got, expected, msg=lambda text: f"{shape} {reduction}: {text}")  # noqa: B023
            for tensor in (got[0], *got[1]):
                assert tensor.isfinite().all(), f"{shape} {reduction}: not finite"


def weighted(case: Case, draw: Draw, shape: Any) -> tuple[tuple, dict, Tensor] | None:
    """Arguments and option of a case whose function takes a map of weights, a third of them 0; None of any other."""
    names = list(inspect.signature(case.fn).parameters)
    if "weight" not in names:
        return None
    args, place = list(case.make(draw, shape)), names.index("weight")
    size = args[0].shape
    weight = draw.uniform(size[0], *(1,) * (len(size) > 1), *size[2:])
    weight = torch.where(draw.uniform(*weight.shape) < 0.3, 0.0, weight)
    weight[..., : (size[-1] + 1) // 2] = 0  # and a half, where all the neighbours have none
    if place < len(args):
        args[place] = weight
        return tuple(args), {}, weight
    return tuple(args), {"weight": weight}, weight


def excluded(case: Case, weight: Tensor) -> Tensor:
    """Where nothing within the loss's reach has weight: `extra["reach"]` pixels, of a window or of differences."""
    counts, reach = (weight != 0).float(), case.extra.get("reach", 0)
    if reach:
        pool = F.max_pool2d if weight.ndim == 4 else F.max_pool3d
        counts = pool(counts, 2 * reach + 1, stride=1, padding=reach)
    return counts == 0


def poisoned(args: tuple, weight: Tensor, out: Tensor, values: tuple[float, ...]) -> tuple:
    """The arguments with these values in turn where `out` is set."""
    turns = torch.tensor(values)[torch.arange(out.numel()) % len(values)].reshape(out.shape)

    def poison(t: Tensor) -> Tensor:
        if t is weight or t.ndim != weight.ndim:
            return t
        return torch.where(out.to(t.device), turns.to(t), t)

    return tree_map_only(Tensor, poison, args)


@grid(dtypes=(torch.float32, torch.bfloat16))
def test_weights_of_0_exclude(case, place, options, dtype):
    """NaN and infinities without a weight change neither value nor gradients, which are 0 there; masks may be bool."""
    shapes = case.shapes[:2] if INTERPRETING else case.shapes
    for shape in shapes if "weight" in inspect.signature(case.fn).parameters else ():
        for reduction in reductions(case):
            args, option, weight = to_device(weighted(case, Draw(dtype), shape), place[0])
            out, chosen = excluded(case, weight), with_reduction(case, to_device(options, place[0]) | option, reduction)
            clean = poisoned(args, weight, out, (0.0,))
            got, expected = (
                outcome(case, place[1], a, chosen)
                for a in (poisoned(args, weight, out, (float("nan"), float("inf"), -float("inf"))), clean)
            )
            assert not isinstance(got, str), got
            where = f"{shape} {reduction}"
            assert torch.equal(got[0], expected[0]) and got[0].isfinite().all(), f"{where}: value"
            for g, e in zip(got[1], expected[1], strict=True):
                assert torch.equal(g, e) and not g[out.expand_as(g)].any(), f"{where}: gradient"
            mask = weight != 0
            as_mask, as_weight = (
                outcome(case, place[1], tuple(w if a is weight else a for a in clean),
                        chosen | ({"weight": w} if option else {}))
                for w in (mask, mask.to(weight.dtype)))  # fmt: skip
            assert torch.equal(as_mask[0], as_weight[0]), f"{where}: a mask"
            assert all(map(torch.equal, as_mask[1], as_weight[1])), f"{where}: the gradient by a mask"


@grid(dtypes=(torch.float32,))
def test_nan_arrives_in_its_gradient(case, place, options, dtype):
    """Where eager's gradient by an element that is NaN is NaN, so is ours: a loss scaler would step on any number."""
    count = len(leaves(case, case.make(Draw(), case.shapes[0])))
    for which in range(count):
        grads = {}
        for name, fn, kind in (("eager", case.eager, torch.float64), ("ours", case.fn, dtype)):
            args = to_device(case.make(Draw(kind), case.shapes[0]), place[0])
            own = {k: v.to(kind) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
            leaf = leaves(case, args)[which]
            at = leaf.numel() // 2
            leaf.view(-1)[at] = float("nan")
            with core.use_backend(place[1] if name == "ours" else "reference"):
                _, found, _ = run(case, fn, args, to_device(own, place[0]))
            grads[name] = found[which].reshape(-1)[at]
        assert not grads["eager"].isnan() or grads["ours"].isnan(), f"argument {which}: {grads['ours']}"
