"""What the forward of a softmax op leaves for its backward, decided here alone, from the bits of `needs` and the sizes.

The word is the op's input `save`. Its fake, its C++ and its Triton kernels do what the word says:

    ""               nothing but the result: no gradient will be asked for, or the backward makes all again
    "weighted_keys"  per statistic the sum of the keys, each by its weight, which is the queries' gradient: frozen keys
    "row_grads"      the gradients of each row's own loss: one direction whose keys are frozen
    "grads"          the gradients of the reduced loss, which the backward multiplies by its one upstream number
    "logits"         C++: statistics, and of the first `saved_rows` rows the products <query_i, key_j> in float32; the
                     backward makes those of the other rows again
    "exps"           Triton: statistics and, with `saved_rows`, the exponentials of all logits: each e^s / 2^exponent in
                     the embeddings' dtype, with one float32 exponent per row and tile, which lie behind them

What each costs: docs/design/contrastive.md, "How many products, CPU".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import Form

QUERY, KEY, SCALE = 1, 2, 4  # bits of `needs` of the softmax ops: which gradients will be asked for
NEGATIVES = 8  # one more, where each query has negatives of its own
IMAGE, TEXT, SCALE_AND_BIAS = 1, 2, 4  # bits of `needs` of SigLIP's op

MIB = 1 << 20
LOGITS_MIB = 64  # C++: logits are saved up to this size (or the workspace's, if less)
GRADS_MIB = 16  # C++: "grads" of two directions, whose logits are one chunk, up to this size
LEAST_ROWS = 64  # C++: the least rows of a chunk for "grads" of one direction; smaller products are slow
TILE_ROWS = 32  # rows of a tile of the C++ kernels
EXPS_SHARE = 0.75  # Triton: the part of the workspace that exponentials may take; G takes its blocks from the rest
NARROWEST_TILE, WIDEST_TILE = 16, 128  # columns of the Triton kernels' tiles
# From one row of a block to the next: the kernels count from a tile's corner, at most 128 rows on, in 32 bits.
MOST_PITCH = 2**23


class Exponentials(NamedTuple):
    """The memory of saved exponentials, rows padded to whole tiles, and behind them their exponents."""

    elements: int  # of the embeddings' dtype
    pitch: int  # elements from one row to the next


def aligned(elements: int) -> int:
    """So many float32, rounded up to 16 bytes: for pointers to what lies behind others Triton compiles kernels anew."""
    return -(-elements // 4) * 4


def exponentials(rows: int, columns: int, itemsize: int) -> Exponentials:
    pitch = -(-columns // WIDEST_TILE) * WIDEST_TILE
    return Exponentials(rows * pitch + rows * pitch // NARROWEST_TILE * (4 // itemsize), pitch)


def _exps_serve(
    query: Tensor, key: Tensor, form: Form, logit_limit: Tensor | None, hardness: float, workspace_mib: float
) -> bool:
    """Whether the Triton kernels save exponentials.

    Not those of float32, whose logits are products of a library; not with moments, with hardness, or with a logit limit
    of two directions, as their gradients need the logits themselves; not those of float16 with two directions, since it
    has too few powers of two for one exponential to serve both its row and its column.
    """
    directions = form.symmetric or form.self_similarity
    if form.moments or hardness > 0 or query.dtype == torch.float32 or key.shape[0] > MOST_PITCH:
        return False
    if directions and (logit_limit is not None or query.dtype == torch.float16):
        return False
    size = query.element_size()
    return exponentials(query.shape[0], key.shape[0], size).elements * size <= EXPS_SHARE * workspace_mib * MIB


def save_of_stats(
    backend: str,
    query: Tensor,
    key: Tensor,
    form: Form,
    targets: Tensor | None,
    logit_limit: Tensor | None,
    hardness: float,
    workspace_mib: float,
    needs_columns: bool,
) -> str:
    """The word for the op of the statistics, some input of which needs a gradient. `needs_columns`: some of the keys,
    their scales or biases."""
    if not needs_columns and not form.symmetric and not form.self_similarity:
        # Triton's weighted keys are those of the first statistic, and with one way to leave out columns
        one_statistic = not form.moments and hardness == 0 and (targets is None or not form.diagonal)
        if backend == "cpp" or one_statistic:
            return "weighted_keys"
    if backend == "cpp":
        return "logits" if query.shape[0] * key.shape[0] * 4 <= min(workspace_mib, LOGITS_MIB) * MIB else ""
    return "exps" if _exps_serve(query, key, form, logit_limit, hardness, workspace_mib) else ""


def save_of_loss(
    backend: str, query: Tensor, key: Tensor, symmetric: bool, reduction: str, needs: int, workspace_mib: float
) -> tuple[str, int]:
    """(`save`, `saved_rows`) of the op from embeddings to loss."""
    if needs == 0:
        return "", 0
    if backend == "triton":
        return _save_of_triton_loss(query, key, symmetric, reduction, needs, workspace_mib)
    if not symmetric and not needs & KEY:
        return "row_grads", 0
    rows, row_mib = query.shape[0], 4 * key.shape[0] / MIB
    least = rows if symmetric else min(rows, LEAST_ROWS)
    if reduction != "none" and least * row_mib <= min(workspace_mib / 3, GRADS_MIB if symmetric else workspace_mib):
        return "grads", 0
    if rows * row_mib <= min(workspace_mib, LOGITS_MIB):
        return "logits", rows
    fit = int(min(workspace_mib / 4, LOGITS_MIB) / row_mib)  # a quarter: the backward's blocks need the rest
    return "logits", fit // TILE_ROWS * TILE_ROWS if fit > TILE_ROWS else fit


def _save_of_triton_loss(
    query: Tensor, key: Tensor, symmetric: bool, reduction: str, needs: int, workspace_mib: float
) -> tuple[str, int]:
    """(`save`, `saved_rows`) for the Triton kernels; the rows are all or none.

    "grads" is always possible, in chunks of a single row if need be. There is no "row_grads": with reduction "none"
    "grads" holds the gradient of each weighted row loss.
    """
    if not symmetric and not (needs & KEY and reduction == "none"):
        return "grads", 0
    fit = _exps_serve(query, key, Form(symmetric=symmetric), None, 0.0, workspace_mib)
    return "exps", query.shape[0] if fit else 0
