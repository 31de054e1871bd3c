"""Checks of arguments that the contrastive losses share, and their last step: the reduction of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import reduce_rows
from ..core.checks import check_dense, check_flag, check_number, check_same_device, check_tensor, check_workspace
from .options import ContrastiveOutput, NegativeSampling

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def across_ranks() -> Any:
    """The losses of a batch on several ranks. No family imports them but where a group is given."""
    from ..distributed import losses

    return losses


def check_embeddings(
    name: str, value: Any, like: Tensor | None = None, like_name: str = "", rows: bool = False
) -> None:
    """[M, D] with D >= 1, on the device and of the width (with `rows` also the length) of `like`."""
    check_tensor(name, value, 2)
    if value.shape[1] == 0:
        raise ValueError(f"{name}: expected embeddings [M, D] with D >= 1, got shape {tuple(value.shape)}")
    if like is None:
        return
    check_same_device(like_name, like, name, value)
    if value.shape[1] != like.shape[1]:
        dim = like.shape[1]
        raise ValueError(f"{name}: expected embeddings of {like_name}'s width, D={dim}, got D={value.shape[1]}")
    if rows and value.shape[0] != like.shape[0]:
        raise ValueError(f"{name}: expected as many rows as {like_name}, {like.shape[0]}, got {value.shape[0]}")


def check_negatives(negatives: Any, query: Tensor) -> None:
    """[K, D], shared by all rows, or [M, K, D], each row its own."""
    check_tensor("negatives", negatives)
    if negatives.ndim not in (2, 3):
        raise ValueError(
            f"negatives: expected [K, D], shared, or [M, K, D], per sample, got shape {tuple(negatives.shape)}"
        )
    check_same_device("query", query, "negatives", negatives)
    if negatives.shape[-1] != query.shape[1]:
        raise ValueError(
            f"negatives: expected embeddings of query's width, D={query.shape[1]}, got D={negatives.shape[-1]}"
        )
    if negatives.ndim == 3 and negatives.shape[0] != query.shape[0]:
        raise ValueError(
            f"negatives: expected [M, K, D] with query's M={query.shape[0]} rows, got shape {tuple(negatives.shape)}"
        )


def check_negatives_mask(mask: Any, negatives: Tensor | None) -> Tensor:
    """A bool tensor [M, K] beside negatives [M, K, D]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"negatives_mask: expected a bool tensor (True: the negative counts), got {got}")
    check_dense("negatives_mask", mask)
    if negatives is None or negatives.ndim != 3:
        got = "none" if negatives is None else f"shape {tuple(negatives.shape)}"
        raise ValueError(
            f"negatives_mask: expected negatives [M, K, D] beside it, got {got}; of shared ones query_ids and key_ids "
            "leave some out"
        )
    if mask.shape != negatives.shape[:2]:
        raise ValueError(f"negatives_mask: expected [M, K] = {list(negatives.shape[:2])}, got {list(mask.shape)}")
    check_same_device("negatives", negatives, "negatives_mask", mask)
    return mask


def as_scalar(name: str, value: Any, like: Tensor, dtype: torch.dtype, *, positive: bool) -> Tensor | float:
    """A finite float (> 0 with `positive`), or a tensor of one element as a 0-d one, its value not looked at."""
    if not isinstance(value, Tensor):
        return check_number(name, value, *((0,) if positive else ()), open_low=positive)
    check_tensor(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor with one element, got shape {tuple(value.shape)}")
    check_same_device("embeddings", like, name, value)
    return value.reshape(()).to(dtype)


def scale_of(temperature: Any, like: Tensor, dtype: torch.dtype) -> Tensor | float:
    """The scale that a temperature stands for."""
    return 1.0 / as_scalar("temperature", temperature, like, dtype, positive=True)


def check_integers(name: str, value: Any, lengths: tuple[int, ...], like: Tensor, several: bool = False) -> Tensor:
    """A 1-D (with `several` also a 2-D) integer tensor of one of the `lengths`, on the device of `like`, as int64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(value).__name__}")
    check_dense(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")
    if value.ndim not in ((1, 2) if several else (1,)) or value.shape[0] not in lengths or 0 in value.shape[1:]:
        wanted = " or ".join(f"[{n}]" for n in dict.fromkeys(lengths))
        wanted += f" or [{lengths[0]}, P]" if several else ""
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(value.shape)}")
    check_same_device("embeddings", like, name, value)
    return value.long()


def check_targets(targets: Any, rows: int, keys: int, like: Tensor) -> Tensor:
    """Indices of keys as int64. Their range is checked on the CPU; a GPU's own index check asserts on the device."""
    targets = check_integers("targets", targets, (rows,), like, several=True)
    least = -1 if targets.ndim == 2 else 0
    wanted = f"indices of key's {keys} rows, 0 to {keys - 1}{', or -1' * (least < 0)}"
    check_range("targets", targets, least, keys, wanted)
    return targets


def check_range(name: str, indices: Tensor, least: int, end: int, wanted: str) -> None:
    """Whether all are at least `least` and below `end`, where that can be seen without making a GPU wait."""
    plain = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if plain and type(indices) is Tensor and indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < least or high >= end:
            raise ValueError(f"{name}: expected {wanted}, got {low} to {high}")


def check_flags(**flags: Any) -> list[bool]:
    """The flags, in the order given."""
    return [check_flag(name, value) for name, value in flags.items()]


def check_sampling(sampling: Any, normalize: bool, bias: Any = None) -> None:
    if sampling is None:
        return
    if not isinstance(sampling, NegativeSampling):
        raise TypeError(f"sampling: expected a NegativeSampling, got {type(sampling).__name__} {sampling!r}")
    if sampling.tau_plus and not normalize:
        raise ValueError("sampling: tau_plus needs normalize=True, its floor is the least cosine similarity")
    if sampling.tau_plus and bias is not None:
        raise ValueError("sampling: tau_plus takes no bias, its floor is the least cosine similarity")


def check_shared(like: Tensor, weights: Any, workspace_mib: Any, label_smoothing: Any = 0.0) -> tuple[float, float]:
    """The options that every contrastive loss has; the workspace and the smoothing as floats."""
    shared = check_workspace(workspace_mib), check_number("label_smoothing", label_smoothing, 0, 1)
    if weights is None:
        return shared
    rows = like.shape[0]
    if not (isinstance(weights, Tensor) and weights.dtype == torch.bool):
        check_tensor("weights", weights)
    check_same_device("embeddings", like, "weights", weights)
    if weights.shape != (rows,):
        raise ValueError(f"weights: expected one per row, shape ({rows},), got {tuple(weights.shape)}")
    if weights.requires_grad:
        raise ValueError("weights: no gradient is provided for it; pass weights.detach()")
    return shared


def dropped_rows(weights: Tensor | None) -> Tensor | None:
    """Which rows [M] have the weight 0, by which nothing may be multiplied: 0 times NaN is NaN."""
    return None if weights is None else weights == 0


def without(rows: Tensor, dropped: Tensor | None) -> Tensor:
    """Embeddings with zeros in place of dropped rows, which so get no gradient either."""
    return rows if dropped is None else rows.masked_fill(dropped[:, None], 0.0)


def counted(embeddings: Tensor, dropped: Tensor | None) -> Tensor:
    """Embeddings that several rows see, with zeros where no row counts at all: a NaN among them reaches no gradient."""
    return embeddings if dropped is None else embeddings.masked_fill(dropped.all(), 0.0)


def reduce_output(
    rows: ContrastiveOutput | Tensor, weights: Tensor | None, reduction: str, return_lse: bool
) -> Tensor | ContrastiveOutput:
    """The reduced loss, alone or with its by-products, which `rows` then has."""
    if isinstance(rows, Tensor):
        return reduce_rows(rows, weights, reduction)
    loss = reduce_rows(rows.loss, weights, reduction)
    return ContrastiveOutput(loss, rows.lse, rows.top1) if return_lse else loss
