"""Attention maps averaged over their heads, dimension -3."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import result_dtype
from .divergence import LEAST_SCORE


def mean_over_heads(
    a: list[Tensor], b: list[Tensor], masks: list[Tensor], inputs: str, temperature: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each layer both maps ``[..., Q, K]`` in float32 (float64), and bool masks of the keys that take part.

    `masks` are expanded to the maps, and the same for all heads. Logits go through their softmax first; where one has
    no softmax, as all of its row are -inf, the mean is over the other heads, and the row counts if there is one.
    """
    left: list[Tensor] = []
    right: list[Tensor] = []
    kept: list[Tensor] = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        mask = masks[i] if masks else None
        keep = mask if mask is not None and mask.dtype == torch.bool else None
        means, counts = zip(*(_mean(t, mask, keep, inputs, temperature) for t in (x, y)), strict=True)
        for side, mean in zip((left, right), means, strict=True):
            side.append(mean)
        if inputs == "logits":
            rows = counts[0] & counts[1]
            kept.append(rows.expand(means[0].shape) if keep is None else rows & keep.select(-3, 0))
        elif keep is not None:
            kept.append(keep.select(-3, 0))
    return left, right, kept


def _mean(
    x: Tensor, mask: Tensor | None, keep: Tensor | None, inputs: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """The mean, and which of its rows, [..., Q, 1], have a head with a key."""
    x = x.to(result_dtype(x))
    if mask is not None and keep is None:
        x = x + mask.to(x.dtype)
    if inputs == "scores":
        x = torch.where(x <= LEAST_SCORE, torch.zeros_like(x), x)
    if inputs != "logits":
        if keep is not None:
            x = torch.where(keep, x, torch.zeros_like(x))
        return x.mean(-3), x
    if keep is not None:
        x = torch.where(keep, x, -torch.inf)
    there = (x != -torch.inf).any(-1, keepdim=True)
    p = (torch.where(there, x, torch.zeros_like(x)) / temperature).softmax(-1)
    p = torch.where(there, p, torch.zeros_like(p))
    heads = there.sum(-3).clamp(min=1).to(p.dtype)
    return p.sum(-3) / heads, there.any(-3)
