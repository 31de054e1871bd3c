"""What is measured: items, each a loss, its options, a shape and a dtype."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from tests.conformance.cases import CASES, Case, Draw
from tests.conformance.tools import leaves

MODES = ("forward", "backward", "both")
BATCHES = tuple(256 * 2**k for k in range(11))  # 256 to 262144
LARGE_ROWS = 2**16  # of embeddings, from which on a float32 row takes minutes: these are measured in bfloat16 only
SIDES = (32, 64, 128, 256, 512, 1024)  # pixels of an image or feature, or tokens of an attention map


@dataclass(frozen=True, eq=False)
class Item:
    """One thing to measure with every provider."""

    case: Case
    options: dict
    shape: Any
    dtype: str
    headline: bool = False

    @property
    def name(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.case.name}({options}) {shape_text(self.shape)} {self.dtype}"

    def columns(self) -> dict[str, object]:
        return dict(
            loss=self.case.name,
            options=options_text(self.options),
            shape=shape_text(self.shape),
            dtype=self.dtype,
            headline=int(self.headline),
        )

    def inputs(self, device: str) -> tuple:
        assert self.case.bench
        return (self.case.bench.make or self.case.make)(Draw(getattr(torch, self.dtype), device), self.shape)


def item_of(columns: dict) -> Item:
    """The item that has these columns, in this process or another."""
    case = next(c for c in CASES if c.name == columns["loss"] and c.bench)
    options = next(o for o in case.bench.options if options_text(o) == columns["options"])  # type: ignore[union-attr]
    return Item(case, options, shape_of(columns["shape"]), columns["dtype"], bool(int(columns.get("headline") or 0)))


def options_text(options: dict) -> str:
    return json.dumps(options, default=str)


def named() -> list[str]:
    """The losses that have benchmark rows."""
    return [case.name for case in CASES if case.bench]


def items(
    losses: Sequence[str], device: str, dtypes: Sequence[str], headline: bool = False, sizes: Sequence[str] = ()
) -> list[Item]:
    """Everything to measure, loss by loss. `sizes` are shapes, or numbers that `sized` understands."""
    found = []
    for case in CASES:
        if case.name not in losses or not case.bench:
            continue
        bench = case.bench
        own = bench.cuda_shapes if device == "cuda" and bench.cuda_shapes else bench.shapes
        shapes = [sized(own[0], int(s)) if s.isdigit() else shape_of(s) for s in sizes] or own
        for shape in shapes:
            for i, options in enumerate(bench.options):
                if i < bench.headline or not headline:
                    chief = i < bench.headline and not sizes
                    found += [
                        Item(case, options, shape, dtype, chief)
                        for dtype in dtypes
                        if sizes or not (is_large(shape) and dtype == "float32" and len(dtypes) > 1)
                    ]
    return found


def is_large(shape: Any) -> bool:
    return len(shape) in (2, 3) and not isinstance(shape[0], (tuple, list)) and shape[0] >= LARGE_ROWS


def sized(shape: Any, n: int) -> Any:
    """The shape at another size: n rows of (rows, width); n x n of images, of features (the first layer) and of maps.

    (batch, heads, queries, keys, width) gets n queries and n keys.
    """
    if isinstance(shape[0], (tuple, list)):
        largest = shape[0][-1]
        return tuple((*s[:-2], *(max(1, side * n // largest) for side in s[-2:])) for s in shape)
    if len(shape) == 5:
        return (*shape[:2], n, n, shape[4])
    return (*shape[:-2], n, n) if len(shape) == 4 else (n, *shape[1:])


def sweep(shape: Any) -> tuple[int, ...]:
    """The sizes that scaling goes through for a shape like this."""
    return SIDES if isinstance(shape[0], (tuple, list)) or len(shape) in (4, 5) else BATCHES


def shape_text(shape: Any) -> str:
    """`8x3x512x512`; the layers of a list of shapes are joined with +."""
    layers = shape if isinstance(shape[0], (tuple, list)) else (shape,)
    return "+".join("x".join(map(str, layer)) for layer in layers)


def shape_of(text: str) -> tuple:
    layers = tuple(tuple(int(n) for n in layer.split("x")) for layer in text.split("+"))
    return layers if len(layers) > 1 else layers[0]


def passes(case: Case, fn: Callable, inputs: tuple, options: dict) -> tuple[Callable, Callable, list[torch.Tensor]]:
    """The forward, the backward of its result, and what is differentiated. Nothing accumulates into .grad."""
    # a training loop differentiates the prediction, not the target: the last argument, all layers of a list
    chosen = case.grads if case.bench is None or case.bench.all_grads else case.grads[-1:]
    wrt = [t for i in chosen for t in tree_flatten(inputs[i])[0] if isinstance(t, torch.Tensor)]
    for t in leaves(case, inputs):
        t.requires_grad_(False)
    for t in wrt:
        t.requires_grad_()

    def forward() -> torch.Tensor:
        out = fn(*inputs, **options)
        out = out if isinstance(out, torch.Tensor) else out[0]
        return out if out.ndim == 0 else out.sum()

    def backward(out: torch.Tensor) -> None:
        torch.autograd.grad(out, wrt)

    return forward, backward, wrt
