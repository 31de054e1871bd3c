"""What the contrastive ops keep for their backward, and the bits of `needs` that decide it."""

from __future__ import annotations

import torch
from torch import Tensor

STASH_MIB = 64  # C++: all logits are kept for the backward up to this size (or the workspace's, if less)
KEPT_SHARE = 0.75  # Triton: the part of the workspace that exponentials may take; G takes its blocks from the rest
NARROWEST_TILE, WIDEST_TILE = 16, 128  # columns of the Triton kernels' tiles
QUERY, KEY, SCALE = 1, 2, 4  # bits of `needs` of the softmax ops: which gradients will be asked for
CHUNK_MIB = 16  # C++: "grads" of two directions, whose logits are one chunk, up to this size
LEAST_ROWS = 64  # C++: "grads" of one direction has chunks of at least so many rows: less are slow to multiply
TILE_ROWS = 32  # rows of a tile of the C++ kernels
NEGATIVES = 8  # one more bit of `needs`, where each query has negatives of its own
IMAGE, TEXT, NUMBERS = 1, 2, 4  # bits of `needs` of SigLIP's op; NUMBERS: scale and bias


def _keeps_logits(query: Tensor, key: Tensor, workspace_mib: float) -> bool:
    """Whether the C++ forward of the statistics keeps all its logits, as fits_stash() in online_softmax.h has it."""
    return query.shape[0] * key.shape[0] * 4 <= min(workspace_mib, STASH_MIB) * 1048576


def kept_exponentials(
    query: Tensor, key: Tensor, ceiling: Tensor | None, kind: str, hardness: float, workspace_mib: float
) -> tuple[int, int]:
    """(elements, row pitch) of the exponentials of the logits that the Triton kernels keep; (0, 0): none.

    Each is e^s / 2^reference in the embeddings' dtype, with one float32 reference per row and tile; the references lie
    behind the exponentials. Not kept are those of float32, whose logits are products of a library; with moments, with
    hardness, and with a ceiling of two directions, as their gradients need the logits themselves; and of float16 with
    two directions, since it has too few powers of two for one exponential to serve both its row and its column.
    """
    rows, columns, size = query.shape[0], key.shape[0], query.element_size()
    both = "symmetric" in kind or "upper" in kind
    serves = "stash" in kind and "moments" not in kind and hardness == 0
    if not serves or query.dtype == torch.float32 or (both and (ceiling is not None or query.dtype == torch.float16)):
        return 0, 0
    elements, pitch = exponentials(rows, columns, size)
    return (elements, pitch) if elements * size <= KEPT_SHARE * workspace_mib * 1048576 else (0, 0)


def exponentials(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    """(elements, row pitch) that so many exponentials take, rows padded to whole tiles, and their references."""
    pitch = -(-columns // WIDEST_TILE) * WIDEST_TILE
    return rows * pitch + rows * pitch // NARROWEST_TILE * (4 // itemsize), pitch


def saves(rows: int, columns: int, symmetric: bool, reduction: str, needs: int, workspace_mib: float) -> str:
    """What the forward leaves for the backward; csrc/contrastive/softmax_loss.cpp decides in the same way.

    ""       nothing: no gradient will be asked for
    "rows"   the gradient of each row's own loss: one direction whose keys are frozen
    "grads"  the gradients of the reduced loss, which the backward multiplies by its one upstream number
    "stash"  the products <query_i, key_j> of all rows
    "again"  the products of the first `rows_kept` rows; the backward makes the others again

    What each costs: docs/design/contrastive.md, "How many products, CPU".
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
    """Of how many rows "again" keeps the products: those that a quarter of the workspace (and STASH_MIB) holds.

    part_of_stash() in csrc/contrastive/online_softmax.h decides in the same way.
    """
    fit = int(min(workspace_mib / 4, STASH_MIB) * 1048576) // (4 * columns)
    return fit // TILE_ROWS * TILE_ROWS if fit > TILE_ROWS else fit


def triton_saves(symmetric: bool, reduction: str, needs: int) -> str:
    """What the Triton kernels' forward leaves for the backward: nothing, "grads" or "again".

    "grads" fits any workspace, as a chunk may have a single row. It stands for the "rows" of :func:`saves` too:
    without a reduction they are the gradients of each share_i loss_i. "again" stands for "stash" too: `stash` holds
    exponentials if :func:`kept_exponentials` finds room for them, else nothing; `stats` the log-sum-exps and maxima of
    each direction, and the positives' logits; `lengths` the row scales and c(key).
    """
    if needs == 0:
        return ""
    return "again" if symmetric or (needs & KEY and reduction == "none") else "grads"
