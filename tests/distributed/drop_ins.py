"""Drop-ins beside the libraries on several ranks: what each rank makes of its own rows, by both."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor


def drop_ins(rank: int, world: int) -> dict[str, list[list[Tensor]]]:
    """Of each case [theirs, ours]: the value and the gradients of this rank's embeddings, and a scale's averaged."""
    found: dict[str, list[list[Tensor]]] = {}
    for library, part in (("open_clip", open_clip), ("lightly", lightly), ("sentence_transformers", ranking)):
        if importlib.util.find_spec(library):
            found |= part(rank, world)
    return found


def both(rank: int, world: int, theirs: Any, ours: Any, count: int = 2, numbers: tuple[float, ...] = ()) -> Any:
    pair = []
    for fn in (theirs, ours):
        draw = torch.Generator().manual_seed(rank)
        inputs = [torch.randn(5, 8, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(count)]
        scalars = [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in numbers]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*computed by the library itself")
            value = fn(*inputs, *scalars)
        grads = torch.autograd.grad(value, [*inputs, *scalars])
        for grad in grads[count:]:  # as DDP averages that of a parameter
            torch.distributed.all_reduce(grad)
        pair.append([value.detach(), *grads])
    return pair


def open_clip(rank: int, world: int) -> dict[str, Any]:
    theirs, ours = importlib.import_module("open_clip.loss"), importlib.import_module("fastloss.compat.open_clip")
    found, at = {}, {"rank": rank, "world_size": world}
    for local, grad in itertools.product((False, True), repeat=2):
        pair = [m.ClipLoss(local_loss=local, gather_with_grad=grad, **at) for m in (theirs, ours)]
        found[f"ClipLoss {local} {grad}"] = both(rank, world, *pair, numbers=(2.0,))
    for how in ("bidir", "shift", "reduce", "gather"):
        pair = [m.SigLipLoss(dist_impl=how, **at) for m in (theirs, ours)]
        found[f"SigLipLoss {how}"] = both(rank, world, *pair, numbers=(2.0, -1.0))
    return found


def lightly(rank: int, world: int) -> dict[str, Any]:
    theirs, ours = importlib.import_module("lightly.loss"), importlib.import_module("fastloss.compat.lightly")
    found = {}
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        pair = [getattr(m, name)(temperature=0.3, gather_distributed=True) for m in (theirs, ours)]
        found[name] = both(rank, world, *pair)
    return found


def ranking(rank: int, world: int) -> dict[str, Any]:
    theirs = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    ours, found = importlib.import_module("fastloss.compat.sentence_transformers"), {}
    several = ("query_to_doc", "doc_to_query"), ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    for directions, mode in ((several[0], "per_direction"), (several[0][:1], "joint"), (several[1], "joint")):
        options = {"directions": directions, "partition_mode": mode, "gather_across_devices": True, "scale": 5.0}
        pair = [m.MultipleNegativesRankingLoss(None, **options) for m in (theirs, ours)]
        fns = [lambda *e, f=f: f.compute_loss_from_embeddings(list(e), None) for f in pair]
        found[f"{directions} {mode}"] = both(rank, world, *fns, count=3)
    return found
