"""SigLIP's pairwise sigmoid loss: the op, which makes the gradients in the forward, and the public function.

    s_ij = scale c(image_i) c(text_j) <image_i, text_j> + bias      c(x) = 1 / |x| with `normalize` (0 for zero vectors)
    x_ij = -s_ii for i = j, s_ij elsewhere (with `negative_only` everywhere); pairs i != j with equal ids are left out
    loss_i = sum_j l_ij, l_ij = log(1 + e^x_ij)          [M], or with `row_weight` w the scalar sum_i w_i loss_i

With shares the pairs of equal ids are the positives instead, any number in a row, with p_ij = image_shares_i +
text_shares_j in [0, 1]; all others are negatives:

    x_ij = -s_ij, l_ij = p_ij log(1 + e^x_ij)                with `soft_labels` + (1 - p_ij) log(1 + e^s_ij)

    H_ij = w_i (dl_ij / ds_ij) scale c(image_i) c(text_j)
    dl_ij / ds_ij = (dx_ij / ds_ij) sigmoid(x_ij), of positives with shares -p_ij sigmoid(x_ij) or, soft,
                    1 - p_ij - sigmoid(x_ij)
    v = H text           d image_i = v_i - c(image_i)^2 <image_i, v_i> image_i, without `normalize` v_i; texts alike
    d scale = sum_i <image_i, v_i> / scale      d bias = sum_ij w_i dl_ij / ds_ij

H needs no normaliser: with `row_weight` one pass makes loss and gradients, three products of U = 2 M N D FLOP, and the
backward multiplies them by its one upstream number. Without `row_weight` the backward does that pass with its upstream
gradient as the weight, 4 U. `needs` says what the forward must make: bit 0 the images' gradient, bit 1 that of the
texts, bit 2 those of scale and bias. Image and text are float32, bfloat16 or float16, the rest is float32, ids are
int64, scale and bias have one element. The gradients are kept in float32, so that a loss scale reaches them before
they are rounded. Where image and text are bfloat16 and the CPU multiplies pairs of those with float32 sums, products
are made so, with H rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Loss, Op, check_not_empty, check_reduction, full_precision, reduce_rows, result_dtype, row_shares
from ..core.entry import public_function
from ..core.traced import filled
from .checks import (
    across_ranks,
    as_scalar,
    check_embeddings,
    check_flags,
    check_shared,
    counted,
    dropped_rows,
    without,
)
from .embeddings import embed
from .groups import GROUPS, check_alone, checked_both, sizes
from .options import OPEN_CLIP_NAMES, SCALE_HINTS
from .save_plan import IMAGE, SCALE_AND_BIAS, TEXT

if TYPE_CHECKING:
    from ..distributed.exchange import Exchange, Group


class Inputs(NamedTuple):
    """Of the op; what each is stands above."""

    image: Tensor  # [M, D]
    text: Tensor  # [N, D]
    scale: Tensor  # [1]
    bias: Tensor  # [1]
    image_ids: Tensor | None  # [M], or None together with text_ids
    text_ids: Tensor | None  # [N]
    image_shares: Tensor | None  # [M], or None together with text_shares; ids are there then, negative_only is not
    text_shares: Tensor | None  # [N]
    row_weight: Tensor | None  # [M]; None: the losses of rows are returned
    normalize: bool
    negative_only: bool
    soft_labels: bool
    needs: int
    workspace_mib: float


class Saved(NamedTuple):
    """The gradients of the reduced loss, in float32; empty where `needs` does not ask for them."""

    image_grad: Tensor  # [M, D]
    text_grad: Tensor  # [N, D]
    scale_grad: Tensor  # [1]
    bias_grad: Tensor  # [1]


class Grads(NamedTuple):
    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


class Needs(NamedTuple):
    image: bool
    text: bool
    scale: bool
    bias: bool


def _grouped(logits: Tensor, positive: Tensor, share: Tensor, soft_labels: bool) -> Tensor:
    """The losses of pairs [M, N] with shares."""
    pairs = -F.logsigmoid(torch.where(positive, logits, -logits))
    weighted = share * pairs
    if soft_labels:
        weighted = weighted - (1 - share) * F.logsigmoid(-logits)
    return torch.where(positive, weighted, pairs)


def siglip_reference(x: Inputs) -> Tensor:
    """The loss in dense differentiable torch."""
    dtype = result_dtype(x.image, x.text)
    logits = embed(x.image, dtype, x.normalize) @ embed(x.text, dtype, x.normalize).T * x.scale + x.bias
    similar = None
    if x.image_ids is not None and x.text_ids is not None:
        similar = x.image_ids[:, None] == x.text_ids
    if x.image_shares is not None and x.text_shares is not None:
        assert similar is not None
        losses = _grouped(logits, similar, x.image_shares[:, None] + x.text_shares, x.soft_labels).sum(1)
    else:
        row, column = (torch.arange(n, device=logits.device) for n in logits.shape)
        positive = (row[:, None] == column) & (not x.negative_only)
        pairs = -F.logsigmoid(torch.where(positive, logits, -logits))
        if similar is not None:
            pairs = torch.where(positive | ~similar, pairs, torch.zeros_like(pairs))
        losses = pairs.sum(1)
    return losses if x.row_weight is None else (losses * x.row_weight).masked_fill(x.row_weight == 0, 0.0).sum()


def _siglip_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    rows, dim, columns = *x.image.shape, x.text.shape[0]
    needs = 0 if x.row_weight is None else x.needs
    return x.scale.new_empty(rows if x.row_weight is None else ()), Saved(
        image_grad=x.scale.new_empty(rows if needs & IMAGE else 0, dim),
        text_grad=x.scale.new_empty(columns if needs & TEXT else 0, dim),
        scale_grad=x.scale.new_empty(1 if needs & SCALE_AND_BIAS else 0),
        bias_grad=x.scale.new_empty(1 if needs & SCALE_AND_BIAS else 0),
    )


def _siglip_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    return Grads(
        image=x.image.new_empty(x.image.shape if needs.image else 0),
        text=x.text.new_empty(x.text.shape if needs.text else 0),
        scale=x.scale.new_empty(1 if needs.scale else 0),
        bias=x.scale.new_empty(1 if needs.bias else 0),
    )


siglip = Op(
    "siglip",
    fwd=_siglip_fwd,
    bwd=_siglip_bwd,
    reference=siglip_reference,
    grads=Grads._fields,
    outputs=("loss", *Saved._fields),
    triton="contrastive.kernels.siglip",
)


def loss_and_gradients(x: Inputs) -> tuple[Tensor, Saved]:
    """What the op's forward makes, by whatever backend: of the reference the gradients that `needs` asks for too."""
    if siglip.backend(*x) != "reference":
        loss, *saved = siglip.outputs_of(x)
        return loss, Saved(*saved)
    needs = 0 if x.row_weight is None else x.needs
    asked = {
        "image": needs & IMAGE,
        "text": needs & TEXT,
        "scale": needs & SCALE_AND_BIAS,
        "bias": needs & SCALE_AND_BIAS,
    }
    leaves = {name: getattr(x, name).detach().requires_grad_() for name, flag in asked.items() if flag}
    with torch.set_grad_enabled(bool(leaves)):
        loss = siglip_reference(x._replace(**leaves))
    grads = torch.autograd.grad(loss, list(leaves.values())) if leaves else ()
    found = dict(zip(leaves, grads, strict=True))
    return loss.detach(), Saved(*[found.get(name, loss.new_empty(0)) for name in asked])


def _row_weight(weights: Tensor | None, reduction: str, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What each row counts in the reduced loss; None where rows are returned."""
    if reduction == "none":
        return None
    rows = like.shape[0]
    if weights is None:
        return filled((rows,), 1.0 / rows if reduction == "mean" else 1.0, dtype, like.device)
    return row_shares(weights, reduction, dtype)


class Groups(NamedTuple):
    """Whose pairs are the positives, and what these weigh."""

    of_images: Tensor  # [M] int64
    of_texts: Tensor  # [N] int64
    symmetric: bool
    soft_labels: bool

    def shares(self, counted: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What of a positive's weight comes from its image [M] and from its text [N].

        Only the `counted` images [M] (bool; None: all) count in their groups.
        """
        texts = sizes(self.of_images, self.of_texts)
        images = sizes(self.of_texts, self.of_images, counted)
        half = 0.5 if self.symmetric else 1.0
        of_texts = half / images.clamp_min(1).to(dtype)
        return half / texts.clamp_min(1).to(dtype), of_texts if self.symmetric else torch.zeros_like(of_texts)


class SigLip(NamedTuple):
    """The checked arguments of :func:`siglip_loss`."""

    image: Tensor  # [M, D]
    text: Tensor  # [N, D]
    scale: Tensor | float
    bias: Tensor | float
    ids: tuple[Tensor | None, Tensor | None]  # the images' and the texts', both or neither
    weights: Tensor | None  # [M]
    normalize: bool
    negative_only: bool
    reduction: str
    workspace_mib: float
    groups: Groups | None = None  # where there are some, there are no ids


@public_function(others=OPEN_CLIP_NAMES, hints=SCALE_HINTS)
def siglip_loss(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    normalize: bool = False,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    image_groups: Tensor | None = None,
    text_groups: Tensor | None = None,
    symmetric: bool = True,
    soft_labels: bool = False,
    weights: Tensor | None = None,
    negative_only: bool = False,
    reduction: str = "mean",
    workspace_mib: float = 256,
    group: Group = None,
    exchange: Exchange | None = None,
) -> Tensor:
    r"""SigLIP's pairwise sigmoid loss.

    With :math:`s_{ij} = \mathrm{logit\_scale} \langle I_i, T_j \rangle + b` and z = 1 for i = j, -1 otherwise:
    :math:`-\frac{1}{M} \sum_{ij} \log \sigma(z_{ij} s_{ij})`.

    With groups (SigLIP+), for images with several captions: z = 1 where image and text are of one group. Of a positive
    pair, k texts are in the image's group and k' images in the text's, and its share is p = 1 / (2 k) + 1 / (2 k') or,
    without `symmetric`, 1 / k::

        soft_labels=False   -p log sigmoid(s)                       a weight: each image's positives weigh one together
        soft_labels=True    -p log sigmoid(s) - (1 - p) log sigmoid(-s)      a label between the two

    Where no group has more than one image and one text, this is the loss above for the pairs that share a group. An
    image without a text of its group has negatives only, and so has a text without an image.

    Args:
        image: embeddings [M, D], float16, bfloat16, float32 or float64. As a keyword also `image_features`.
        text: embeddings [M, D]; row i is the positive of image i. With groups [N, D], N texts in any order. As a
            keyword also `text_features`.
        logit_scale: factor of the similarities, > 0, already exponentiated: a number, or a one-element tensor, whose
            gradient is exact.
        logit_bias: added to every logit: a number, a one-element tensor with gradient, or None for 0.
        normalize: False: the embeddings are taken as they are. True: cosine similarity.
        image_ids: integers [M]; a negative pair with equal ids is left out.
        text_ids: integers, one per text; when only one of the two is given it serves both.
        image_groups: integers [M], any values; not together with ids or `negative_only`. When only one of the two is
            given it serves both.
        text_groups: integers [N].
        symmetric: with groups, see above: whether a positive's share is the mean over both directions.
        soft_labels: with groups, see above.
        weights: one weight >= 0 per image [M], or a bool mask (True counts); no gradient. An image of weight 0 is left
            out, be it NaN, and of its group too; its text remains a negative of the other images.
        negative_only: every pair is a negative one, the diagonal too (texts of another device); `text` may then have
            any number of rows.
        reduction: over images, each with the sum over its texts: ``"mean"`` (weighted as in :func:`info_nce`),
            ``"sum"`` or ``"none"``.
        workspace_mib: bound of the kernels' workspace in MiB, > 0. The reference is dense and holds [M, M].
        group, exchange: a batch whose pairs lie on several ranks, as in :func:`info_nce`; `group` is of processes and
            has nothing to do with the groups of images, which may lie on several ranks.

    Returns:
        float32 (float64 for float64 embeddings): a scalar, or [M] for ``"none"``.

    Raises:
        TypeError: an argument of the wrong type. ValueError: shapes, devices or options do not fit, logit_scale <= 0 or
            not finite, ``"mean"`` of an empty batch.

    Source: Zhai et al., "Sigmoid loss for language image pre-training", 2023; open_clip's ``SigLipLoss``. With groups
    siglip-kernel's ``fused_siglip_plus_loss``, whose value is this one divided by N.

    Example:
        >>> loss = siglip_loss(torch.zeros(2, 3), torch.zeros(2, 3), logit_scale=10.0, logit_bias=0.0)
        >>> round(loss.item(), 4)  # 2 log 2
        1.3863
    """
    check_embeddings("image", image)
    normalize, negative_only, symmetric, soft_labels = check_flags(
        normalize=normalize, negative_only=negative_only, symmetric=symmetric, soft_labels=soft_labels
    )
    grouped = check_alone(
        GROUPS, (image_groups, text_groups), negative_only=negative_only, image_ids=image_ids is not None,
        text_ids=text_ids is not None,
    )  # fmt: skip
    check_embeddings("text", text, image, "image", rows=not (negative_only or grouped))
    ids = checked_both(("image_ids", "text_ids"), (image_ids, text_ids), image, text)
    one, two = checked_both(GROUPS, (image_groups, text_groups), image, text)
    groups = None if one is None or two is None else Groups(one, two, symmetric, soft_labels)
    workspace_mib, _ = check_shared(image, weights, workspace_mib)
    dtype = result_dtype(image, text)
    scale = as_scalar("logit_scale", logit_scale, image, dtype, positive=True)
    bias = as_scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image, dtype, positive=False)
    check_reduction(reduction)
    if reduction == "mean" and group is None:
        check_not_empty(image.shape[0])
    x = SigLip(image, text, scale, bias, ids, weights, normalize, negative_only, reduction, workspace_mib, groups)
    return checked_siglip_loss(x) if group is None else across_ranks().siglip_loss(x, group, exchange)


def checked_siglip_loss(
    x: SigLip,
    shares: tuple[Tensor | None, Tensor | None] = (None, None),
    across_ranks: Callable[[Inputs], Tensor] | None = None,
) -> Tensor:
    """`shares`, of images and texts, where the groups of other ranks count too; else the groups' own. `across_ranks` is
    the op where the texts of other ranks count too; `x` has what there is of texts but the embeddings of all ranks."""
    dtype = result_dtype(x.image, x.text)
    dropped = dropped_rows(x.weights)
    ids, soft_labels = x.ids, False
    if x.groups is not None:
        ids, soft_labels = (x.groups.of_images, x.groups.of_texts), x.groups.soft_labels
        if shares[0] is None:
            shares = x.groups.shares(None if dropped is None else ~dropped, dtype)
    image, text = without(x.image, dropped), x.text if across_ranks is not None else counted(x.text, dropped)
    with full_precision(image):
        row_weight = _row_weight(x.weights, x.reduction, image, dtype)
        scale, bias = (
            v.reshape(1) if isinstance(v, Tensor) else filled((1,), v, dtype, image.device) for v in (x.scale, x.bias)
        )
        needs = 0
        if torch.is_grad_enabled() and row_weight is not None:
            numbers = scale.requires_grad or bias.requires_grad
            needs = IMAGE * image.requires_grad + TEXT * text.requires_grad + SCALE_AND_BIAS * numbers
        inputs = Inputs(
            image, text, scale, bias, *ids, *shares, row_weight, x.normalize, x.negative_only, soft_labels, needs,
            x.workspace_mib,
        )  # fmt: skip
        out = siglip(*inputs) if across_ranks is None else across_ranks(inputs)
    return out if row_weight is not None else reduce_rows(out, x.weights, x.reduction)


class SigLipLoss(Loss):
    """Module form of :func:`siglip_loss`; `logit_scale` and `logit_bias` are given here or at each call.

    ``SigLipLoss()(image, text, logit_scale, logit_bias)`` as in open_clip.
    """

    fn = staticmethod(siglip_loss)
    at_call = ("logit_scale", "logit_bias")
