"""CLIP: the symmetric softmax loss of two sets of paired embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..core import Loss, check_reduction, result_dtype
from .checks import across_ranks, as_scalar, check_embeddings, check_flags, check_integers, check_shared
from .clip_groups import GroupedClip, Side, check_paired, grouped_clip_loss
from .groups import GROUPS, check_alone, checked_both
from .options import OPEN_CLIP_NAMES, SCALE_HINTS, ContrastiveOutput, SoftmaxOptions, may_return_lse
from .pairs import checked_pairs
from .query_key_losses import QueryKey, query_key_loss

if TYPE_CHECKING:
    from ..distributed.exchange import Exchange, Group


@may_return_lse(others=OPEN_CLIP_NAMES, hints=SCALE_HINTS)
def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    image_groups: Tensor | None = None,
    text_groups: Tensor | None = None,
    excluded_pairs: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    workspace_mib: float = 256,
    group: Group = None,
    exchange: Exchange | None = None,
) -> Tensor | ContrastiveOutput:
    r"""CLIP's symmetric softmax loss, in open_clip's convention.

    With :math:`s = \mathrm{logit\_scale} \cdot I T^\top + b`, the mean of ``cross_entropy(s, arange(M))`` and
    ``cross_entropy(s.T, arange(M))``.

    With groups (UniCL), for M images and N texts of which several belong together, each image's loss is the mean of its
    cross entropies with the texts of its group, and each text's that with the images of its group; the loss is the mean
    of the M images' mean and the N texts' mean. An image or a text without a positive has loss 0 and counts in the
    mean. Where no group has more than one of each, this is the loss above for the pairs that share a group.

    Args:
        image: embeddings [M, D], float16, bfloat16, float32 or float64. As a keyword also `image_features`.
        text: embeddings [M, D]; row i is the positive of image i. With groups [N, D], N texts in any order. As a
            keyword also `text_features`.
        logit_scale: factor of the similarities, > 0, already exponentiated (``log_scale.exp()``): a number, or a
            one-element tensor, whose gradient is exact.
        logit_bias: added to every logit, a number or a one-element tensor; it cancels in this loss.
        normalize: False, as in open_clip: the embeddings are taken as they are. True: cosine similarity.
        label_smoothing: as in :func:`info_nce`.
        image_ids: integers [M]; a negative pair with equal ids is left out, in both directions.
        text_ids: integers [M]; when only one of the two is given it serves both.
        image_groups: integers [M], any values; not together with ids or `return_lse`. When only one of the two is given
            it serves both.
        text_groups: integers [N].
        excluded_pairs: integers [P, 2], pairs of an image and a text that are no negatives, in both directions, see
            :func:`info_nce`. Not with groups or `group`.
        weights: one weight >= 0 per pair [M], or a bool mask, as in :func:`info_nce`: 0 leaves out both directions of
            the pair, whose embeddings remain negatives of the other pairs (with groups their positives too). With
            groups only for M = N, as is ``reduction="none"``.
        reduction: ``"mean"`` (weighted as in :func:`info_nce`), ``"sum"`` or ``"none"``, over the M pairs, each the
            mean of its two directions.
        return_lse: return ``(loss, lse, top1)`` with [2, M] by-products, see :class:`ContrastiveOutput`.
        workspace_mib: as in :func:`info_nce`.
        group, exchange: a batch whose rows lie on several ranks, as in :func:`info_nce`; `group` is of processes and
            has nothing to do with the groups of images, which may lie on several ranks.

    Returns:
        float32 (float64 for float64 embeddings): a scalar, or [M] for ``"none"``.

    Raises:
        TypeError, ValueError: as :func:`info_nce`; logit_scale <= 0 or not finite.

    Source: Radford et al., "Learning transferable visual models from natural language supervision", 2021; open_clip's
    ``ClipLoss``. With groups Yang et al., "Unified contrastive learning in image-text-label space", 2022.

    Example:
        >>> x = torch.eye(4)
        >>> round(clip_loss(x, x, logit_scale=1.0).item(), 4)
        0.7437
    """
    check_embeddings("image", image)
    normalize, return_lse = check_flags(normalize=normalize, return_lse=return_lse)
    of_groups = check_alone(
        GROUPS, (image_groups, text_groups), image_ids=image_ids is not None, text_ids=text_ids is not None,
        return_lse=return_lse, excluded_pairs=excluded_pairs is not None,
    )  # fmt: skip
    check_embeddings("text", text, image, "image", rows=not of_groups)
    rows = image.shape[0]
    if image_ids is not None:
        image_ids = check_integers("image_ids", image_ids, (rows,), image)
    if text_ids is not None:
        text_ids = check_integers("text_ids", text_ids, (rows,), image)
    workspace_mib, label_smoothing = check_shared(image, weights, workspace_mib, label_smoothing)
    dtype = result_dtype(image, text)
    scale = as_scalar("logit_scale", logit_scale, image, dtype, positive=True)
    bias = None if logit_bias is None else as_scalar("logit_bias", logit_bias, image, dtype, positive=False)
    one, two = checked_both(GROUPS, (image_groups, text_groups), image, text)
    if one is not None and two is not None:
        check_reduction(reduction)
        check_paired(image, text, weights, reduction)
        sides = Side(image, one), Side(text, two)
        grouped = GroupedClip(*sides, scale, bias, weights, normalize, label_smoothing, reduction, workspace_mib)
        if group is None:
            return grouped_clip_loss(grouped)
        from ..distributed import clip_groups

        return clip_groups.clip_loss(grouped, group, exchange)
    form = SoftmaxOptions(symmetric=True, normalize=normalize, label_smoothing=label_smoothing)
    ids = (text_ids if image_ids is None else image_ids, image_ids if text_ids is None else text_ids)
    x = QueryKey(
        image, text, None, None, scale, bias, None, ids, weights, form, reduction, return_lse, workspace_mib,
        checked_pairs(excluded_pairs, None, rows, rows, image, group),
    )  # fmt: skip
    return query_key_loss(x) if group is None else across_ranks().query_key_loss(x, "clip_loss", group, exchange)


class ClipLoss(Loss):
    """Module form of :func:`clip_loss`; `logit_scale` is given here or, as in open_clip, at each call.

    ``ClipLoss()(image, text, logit_scale, logit_bias=None)`` or ``ClipLoss(logit_scale=100.0)(image, text)``.
    """

    fn = staticmethod(clip_loss)
    at_call = ("logit_scale", "logit_bias")
