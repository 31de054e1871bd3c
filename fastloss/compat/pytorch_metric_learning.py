"""pytorch_metric_learning's NTXentLoss and SupConLoss (versions 2.8, 2.9), by fastloss's info_nce and supcon_loss.

They replace ``compute_loss`` alone, so that reducers, regularisers, recorded statistics and wrappers stay as they are.

    NT-Xent    log(1 + exp(L_a - s_ap)) of each positive pair (a, p), L_a the log-sum-exp of a's negatives
    SupCon     L_a - mean_p s_ap of each anchor, L_a the log-sum-exp of all that it is compared with

L comes from fastloss's kernels: of all rows of other classes, of all rows but one, or of the pairs that a miner chose,
as a list. For pairs that come twice, and for distances that no product gives, NT-Xent takes it from the library's
matrix of distances; the library itself compares every positive pair with every negative one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive import info_nce, supcon_loss
from ..core import result_dtype
from ._common import NotServed, as_theirs, check_not_overridden, check_plain, hands_on, required

_theirs = required("pytorch_metric_learning.losses")
_distances = required("pytorch_metric_learning.distances")
_library_pairs = required("pytorch_metric_learning.utils.loss_and_miner_utils")
_NTXentLoss: Any = _theirs.NTXentLoss
_SupConLoss: Any = _theirs.SupConLoss


class _Similarity(NamedTuple):
    """What a distance is as a factor of products, plus a number for each reference; over the temperature."""

    normalize: bool
    scale: float
    squares: bool  # less half the reference's square: a squared distance, but for what is the anchor's alone


def _similarity(loss: Any) -> _Similarity | None:
    distance = loss.distance
    if distance.p != 2:
        return None
    products = (_distances.CosineSimilarity, _distances.DotProductSimilarity)
    if type(distance) in products and distance.power == 1:
        return _Similarity(distance.normalize_embeddings, 1 / loss.temperature, False)
    if type(distance) is _distances.LpDistance and distance.power == 2:
        return _Similarity(distance.normalize_embeddings, 2 / loss.temperature, not distance.normalize_embeddings)
    return None


class _Rows(NamedTuple):
    """Anchors and what they are compared with, and their similarity."""

    anchors: Tensor  # [M, D]
    references: Tensor  # [N, D]
    kind: _Similarity

    def bias(self) -> Tensor | None:
        if not self.kind.squares:
            return None
        return self.references.to(self._dtype()).square().sum(1) * (-self.kind.scale / 2)

    def lse(self, **options: Any) -> Tensor:
        """The log-sum-exps [M] of fastloss's kernel, see :func:`fastloss.info_nce`."""
        found: Any = info_nce(
            self.anchors, self.references, temperature=1 / self.kind.scale, normalize=self.kind.normalize,
            bias=self.bias(), return_lse=True, reduction="none", **options,
        )  # fmt: skip
        return found.lse

    def of_pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The similarities [P] of pairs."""
        one, two = self.anchors.to(self._dtype()), self.references.to(self._dtype())
        if self.kind.normalize:
            one, two = F.normalize(one), F.normalize(two)
        if len(rows) * one.shape[1] > len(one) * len(two):
            found = (one @ two.T)[rows, columns]
        else:
            found = (one[rows] * two[columns]).sum(1)
        bias = self.bias()
        return self.kind.scale * found if bias is None else self.kind.scale * found + bias[columns]

    def _dtype(self) -> torch.dtype:
        return result_dtype(self.anchors, self.references)


class _Pairs(NamedTuple):
    """Positive and negative pairs, of rows [M] and columns [N]; the negatives None: all of another class."""

    positive_rows: Tensor
    positive_columns: Tensor
    negative_rows: Tensor | None
    negative_columns: Tensor | None
    negatives: int


def _pairs(indices_tuple: Any, labels: Tensor | None, ref_labels: Tensor | None) -> _Pairs:
    if labels is None and indices_tuple is None:
        raise NotServed("labels: neither they nor indices_tuple are given")
    if indices_tuple is None:
        matches, others = _library_pairs.get_matches_and_diffs(labels, ref_labels)
        rows, columns = torch.where(matches)
        return _Pairs(rows, columns, None, None, int(others.sum(dtype=torch.long)))
    rows, columns, negative_rows, negative_columns = _library_pairs.convert_to_pairs(indices_tuple, labels, ref_labels)
    return _Pairs(rows, columns, negative_rows, negative_columns, len(negative_rows))


def _no_loss(pairs: _Pairs) -> bool:
    """Whether the pairs are too few for a loss, which is 0 then: none of either kind, or no more than one of each."""
    positives = len(pairs.positive_rows)
    return min(positives, pairs.negatives) == 0 or max(positives, pairs.negatives) <= 1


def _listed(pairs: _Pairs, columns: int, also: bool = False) -> Tensor | None:
    """The negative pairs [P, 2], `also` the positive ones beside them; None: all of another class, or some come twice,
    which count twice for the library, or a pair is of both kinds."""
    if pairs.negative_rows is None or pairs.negative_columns is None:
        return None
    negative = torch.stack((pairs.negative_rows, pairs.negative_columns), 1)
    positive = torch.stack((pairs.positive_rows, pairs.positive_columns), 1)
    found = torch.cat((negative, positive)) if also else negative
    # info_nce takes a row's target, a positive, for no negative; so none may be listed as one
    both = torch.cat((negative, positive))
    places = (both[:, 0] * columns + both[:, 1]).sort().values
    return None if bool((places[1:] == places[:-1]).any()) else found


def _are_all(pairs: _Pairs, labels: Tensor | None, ref_labels: Tensor | None) -> bool:
    """Whether the negatives are all pairs of different classes, each once, and the positives of one class."""
    if pairs.negative_rows is None or pairs.negative_columns is None:
        return True
    if labels is None or ref_labels is None or 4 * pairs.negatives < len(labels) * len(ref_labels):
        return False  # a short list is taken as it is, without a mask of all pairs
    ordered = pairs.negative_rows * len(ref_labels) + pairs.negative_columns
    different = labels[:, None] != ref_labels
    return bool(
        different.sum() == pairs.negatives
        and different[pairs.negative_rows, pairs.negative_columns].all()
        and (ordered[1:] > ordered[:-1]).all()
        and not different[pairs.positive_rows, pairs.positive_columns].any()
    )


def _note_statistics(distance: Any, embeddings: Tensor, references: Tensor) -> None:
    """What the distance notes of a batch where it is called."""
    distance.reset_stats()
    if distance.collect_stats:
        unit = [distance.maybe_normalize(rows) for rows in (embeddings, references)]
        distance.set_default_stats(embeddings, references, *unit)


def _a_positive(pairs: _Pairs, rows: int) -> Tensor:
    """One positive column of each row [M]; 0 where there is none."""
    found = torch.zeros(rows, dtype=torch.long, device=pairs.positive_rows.device)
    return found.index_put((pairs.positive_rows,), pairs.positive_columns)


class NTXentLoss(_NTXentLoss):
    """pytorch_metric_learning's ``NTXentLoss``: each positive pair of the batch against the anchor's negatives.

    Losses above 87 (float32) are exact, where the library's end at 87.3.
    """

    @hands_on("pytorch_metric_learning.NTXentLoss", _theirs.NTXentLoss.compute_loss)
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        check_not_overridden(self, _NTXentLoss, "_compute_loss", "pair_based_loss")
        check_plain(embeddings, ref_emb)
        pairs, kind = _pairs(indices_tuple, labels, ref_labels), _similarity(self)
        if _no_loss(pairs):
            return self.zero_losses()
        rows, columns = pairs.positive_rows, pairs.positive_columns
        every = _are_all(pairs, labels, ref_labels)
        listed = None if every else _listed(pairs, len(ref_emb))
        if kind is not None and (every or listed is not None):
            _note_statistics(self.distance, embeddings, ref_emb)
            found = _Rows(embeddings, ref_emb, kind)
            which = {"query_ids": labels, "key_ids": ref_labels} if every else {"negative_pairs": listed}
            negatives = found.lse(include_positive=False, targets=_a_positive(pairs, len(embeddings)), **which)
            positives = found.of_pairs(rows, columns)
        else:
            scores = _matrix(self, embeddings, ref_emb)
            negatives, positives = _lse_of_listed(scores, pairs, labels, ref_labels), scores[rows, columns]
        beyond = negatives[rows] - positives
        losses = as_theirs(torch.logaddexp(beyond, torch.zeros_like(beyond)), embeddings, ref_emb)
        return {"loss": {"losses": losses, "indices": (rows, columns), "reduction_type": "pos_pair"}}


def _matrix(loss: Any, embeddings: Tensor, references: Tensor) -> Tensor:
    """The library's distances [M, N] as similarities over the temperature, in float32 at least."""
    distances = loss.distance(embeddings, references)
    sign = 1 if loss.distance.is_inverted else -1
    return distances.to(result_dtype(embeddings, references)) * (sign / loss.temperature)


def _lse_of_listed(scores: Tensor, pairs: _Pairs, labels: Tensor | None, ref_labels: Tensor | None) -> Tensor:
    """The log-sum-exp of each row's negatives, those that are listed twice counting twice; -inf where it has none."""
    if pairs.negative_rows is None or pairs.negative_columns is None:
        assert labels is not None and ref_labels is not None
        counts = (labels[:, None] != ref_labels).to(scores.dtype)
    else:
        once = torch.ones_like(pairs.negative_rows, dtype=scores.dtype)
        where = pairs.negative_rows, pairs.negative_columns
        counts = torch.zeros_like(scores).index_put(where, once, accumulate=True)
    some = counts.any(1, keepdim=True)
    weighted = torch.where(counts > 0, scores + counts.log(), -torch.inf)
    return torch.where(some, weighted, 0.0).logsumexp(1).masked_fill(~some[:, 0], -torch.inf)


class SupConLoss(_SupConLoss):
    """pytorch_metric_learning's ``SupConLoss``: by default the mean of the rows whose loss is not 0."""

    @hands_on("pytorch_metric_learning.SupConLoss", _theirs.SupConLoss.compute_loss)
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        check_not_overridden(self, _SupConLoss, "_compute_loss", "mat_based_loss")
        check_plain(embeddings, ref_emb)
        kind = _similarity(self)
        if kind is None:
            raise NotServed(f"distance: {type(self.distance).__name__}, a power, or another norm")
        alone = indices_tuple is None and ref_emb is embeddings and ref_labels is labels and labels is not None
        if alone and not kind.squares:
            return self._of_the_batch(embeddings, labels, kind)
        pairs, rows = _pairs(indices_tuple, labels, ref_labels), len(embeddings)
        if _no_loss(pairs):
            return self.zero_losses()
        left_out = _left_out(pairs, rows, len(ref_emb), alone)
        which = {"query_ids": left_out, "key_ids": torch.arange(len(ref_emb), device=embeddings.device)}
        if left_out is None:
            listed = _listed(pairs, len(ref_emb), also=True)
            if listed is None:
                raise NotServed("indices_tuple: pairs that come twice")
            which = {"negative_pairs": listed}
        _note_statistics(self.distance, embeddings, ref_emb)
        found = _Rows(embeddings, ref_emb, kind)
        lse = found.lse(targets=_a_positive(pairs, rows), **which)
        counts = torch.bincount(pairs.positive_rows, minlength=rows)
        similarities = found.of_pairs(pairs.positive_rows, pairs.positive_columns)
        sums = torch.zeros_like(lse).index_add(0, pairs.positive_rows, similarities)
        return self._found((lse - sums / counts.clamp_min(1)).masked_fill(counts == 0, 0.0), embeddings, ref_emb)

    def _of_the_batch(self, embeddings: Tensor, labels: Tensor, kind: _Similarity) -> dict[str, Any]:
        """All rows against all others."""
        rows, same = len(labels), int(labels.unique(return_counts=True)[-1].square().sum())
        if min(same - rows, rows * rows - same) == 0 or max(same - rows, rows * rows - same) <= 1:
            return self.zero_losses()
        _note_statistics(self.distance, embeddings, embeddings)
        options: dict[str, Any] = {"temperature": 1 / kind.scale, "normalize": kind.normalize, "reduction": "none"}
        return self._found(supcon_loss(embeddings, labels, **options), embeddings)

    def _found(self, losses: Tensor, *inputs: Tensor) -> dict[str, Any]:
        indices = torch.arange(len(losses), device=losses.device)
        return {"loss": {"losses": as_theirs(losses, *inputs), "indices": indices, "reduction_type": "element"}}


def _left_out(pairs: _Pairs, rows: int, columns: int, alone: bool) -> Tensor | None:
    """Which column each row [M] is not compared with; -1: none. Rows without a positive have no loss, and do not count.

    None where a row leaves out more than one, or the list is short.
    """
    device = pairs.positive_rows.device
    if pairs.negative_rows is None:
        return torch.arange(rows, device=device) if alone else torch.full((rows,), -1, device=device)
    if 4 * (len(pairs.positive_rows) + pairs.negatives) < rows * columns:
        return None
    compared = torch.zeros(rows, columns, dtype=torch.bool, device=device)
    compared[pairs.positive_rows, pairs.positive_columns] = True
    counted = compared.any(1)
    compared[pairs.negative_rows, pairs.negative_columns] = True
    missing = columns - compared.sum(1)
    if compared.sum() != len(pairs.positive_rows) + pairs.negatives or (missing[counted] > 1).any():
        return None
    return torch.where(missing == 1, compared.to(torch.uint8).argmin(1), -1)


SWAPS = {
    "pytorch_metric_learning.losses.NTXentLoss": NTXentLoss,
    "pytorch_metric_learning.losses.SupConLoss": SupConLoss,
}
LEFT: dict[str, str] = {}
