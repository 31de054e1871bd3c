"""Supervised (SupCon) and two-view (NT-Xent) contrastive losses."""

from __future__ import annotations

from torch import Tensor

from ..core import Loss, full_precision, result_dtype
from ..inference import takes_inference_tensors
from .contrastive_checks import (
    check_embeddings,
    check_flags,
    check_integers,
    check_sampling,
    check_shared,
    excluded,
    finish,
    inverse,
)
from .contrastive_forms import nt_xent_rows, supcon_rows
from .contrastive_reference import (
    ContrastiveOutput,
    NegativeSampling,
    SoftmaxForm,
)


@takes_inference_tensors
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    include_positive: bool = True,
    normalize: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    workspace_mib: float = 256,
) -> Tensor | ContrastiveOutput:
    r"""Supervised contrastive loss: all other rows of a row's class are its positives.

    With :math:`s_{ij} = \mathrm{sim}(f_i, f_j) / \tau` and :math:`P_i` the other rows with row i's label::

        include_positive=True    -mean_{p in P_i} log( exp(s_ip) / sum_{j != i} exp(s_ij) )
        include_positive=False   the sum runs over the rows with another label only; may be negative

    A row without a positive, or with nothing in its sum, has loss 0 and gradient 0, and counts in the mean.

    Args:
        features: embeddings [M, D], float16, bfloat16, float32 or float64; several views of a sample are several rows.
        labels: integers [M], any values.
        temperature: number > 0, or a one-element tensor (its gradient is exact, its value is not looked at).
        include_positive: see above.
        normalize: cosine similarity; zero vectors have similarity 0 and gradient 0. False: plain dot products.
        weights: one weight >= 0 per row [M], or a bool mask, as in :func:`info_nce`; a row of weight 0 remains a
            positive or negative of the others.
        reduction: ``"mean"`` (weighted as in :func:`info_nce`), ``"sum"`` or ``"none"``, over rows.
        return_lse: return ``(loss, lse, top1)``, see :class:`ContrastiveOutput`; top1: a positive is the nearest row.
        workspace_mib: as in :func:`info_nce`.

    Returns:
        float32 (float64 for float64 features): a scalar, or [M] for ``"none"``.

    Raises:
        TypeError: an argument of the wrong type. ValueError: shapes, devices or options do not fit, temperature <= 0 or
            not finite, ``"mean"`` of an empty batch.

    Source: Khosla et al., "Supervised contrastive learning", 2020, its L_out without the factor temperature /
    base_temperature; pytorch-metric-learning's ``SupConLoss`` (which averages over rows of non-zero loss only).

    Example:
        >>> loss = supcon_loss(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))
        >>> round(loss.item(), 4)  # log 3
        1.0986
    """
    check_embeddings("features", features)
    labels = check_integers("labels", labels, (features.shape[0],), features)
    include_positive, normalize, return_lse = check_flags(
        include_positive=include_positive, normalize=normalize, return_lse=return_lse
    )
    workspace_mib, _ = check_shared(features, weights, workspace_mib)
    scale = inverse(temperature, features, result_dtype(features))
    with full_precision(features):
        out = supcon_rows(
            features, labels, scale, include_positive, normalize, return_lse, workspace_mib, excluded(weights)
        )
    return finish(out, weights, reduction, return_lse)


@takes_inference_tensors
def nt_xent_loss(
    view_a: Tensor,
    view_b: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    include_positive: bool = True,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    sampling: NegativeSampling | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    workspace_mib: float = 256,
) -> Tensor | ContrastiveOutput:
    r"""NT-Xent (SimCLR): every view must find the other view of its sample among all 2M - 1 other views.

    :func:`info_nce` of the 2M rows ``cat(view_a, view_b)`` against themselves without the diagonal; the positive of row
    i is row i + M, and the other way round.

    Args:
        view_a: embeddings [M, D], float16, bfloat16, float32 or float64.
        view_b: embeddings [M, D] of the same samples.
        temperature: number > 0, or a one-element tensor (its gradient is exact, its value is not looked at).
        include_positive: False leaves the positive out of the sum (decoupled contrastive learning).
        normalize: cosine similarity; zero vectors have similarity 0 and gradient 0. False: plain dot products.
        label_smoothing: as in :func:`info_nce`.
        ids: integers [M]; samples with equal ids are no negatives of each other.
        sampling: as in :func:`info_nce`.
        weights: one weight >= 0 per sample [M], or a bool mask, as in :func:`info_nce`; both views of the sample get
            it, and remain negatives of the others.
        reduction: ``"mean"`` (weighted as in :func:`info_nce`), ``"sum"`` or ``"none"``, over the 2M rows.
        return_lse: return ``(loss, lse, top1)`` with [2M] by-products, see :class:`ContrastiveOutput`.
        workspace_mib: as in :func:`info_nce`.

    Returns:
        float32 (float64 for float64 embeddings): a scalar, or [2M] for ``"none"``, view_a's rows first.
        A row without negatives (M = 1) has loss 0 and gradient 0.

    Raises:
        TypeError: an argument of the wrong type. ValueError: shapes, devices or options do not fit, temperature <= 0 or
            not finite, ``"mean"`` of an empty batch.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", 2020.

    Example:
        >>> x = torch.eye(2)
        >>> round(nt_xent_loss(x, x, temperature=1.0).item(), 4)  # log(e + 2) - 1
        0.5514
    """
    check_embeddings("view_a", view_a)
    check_embeddings("view_b", view_b, view_a, "view_a", rows=True)
    include_positive, normalize, return_lse = check_flags(
        include_positive=include_positive, normalize=normalize, return_lse=return_lse
    )
    rows = view_a.shape[0]
    if ids is not None:
        ids = check_integers("ids", ids, (rows,), view_a)
    check_sampling(sampling, normalize)
    workspace_mib, label_smoothing = check_shared(view_a, weights, workspace_mib, label_smoothing)
    scale = inverse(temperature, view_a, result_dtype(view_a, view_b))
    form = SoftmaxForm(include_positive, False, normalize, label_smoothing, True, sampling)
    both = None if weights is None else weights.repeat(2)
    with full_precision(view_a):
        out = nt_xent_rows(view_a, view_b, scale, ids, form, workspace_mib, excluded(both))
    return finish(out, both, reduction, return_lse)


class SupConLoss(Loss):
    """Module form of :func:`supcon_loss`."""

    fn = staticmethod(supcon_loss)


class NTXentLoss(Loss):
    """Module form of :func:`nt_xent_loss`."""

    fn = staticmethod(nt_xent_loss)
