"""pytorch_metric_learning's NTXentLoss and SupConLoss (versions 2.8, 2.9), by fastloss's info_nce and supcon_loss.

They replace ``compute_loss`` alone, so that reducers, regularisers, recorded statistics and wrappers stay as they are.
Pairs given by hand (`indices_tuple`, what miners and CrossBatchMemory give), distances other than cosine and dot
product, and SupCon against other embeddings are the library's own code's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contrastive import info_nce, supcon_loss
from ._common import NotServed, as_theirs, check_not_overridden, hands_on, required

_theirs = required("pytorch_metric_learning.losses")
_distances = required("pytorch_metric_learning.distances")
_pairs = required("pytorch_metric_learning.utils.loss_and_miner_utils")
_NTXentLoss: Any = _theirs.NTXentLoss
_SupConLoss: Any = _theirs.SupConLoss


def _check_served(loss: Any, base: Any, labels: Tensor | None, indices_tuple: Any) -> None:
    if indices_tuple is not None or labels is None:
        raise NotServed("indices_tuple: pairs are given, or labels are not")
    distance = loss.distance
    known = type(distance) in (_distances.CosineSimilarity, _distances.DotProductSimilarity)
    if not known or (distance.power, distance.p) != (1, 2) or distance.collect_stats:
        raise NotServed(f"distance: {type(distance).__name__}, a power, another norm, or statistics of it")
    check_not_overridden(loss, base, "_compute_loss", "mat_based_loss", "pair_based_loss")


class NTXentLoss(_NTXentLoss):
    """pytorch_metric_learning's ``NTXentLoss``: each positive pair of the batch against the anchor's negatives.

    Losses above 87 (float32) are exact, where the library's end at 87.3.
    """

    @hands_on("pytorch_metric_learning.NTXentLoss", _theirs.NTXentLoss.compute_loss)
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        _check_served(self, _NTXentLoss, labels, indices_tuple)
        matches, others = _pairs.get_matches_and_diffs(labels, ref_labels)
        anchors, positives = torch.where(matches)
        if _no_loss(len(anchors), int(others.sum(dtype=torch.long))):
            return self.zero_losses()
        losses: Any = info_nce(
            embeddings[anchors], ref_emb, targets=positives, query_ids=labels[anchors], key_ids=ref_labels,
            temperature=self.temperature, normalize=self.distance.normalize_embeddings, reduction="none",
        )  # fmt: skip
        losses = as_theirs(losses, embeddings, ref_emb)
        return {"loss": {"losses": losses, "indices": (anchors, positives), "reduction_type": "pos_pair"}}


class SupConLoss(_SupConLoss):
    """pytorch_metric_learning's ``SupConLoss``: by default the mean of the rows whose loss is not 0."""

    @hands_on("pytorch_metric_learning.SupConLoss", _theirs.SupConLoss.compute_loss)
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        _check_served(self, _SupConLoss, labels, indices_tuple)
        if ref_emb is not embeddings or ref_labels is not labels:
            raise NotServed("ref_emb: other embeddings than the batch's")
        rows, same = len(labels), int(labels.unique(return_counts=True)[-1].square().sum())
        if _no_loss(same - rows, rows * rows - same):
            return self.zero_losses()
        losses: Any = supcon_loss(
            embeddings, labels, temperature=self.temperature, normalize=self.distance.normalize_embeddings,
            reduction="none",
        )  # fmt: skip
        indices = torch.arange(rows, device=losses.device)
        return {"loss": {"losses": as_theirs(losses, embeddings), "indices": indices, "reduction_type": "element"}}


def _no_loss(positives: int, negatives: int) -> bool:
    """Whether the pairs are too few for a loss, which is 0 then: none of either kind, or no more than one of each."""
    return min(positives, negatives) == 0 or max(positives, negatives) <= 1


SWAPS = {
    "pytorch_metric_learning.losses.NTXentLoss": NTXentLoss,
    "pytorch_metric_learning.losses.SupConLoss": SupConLoss,
}
LEFT: dict[str, str] = {}
