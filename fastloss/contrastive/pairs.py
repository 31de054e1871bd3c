"""Lists of pairs [P, 2] of a row and a column of the logits: all that are no negatives, or all that are.

The kernels read them as words of 32 columns: those of row i are words[begin:end], (begin, end) = spans[i], in the order
of their columns. A word has the number of its columns, j // 32, and a bit for each of them, 1 where the pair (i, j) is
listed; only words with a listed pair are there. So a list takes at most 8 bytes a pair, and 16 a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import full_precision, result_dtype
from ..core.checks import check_dense, check_number, check_same_device, check_tensor, check_workspace
from ..core.entry import public_function
from .checks import INTEGERS, as_scalar, check_embeddings, check_flags, check_range, check_targets
from .embeddings import embed, upcast_on_cpu

WORD = 32  # columns


class PairWords(NamedTuple):
    """A list as the op of the statistics takes it."""

    spans: Tensor | None  # [M, 2] int64
    words: Tensor | None  # [P, 2] int32; behind those that are used, any number
    are_negatives: bool = False  # the listed pairs alone are negatives; else they alone are none


class ListedPairs(NamedTuple):
    """A checked list."""

    pairs: Tensor  # [P, 2] int64
    are_negatives: bool

    def words(self, rows: int, columns: int, first: int = 0) -> PairWords:
        """Of the columns `first` to `first + columns`, counted from 0 on. Nothing here waits for a device."""
        row, column = self.pairs.unbind(1)
        across = -(-columns // WORD)  # words of a row, if all are there
        end = rows * across * WORD
        column = column - first
        place = torch.where((column >= 0) & (column < columns), row * (across * WORD) + column, end).sort().values
        word = place // WORD
        fresh, begins = (torch.ones_like(place, dtype=torch.bool) for _ in range(2))
        fresh[1:], begins[1:] = place[1:] != place[:-1], word[1:] != word[:-1]
        index = begins.cumsum(0) - 1
        bit = torch.where(fresh & (place < end), torch.ones_like(place) << place % WORD, 0)
        bits = torch.zeros_like(place).index_add(0, index, bit)
        numbers = torch.full_like(place, rows * across).scatter(0, index, word)
        edges = torch.searchsorted(numbers, torch.arange(rows + 1, device=place.device) * across)
        bits = torch.where(bits >= 2 ** (WORD - 1), bits - 2**WORD, bits)  # as int32 has them
        words = torch.stack((numbers % max(across, 1), bits), 1).int()
        return PairWords(torch.stack((edges[:-1], edges[1:]), 1), words, self.are_negatives)


NO_PAIRS = PairWords(None, None)


def words_of(pairs: ListedPairs | None, rows: int, columns: int, first: int = 0) -> PairWords:
    return NO_PAIRS if pairs is None else pairs.words(rows, columns, first)


def is_listed(spans: Tensor, words: Tensor, columns: int) -> Tensor:
    """[M, N] bool: which pairs the words list."""
    rows = spans.shape[0]
    place = torch.arange(words.shape[0], device=words.device)
    row = torch.searchsorted(spans[:, 1].contiguous(), place, right=True)
    inside = row < rows
    column = words[:, :1].long() * WORD + torch.arange(WORD, device=words.device)
    listed = (words[:, 1:] >> torch.arange(WORD, device=words.device)) & 1 != 0
    counts = torch.zeros(rows + 1, columns + WORD, dtype=torch.int32, device=words.device)
    row = torch.where(inside, row, rows)[:, None].expand_as(column)
    column = torch.where(inside[:, None], column, 0)
    counts = counts.index_put((row, column), listed.int(), accumulate=True)
    return counts[:rows, :columns] > 0


def checked_pairs(
    excluded: Any, negative: Any, rows: int, columns: int, like: Tensor, group: object = None
) -> ListedPairs | None:
    """The list of `excluded_pairs` or `negative_pairs`, of which one at most is given."""
    if excluded is None and negative is None:
        return None
    if excluded is not None and negative is not None:
        raise ValueError("negative_pairs: expected it without excluded_pairs, as only the pairs listed in it count")
    name, pairs = ("negative_pairs", negative) if excluded is None else ("excluded_pairs", excluded)
    if group is not None:
        raise ValueError(f"{name}: expected it without group; its rows and columns are those of one rank")
    if not isinstance(pairs, Tensor) or pairs.dtype not in INTEGERS:
        got = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
        raise TypeError(f"{name}: expected an integer tensor [P, 2], got {got}")
    check_dense(name, pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{name}: expected shape [P, 2], a row and a column each, got {tuple(pairs.shape)}")
    check_same_device("embeddings", like, name, pairs)
    for index, (side, count) in enumerate((("rows", rows), ("columns", columns))):
        check_range(name, pairs[:, index], 0, count, f"{side} of 0 to {count - 1} in [:, {index}]")
    return ListedPairs(pairs.long(), excluded is None)


@public_function()
def similar_pairs(
    query: Tensor,
    key: Tensor,
    *,
    threshold: float | Tensor | None = None,
    targets: Tensor | None = None,
    margin: float = 0.0,
    relative: bool = False,
    normalize: bool = True,
    workspace_mib: float = 256,
) -> Tensor:
    r"""Pairs of a query and a key that are more similar than the query and its own key: likely false negatives.

    What a guide, another model, finds so is left out of :func:`info_nce` as its `excluded_pairs` (GISTEmbed). With
    :math:`t_i` the similarity of query i and its own key, or the `threshold`, these are the pairs of::

        sim(q_i, k_j) > t_i - margin          relative=True: > t_i - |t_i| margin

    Similarities are made a block at a time: beside it there are 16 bytes for each pair that is found. A GPU is waited
    for, since the number of pairs is read.

    Args:
        query: embeddings [M, D], those of the guide, float16, bfloat16, float32 or float64. No gradient is needed.
        key: embeddings [N, D].
        threshold: a number, or one for each query [M]; None: the similarity of the query and its own key.
        targets: integers [M], each query's own key; None: row i of `key`, with N >= M. Never in the list.
        margin: how much less similar than the threshold a pair may be and is listed all the same.
        relative: whether the margin is a share of the threshold.
        normalize: cosine similarity. False: plain dot products.
        workspace_mib: bound of the block of similarities in MiB, > 0, one row at least.

    Returns:
        int64 [P, 2], in the order of rows and columns.

    Raises:
        TypeError, ValueError: types, shapes, devices or options that do not fit.

    Source: Solatorio, "GISTEmbed: guided in-sample selection of training negatives for text embedding fine-tuning",
    2024; the relative margin as in de Souza P. Moreira et al., "NV-Retriever", 2024.

    Example:
        >>> guide = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> similar_pairs(guide, guide, margin=0.1).tolist()
        [[0, 1], [1, 0]]
    """
    check_embeddings("query", query)
    check_embeddings("key", key, query, "query")
    relative, normalize = check_flags(relative=relative, normalize=normalize)
    workspace_mib, margin = check_workspace(workspace_mib), check_number("margin", margin)
    rows, keys, dtype = query.shape[0], key.shape[0], result_dtype(query, key)
    own = _own_keys(targets, threshold is None, rows, keys, query)
    limits = None if threshold is None else _limits(threshold, rows, query, dtype)
    found = [torch.zeros(0, 2, dtype=torch.long, device=query.device)]
    with torch.no_grad(), full_precision(query):
        one, two = (embed(upcast_on_cpu(side), dtype, normalize) for side in (query, key))
        chunk = max(int(workspace_mib * 2**20) // (5 * max(keys, 1)), 1)  # rows of float32, and of a mask
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            similar = one[part] @ two.T
            own_key = None if own is None else own[part, None]
            if limits is not None:
                limit = limits[part]
            else:
                assert own_key is not None
                limit = similar.gather(1, own_key)
            listed = similar > limit - (limit.abs() if relative else 1) * margin
            if own_key is not None:
                listed.scatter_(1, own_key, False)
            pairs = listed.nonzero()
            pairs[:, 0] += start
            found.append(pairs)
    return torch.cat(found)


def _own_keys(targets: Any, needed: bool, rows: int, keys: int, query: Tensor) -> Tensor | None:
    """[M], where they are given or needed."""
    if targets is None and not needed:
        return None
    if targets is None:
        if keys < rows:
            raise ValueError(f"key: expected at least query's {rows} rows when targets is None, got {keys}")
        return torch.arange(rows, device=query.device)
    targets = check_targets(targets, rows, keys, query)
    if targets.ndim == 2:
        raise ValueError(f"targets: expected shape ({rows},), one key a query, got {tuple(targets.shape)}")
    return targets


def _limits(threshold: Any, rows: int, query: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, 1]"""
    if not isinstance(threshold, Tensor) or threshold.ndim == 0:
        number = as_scalar("threshold", threshold, query, dtype, positive=False)
        return torch.as_tensor(number, dtype=dtype, device=query.device).detach().expand(rows, 1)
    check_tensor("threshold", threshold)
    check_same_device("embeddings", query, "threshold", threshold)
    if threshold.shape != (rows,):
        raise ValueError(f"threshold: expected a number or shape ({rows},), got {tuple(threshold.shape)}")
    return threshold.detach().to(dtype)[:, None]
