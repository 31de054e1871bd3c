"""sentence_transformers' ranking losses and GISTEmbedLoss (6.2), by :func:`fastloss.info_nce`.

``compute_loss_from_embeddings`` and the cached losses' ``calculate_loss`` are replaced, on embeddings that the
library's own code makes: its forwards, its gradient cache, its wrappers and its trainer stay; of GISTEmbedLoss, which
has neither, the forward is. The cached losses get their gradients from one call for the whole batch; no matrix of
scores is kept. What GIST's guide leaves out is a list of pairs (:func:`fastloss.similar_pairs`), not a mask.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contrastive import info_nce, similar_pairs
from ._common import NotServed, check_plain, hands_on, required

_theirs = required("sentence_transformers.sentence_transformer.losses")
_util = required("sentence_transformers.util")
_Ranking: Any = _theirs.MultipleNegativesRankingLoss
_Cached: Any = _theirs.CachedMultipleNegativesRankingLoss
_Symmetric: Any = _theirs.MultipleNegativesSymmetricRankingLoss
_CachedSymmetric: Any = _theirs.CachedMultipleNegativesSymmetricRankingLoss
_GIST: Any = _theirs.GISTEmbedLoss
_CachedGIST: Any = _theirs.CachedGISTEmbedLoss
_embedded: Any = required("sentence_transformers.base.losses.merged_forward").embed_columns
_HOME = "sentence_transformers.sentence_transformer.losses"


def _ranking_loss(loss: Any, embeddings: list[Tensor]) -> Tensor:
    """The mean over queries: of each direction's softmax, or of one softmax over the directions' scores together."""
    queries, docs = _checked(loss, embeddings)
    positives, rows, directions = embeddings[1], len(embeddings[0]), set(loss.directions)
    normalize = any(loss.similarity_fct is known for known in (_util.cos_sim, _util.pytorch_cos_sim))
    if not normalize and loss.similarity_fct is not _util.dot_score:
        raise NotServed("similarity_fct: neither cosine nor dot product")
    options: dict[str, Any] = {"temperature": 1 / loss.scale, "normalize": normalize, "reduction": "none"}
    first_row = 0
    if loss.gather_across_devices and torch.distributed.is_available() and torch.distributed.is_initialized():
        options["group"], first_row = torch.distributed.group.WORLD, torch.distributed.get_rank() * rows
    if directions == {"query_to_doc"}:
        values = info_nce(queries, docs, **options)
    elif loss.partition_mode == "per_direction":
        values = (info_nce(queries, docs, **options) + info_nce(positives, queries, **options)) / 2
    else:
        values, lse, _ = info_nce(queries, docs, return_lse=True, **options)
        total = lse
        if "doc_to_query" in directions:
            total = torch.logaddexp(total, info_nce(positives, queries, return_lse=True, **options).lse)
        of_negatives: Any = functools.partial(info_nce, return_lse=True, include_positive=False, **options)
        if "query_to_query" in directions:
            total = torch.logaddexp(total, of_negatives(queries, queries).lse)
        if "doc_to_doc" in directions:  # but those of the same query
            own = torch.arange(first_row, first_row + rows, device=docs.device)
            ids = {"query_ids": own, "key_ids": own.repeat(len(docs) // rows)}
            total = torch.logaddexp(total, of_negatives(positives, docs, **ids).lse)
        values = values + (total - lse)
    return values.mean()  # float32 of half-precision embeddings, as there


def _checked(loss: Any, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The queries [M, D], and all documents [K M, D], the positives first."""
    if len(embeddings) < 2:
        raise NotServed(f"{len(embeddings)} columns of embeddings")
    check_plain(*embeddings)
    if any(column.layout != torch.strided for column in embeddings):
        raise NotServed("sparse embeddings")
    if len({column.shape for column in embeddings}) > 1:
        raise NotServed(f"embeddings of {[tuple(column.shape) for column in embeddings]}")
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        raise NotServed("hardness_mode: a penalty for each pair")
    return embeddings[0], torch.cat(list(embeddings[1:]))


class MultipleNegativesRankingLoss(_Ranking):
    """sentence_transformers' loss: each query must pick its own document; see there for the other directions."""

    @hands_on("sentence_transformers.MultipleNegativesRankingLoss", _Ranking.compute_loss_from_embeddings)
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        return _ranking_loss(self, embeddings)


class CachedMultipleNegativesRankingLoss(_Cached):
    """sentence_transformers' loss: :class:`MultipleNegativesRankingLoss`, its encoder run in mini-batches.

    `mini_batch_size` is the encoder's alone: the loss needs none.
    """

    @hands_on("sentence_transformers.CachedMultipleNegativesRankingLoss", _Cached.calculate_loss)
    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        value = _ranking_loss(self, [torch.cat(column) for column in reps])
        if with_backward:
            value.backward()
            value = value.detach()
        return value


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of a subclass; making an object warns, below

    class MultipleNegativesSymmetricRankingLoss(_Symmetric, MultipleNegativesRankingLoss):
        """sentence_transformers' loss: the mean of both directions."""

        def __init__(self, *args: Any, **options: Any) -> None:
            warnings.warn(_Symmetric.__deprecated__, DeprecationWarning, stacklevel=2)
            super().__init__(*args, **options)

    class CachedMultipleNegativesSymmetricRankingLoss(_CachedSymmetric, CachedMultipleNegativesRankingLoss):
        """sentence_transformers' loss: the mean of both directions, its encoder run in mini-batches."""

        def __init__(self, *args: Any, **options: Any) -> None:
            warnings.warn(_CachedSymmetric.__deprecated__, DeprecationWarning, stacklevel=2)
            super().__init__(*args, **options)


class _Product:
    """Cosine similarities by one product of unit embeddings: the library multiplies all pairs by element, [M, N, D]."""

    similarity_fct: Any

    def sim_matrix(self, embed1: Tensor, embed2: Tensor) -> Tensor:
        cosine = self.similarity_fct
        if type(cosine) is not nn.CosineSimilarity or cosine.dim != -1:
            return super().sim_matrix(embed1, embed2)  # type: ignore[misc]
        one, two = (F.normalize(side, dim=-1, eps=cosine.eps) for side in (embed1, embed2))
        return one @ two.mT


def _gist_loss(loss: Any, embeddings: list[Tensor], guide: list[Tensor]) -> Tensor:
    """The mean over anchors of one softmax over the positives, the other anchors, and negatives; and over what each
    anchor's positive finds among the positives. The guide's lists say which of them count."""
    cosine = loss.similarity_fct
    if type(cosine) is not nn.CosineSimilarity or cosine.dim != -1:
        raise NotServed("similarity_fct: not the cosine")
    check_plain(*embeddings, *guide)
    anchors, (guide_anchors, guide_positives) = embeddings[0], guide[:2]
    rows, first = len(anchors), 0
    docs, guide_docs = embeddings[1:], guide[1:]
    if loss.gather_across_devices and torch.distributed.is_available() and torch.distributed.is_initialized():
        docs, guide_docs = ([_util.all_gather_with_grad(side) for side in sides] for sides in (docs, guide_docs))
        first = torch.distributed.get_rank() * rows
    own = torch.arange(first, first + rows, device=anchors.device)
    positives, guide_positives = docs[0], guide_docs[0]
    limits = F.cosine_similarity(guide_anchors, guide_positives[own], dim=-1)
    margin: dict[str, Any] = {"margin": loss.margin, "relative": loss.margin_strategy == "relative"}
    options: dict[str, Any] = {"temperature": loss.temperature, "reduction": "none", "return_lse": True}
    others, guide_others = docs, guide_docs
    if loss.contrast_anchors:
        others, guide_others = [*others, anchors], [*guide_others, guide_anchors]
    found = similar_pairs(guide_anchors, torch.cat(guide_others), targets=own, **margin)
    values, lse, _ = info_nce(anchors, torch.cat(others), targets=own, excluded_pairs=found, **options)
    if loss.contrast_positives:
        found = similar_pairs(guide_positives[own], guide_positives, threshold=limits, **margin)
        among = info_nce(
            positives[own], positives[own], positives, include_positive=False,
            excluded_pairs=found + torch.tensor([0, rows], device=found.device), **options,
        )  # fmt: skip
        values = values + torch.logaddexp(lse, among.lse) - lse
    return values.mean()


class GISTEmbedLoss(_Product, _GIST):
    """sentence_transformers' loss, whose guide says which negatives count, by :func:`fastloss.info_nce`."""

    @hands_on("sentence_transformers.GISTEmbedLoss", _GIST.forward)
    def forward(self, sentence_features: Any, labels: Tensor) -> Tensor:
        features = list(sentence_features)
        if len(features) not in (2, 3):
            raise NotServed(f"{len(features)} columns of sentences")
        seen = [dict(column) for column in features]  # the guide's: models write into what they are given
        embeddings = _embedded(self.model, features)
        with torch.no_grad():
            guide = _embedded(self.guide, [self._for_the_guide(column) for column in seen])
        return _gist_loss(self, embeddings, guide)

    def _for_the_guide(self, column: dict[str, Any]) -> dict[str, Any]:
        """A column's sentences in the guide's own tokens."""
        if not self.must_retokenize:
            return column
        tokens = column["input_ids"]
        if "cu_seq_lens_q" in column:  # all sentences in one row
            ends = column["cu_seq_lens_q"].tolist()
            tokens = [tokens[0, start:end].tolist() for start, end in itertools.pairwise(ends)]
        sentences = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return _util.batch_to_device(self.guide.preprocess(sentences), self.guide.device)


class CachedGISTEmbedLoss(_Product, _CachedGIST):
    """sentence_transformers' loss: :class:`GISTEmbedLoss`, its encoder run in mini-batches."""

    @hands_on("sentence_transformers.CachedGISTEmbedLoss", _CachedGIST.calculate_loss)
    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        if len(reps) != len(reps_guided):
            raise NotServed("reps and reps_guided of different lengths")
        value = _gist_loss(self, *([torch.cat(column) for column in side] for side in (reps, reps_guided)))
        if with_backward:
            value.backward()
            value = value.detach()
        return value


SWAPS = {
    f"{_HOME}.MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
    f"{_HOME}.CachedMultipleNegativesRankingLoss": CachedMultipleNegativesRankingLoss,
    f"{_HOME}.MultipleNegativesSymmetricRankingLoss": MultipleNegativesSymmetricRankingLoss,
    f"{_HOME}.CachedMultipleNegativesSymmetricRankingLoss": CachedMultipleNegativesSymmetricRankingLoss,
    f"{_HOME}.GISTEmbedLoss": GISTEmbedLoss,
    f"{_HOME}.CachedGISTEmbedLoss": CachedGISTEmbedLoss,
}
LEFT: dict[str, str] = {}
