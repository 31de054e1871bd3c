"""What the contrastive ops keep for their backward, and the bits of `needs` that decide it."""

from __future__ import annotations

import torch
from torch import Tensor

STASH_MIB = 64  # logits up to this size (and the workspace's) are kept for the backward instead of made again
KEPT_SHARE = 0.75  # of the workspace at most, for exponentials; the rest is for the gradients of a block of logits
NARROWEST_TILE, WIDEST_TILE = 16, 128  # columns of the Triton kernels' tiles
QUERY, KEY, SCALE = 1, 2, 4  # bits of `needs`
CHUNK_MIB = 16
LEAST_ROWS = 64  # of logits in the workspace, for products worth their time
TILE_ROWS = 32  # of the C++ kernels
NEGATIVES = 8
IMAGE, TEXT, NUMBERS = 1, 2, 4  # bits of `needs`


def _keeps_logits(query: Tensor, key: Tensor, workspace_mib: float) -> bool:
    """Whether the C++ forward keeps its logits."""
    return query.shape[0] * key.shape[0] * 4 <= min(workspace_mib, STASH_MIB) * 1048576


def kept_exponentials(
    query: Tensor, key: Tensor, ceiling: Tensor | None, kind: str, hardness: float, workspace_mib: float
) -> tuple[int, int]:
    """(elements, row pitch) of the exponentials of the logits that the Triton kernels keep; (0, 0): none.

    In the embeddings' dtype, each row of a tile by a power of two of its own, which are kept behind them. float16 has
    too few powers for one exponential to serve a row and a column; moments, hardness and ceilings of both directions
    would need the logits. float32's logits are products of a library, block by block.
    """
    rows, columns, size = query.shape[0], key.shape[0], query.element_size()
    both = "symmetric" in kind or "upper" in kind
    serves = "stash" in kind and "moments" not in kind and hardness == 0
    if not serves or query.dtype == torch.float32 or (both and (ceiling is not None or query.dtype == torch.float16)):
        return 0, 0
    elements, pitch = exponentials(rows, columns, size)
    return (elements, pitch) if elements * size <= KEPT_SHARE * workspace_mib * 1048576 else (0, 0)


def exponentials(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    """(elements, row pitch) of as many exponentials and their references."""
    pitch = -(-columns // WIDEST_TILE) * WIDEST_TILE
    return rows * pitch + rows * pitch // NARROWEST_TILE * (4 // itemsize), pitch


def saves(rows: int, columns: int, symmetric: bool, reduction: str, needs: int, workspace_mib: float) -> str:
    """What the forward leaves for the backward; csrc/contrastive/softmax_loss.cpp decides in the same way.

    "rows": the gradient of each row's own loss, where keys are frozen; "grads": the gradients of the reduced loss;
    "stash": the logits' products; "again": nothing, the backward makes the products again. docs/design/contrastive.md
    says what each costs.
    """
    if needs == 0:
        return ""
    if not symmetric and not needs & KEY:
        return "rows"
    mib = 4 * columns / 1048576
    least = rows if symmetric else min(rows, LEAST_ROWS)
    if reduction != "none" and least * mib <= min(workspace_mib / 3, CHUNK_MIB if symmetric else workspace_mib):
        return "grads"
    return "stash" if rows * mib <= min(workspace_mib, STASH_MIB) else "again"


def rows_kept(columns: int, workspace_mib: float) -> int:
    """Of how many rows "again" keeps the products; csrc/contrastive/online_softmax.h has the same."""
    fit = int(min(workspace_mib / 4, STASH_MIB) * 1048576) // (4 * columns)
    return fit // TILE_ROWS * TILE_ROWS if fit > TILE_ROWS else fit


def triton_saves(symmetric: bool, reduction: str, needs: int) -> str:
    """The same of the Triton kernels, whose chunks of rows may be as low as the workspace is small.

    They leave "grads" for "rows" too, which then are those of each share_i loss_i, and for "stash" and "again" alike
    `stash` as in :mod:`softmax_stats`, empty where it does not fit; `lengths` are the row scales and c(key),
    `stats` log-sum-exps and maxima of each direction, and p.
    """
    if needs == 0:
        return ""
    return "again" if symmetric or (needs & KEY and reduction == "none") else "grads"
