"""InfoNCE: the softmax contrastive loss between two sets of embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core import Loss, result_dtype
from ..core.checks import check_choice, check_flag, check_no_graph, check_number, check_same_device, check_tensor
from .checks import (
    across_ranks,
    as_scalar,
    check_embeddings,
    check_flags,
    check_integers,
    check_negatives,
    check_negatives_mask,
    check_sampling,
    check_shared,
    check_targets,
    scale_of,
)
from .options import (
    SAMPLING_HINTS,
    TEMPERATURE_HINTS,
    ContrastiveOutput,
    NegativeSampling,
    SoftmaxOptions,
    may_return_lse,
)
from .pairs import checked_pairs
from .query_key_losses import QueryKey, query_key_loss
from .several_positives import POSITIVES, check_several, several_positives_loss

if TYPE_CHECKING:
    from ..distributed.exchange import Exchange, Group


@may_return_lse(others={"positive_key": "key", "negative_keys": "negatives"}, hints=SAMPLING_HINTS | TEMPERATURE_HINTS)
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    negatives_mask: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    include_positive: bool = True,
    symmetric: bool = False,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    bias: float | Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    in_batch: bool | None = None,
    return_lse: bool = False,
    workspace_mib: float = 256,
    targets: Tensor | None = None,
    positives: str = "mean",
    sampling: NegativeSampling | None = None,
    excluded_pairs: Tensor | None = None,
    negative_pairs: Tensor | None = None,
    group: Group = None,
    exchange: Exchange | None = None,
) -> Tensor | ContrastiveOutput:
    r"""InfoNCE: each query must pick its own key out of the candidates.

    `negatives` that are given **replace** the in-batch ones; ``in_batch=True`` has both. Without them the other keys of
    the batch are the negatives.

    With :math:`s_{ij} = \mathrm{sim}(q_i, k_j) / \tau + b_j`, the positive :math:`p` and the negatives :math:`A_i`::

        include_positive=True    -log( exp(s_ip) / (exp(s_ip) + sum_{j in A_i} exp(s_ij)) )
        include_positive=False   -log( exp(s_ip) / sum_{j in A_i} exp(s_ij) )                 decoupled, may be negative

    A row that has no negatives left has loss 0 and gradient 0, and counts in the mean.

    Args:
        query: embeddings [M, D], float16, bfloat16, float32 or float64.
        key: embeddings [N, D]; row i is the positive of query i, or row ``targets[i]``.
        negatives: [K, D], shared by all rows, or [M, K, D], per row; see above. Gradients flow to all three.
        negatives_mask: bool [M, K] beside negatives [M, K, D], True for those that count: lists of unequal lengths
            come padded. Nothing is read of the others, be it NaN; their gradient is 0.
        temperature: number > 0, or a one-element tensor (its gradient is exact, its value is not looked at).
        include_positive: see above; False is the decoupled form, the sum over negatives only.
        symmetric: mean of the loss above and that of the keys against the queries; M = N, in-batch, no `targets`.
        normalize: cosine similarity; zero vectors have similarity 0 and gradient 0. False: plain dot products.
        label_smoothing: share in [0, 1] of the target spread evenly over the positive and its negatives.
        bias: added to the logits: a number, a one-element tensor, or one value per key [N] (with shared negatives
            [N + K]), such as a log sampling probability. Gradients flow to it.
        query_ids: integers [M]. A negative whose id equals the query's is a false negative and left out.
        key_ids: integers [N], or [N + K] with shared `negatives`. With M = N and no `targets` one of the two will do.
        weights: one weight >= 0 per row [M], or a bool mask, no gradient. 0 leaves the row out, be it NaN; its key
            stays a negative of the others, and so does its query with `symmetric`, which both directions leave out.
        reduction: ``"mean"`` (weighted: sum / sum of weights, 0 if that is 0), ``"sum"``, ``"none"``: weighted [M].
        in_batch: whether the other keys are negatives; None: only when `negatives` is None.
        return_lse: return ``(loss, lse, top1)``, see :class:`ContrastiveOutput`.
        workspace_mib: bound of the kernels' workspace in MiB, > 0, for any M, N, K; the reference holds [M, N + K].
        targets: integers [M], the positive of each query as an index into `key`; None: its own row, with N >= M.
            [M, P] for several positives, -1 where a query has fewer, repeated ones counting once: each takes part in
            the denominator, and a query without any has loss 0. They want `include_positive` and [M, P, D] numbers,
            and take no `symmetric`, ids, listed pairs, `sampling`, `return_lse` or `group`.
        positives: of several positives ``"mean"``, the mean of the negative log-probabilities (SupCon), or ``"sum"``,
            the negative log of their summed probability (MIL-NCE).
        sampling: debiased, hardness-weighted or margin-filtered negatives, see :class:`NegativeSampling`.
        excluded_pairs: integers [P, 2], pairs of a query and of a column that are no negatives, in any order, repeated
            ones counting once: columns are the keys, 0 to N - 1, and shared `negatives`, N to N + K - 1. A query's
            positive stays. No [M, N] mask is made of them; :func:`similar_pairs` makes such a list from the embeddings
            of another model. With `symmetric` both directions leave a pair out. Not with `group`.
        negative_pairs: integers [P, 2], the only pairs that are negatives, e.g. those that a miner chose.
        group: None, or a ProcessGroup or 1-D DeviceMesh whose ranks together have the batch: tensors are this rank's
            share (`targets` index its own keys), the loss is that of the whole batch, on every rank.
        exchange: how the ranks exchange their rows, see :class:`fastloss.Exchange`; without a group it does nothing.

    Returns:
        float32 (float64 for float64 embeddings): a scalar, or [M] for ``"none"``.

    Raises:
        TypeError, ValueError: types, shapes, devices or options that do not fit, targets out of range (on the CPU; on a
            GPU an assertion of the device), ``"mean"`` of an empty batch.

    Source: van den Oord et al., "Contrastive predictive coding", 2018; Yeh et al., "Decoupled contrastive learning";
    several positives: Khosla et al., "Supervised contrastive learning", 2020 (L_out); Miech et al., "End-to-end
    learning of visual representations from uncurated instructional videos", 2020 (MIL-NCE).

    Example:
        >>> loss = info_nce(torch.eye(4), torch.eye(4), temperature=1.0)  # log(e + 3) - 1
        >>> round(loss.item(), 4)
        0.7437
    """
    include_positive, symmetric, normalize, return_lse = check_flags(
        include_positive=include_positive, symmetric=symmetric, normalize=normalize, return_lse=return_lse
    )
    in_batch, targets, columns = _candidates(query, key, negatives, in_batch, symmetric, targets)
    if negatives_mask is not None:
        negatives_mask = check_negatives_mask(negatives_mask, negatives)
    ids = _ids(query_ids, key_ids, query, key, columns, targets is None)
    pairs = checked_pairs(excluded_pairs, negative_pairs, query.shape[0], columns, query, group)
    if pairs is not None and not in_batch and negatives is not None and negatives.ndim == 3:
        raise ValueError("excluded_pairs, negative_pairs: expected shared negatives; of [M, K, D] use negatives_mask")
    check_choice("positives", positives, POSITIVES)
    check_sampling(sampling, normalize, bias)
    workspace_mib, label_smoothing = check_shared(query, weights, workspace_mib, label_smoothing)
    scale, offset = _scale_and_bias(temperature, bias, query, key, negatives, columns)
    form = SoftmaxOptions(include_positive, symmetric, normalize, label_smoothing, in_batch, sampling)
    x = QueryKey(
        query, key, negatives, negatives_mask, scale, offset, targets, ids, weights, form, reduction, return_lse,
        workspace_mib, pairs,
    )  # fmt: skip
    if targets is not None and targets.ndim == 2:
        check_several(x, group)
        return several_positives_loss(x, targets, positives)
    return query_key_loss(x) if group is None else across_ranks().query_key_loss(x, "info_nce", group, exchange)


def _candidates(
    query: Any, key: Any, negatives: Any, in_batch: bool | None, symmetric: bool, targets: Any
) -> tuple[bool, Tensor | None, int]:
    """Checks the embeddings; whether the other keys are negatives, the targets, and the number of shared columns."""
    check_embeddings("query", query)
    check_embeddings("key", key, query, "query")
    rows, keys = query.shape[0], key.shape[0]
    if negatives is not None:
        check_negatives(negatives, query)
    in_batch = _in_batch(in_batch, negatives)
    if symmetric:
        _check_symmetric(rows, keys, targets, in_batch)
    if targets is not None:
        targets = check_targets(targets, rows, keys, query)
    elif keys < rows:
        raise ValueError(f"key: expected at least query's {rows} rows when targets is None, got {keys}")
    shared = negatives.shape[0] if negatives is not None and negatives.ndim == 2 else 0
    return in_batch, targets, keys + shared


def _in_batch(in_batch: Any, negatives: Tensor | None) -> bool:
    if in_batch is None:
        return negatives is None
    in_batch = check_flag("in_batch", in_batch)
    if not in_batch and negatives is None:
        raise ValueError("in_batch: False leaves no negatives; pass `negatives` too")
    return in_batch


def _check_symmetric(rows: int, keys: int, targets: Any, in_batch: bool) -> None:
    if rows != keys or targets is not None:
        raise ValueError(
            f"symmetric: expected as many keys as queries and no targets, got {rows} queries, {keys} keys"
            + (", and targets" if targets is not None else "")
        )
    if not in_batch:
        raise ValueError("symmetric: the keys' direction has in-batch negatives only; pass in_batch=True")


def _ids(
    query_ids: Tensor | None, key_ids: Tensor | None, query: Tensor, key: Tensor, columns: int, diagonal: bool
) -> tuple[Tensor | None, Tensor | None]:
    rows, keys = query.shape[0], key.shape[0]
    if query_ids is not None:
        query_ids = check_integers("query_ids", query_ids, (rows,), query)
    if key_ids is not None:
        key_ids = check_integers("key_ids", key_ids, (keys, columns), query)
    if (query_ids is None) == (key_ids is None):
        return query_ids, key_ids
    if rows != keys or not diagonal:
        missing = "key_ids" if key_ids is None else "query_ids"
        raise ValueError(f"{missing}: expected it beside the other ids, as queries and keys are not paired one to one")
    return (query_ids, query_ids) if key_ids is None else (key_ids[:rows], key_ids)


def _scale_and_bias(
    temperature: Any, bias: Any, query: Tensor, key: Tensor, negatives: Tensor | None, columns: int
) -> tuple[Tensor | float, Tensor | float | None]:
    """The factor of the similarities, and what is added: one number for all, one per shared column, or nothing."""
    dtype = result_dtype(query, key, negatives)
    scale = scale_of(temperature, query, dtype)
    if bias is None:
        return scale, None
    per_sample = negatives is not None and negatives.ndim == 3
    columnwise = isinstance(bias, Tensor) and bias.ndim > 0 and (bias.numel() != 1 or (columns == 1 and not per_sample))
    if not columnwise:
        return scale, as_scalar("bias", bias, query, dtype, positive=False)
    check_tensor("bias", bias)
    if bias.shape != (columns,) or per_sample:
        wanted = "one element (per-sample negatives have no columns)" if per_sample else f"one element or [{columns}]"
        raise ValueError(f"bias: expected a number or a tensor of {wanted}, got shape {tuple(bias.shape)}")
    check_same_device("query", query, "bias", bias)
    return scale, bias.to(dtype)


class InfoNCELoss(Loss):
    """Module form of :func:`info_nce`. A `temperature` given as a Parameter is learned; keep it > 0."""

    fn = staticmethod(info_nce)


class ContrastiveLoss(Loss):
    r"""The contrastive loss of a text-to-image training loop: :func:`info_nce` of texts against images.

    ``ContrastiveLoss(temp=0.1)(text_emb, image_emb, negative_embs=None)`` with text_emb and image_emb [M, D] and
    negative_embs [K, D] (shared) or [M, K, D] (per text), which **replace** the other images of the batch as negatives
    (``in_batch=True``: both); None: the other images are the negatives.

    Args:
        temp: temperature, a number > 0 or a one-element tensor; a Parameter is learned.
        **options: those of :func:`info_nce`, e.g. ``include_positive=False``, the sum over negatives only.

    Example:
        >>> loss = ContrastiveLoss(temp=0.1)(torch.eye(4), torch.eye(4))
    """

    fn = staticmethod(info_nce)

    def __init__(self, temp: float | Tensor = 0.1, **options: Any) -> None:
        for name in ("temperature", "tau"):
            if name in options:
                raise TypeError(f"ContrastiveLoss: the option is called temp here, got {name!r}")
        check_no_graph(type(self).__name__, "temp", temp)
        if not isinstance(temp, Tensor):
            temp = check_number("temp", temp, 0, open_low=True)
        super().__init__(temperature=temp, **options)

    def extra_repr(self) -> str:
        return super().extra_repr().replace("temperature=", "temp=", 1)

    @property
    def temp(self) -> float | Tensor:
        return self.temperature

    @temp.setter
    def temp(self, value: float | Tensor) -> None:
        self.temperature = value

    def forward(
        self, text_emb: Tensor, image_emb: Tensor, negative_embs: Tensor | None = None, **overrides: Any
    ) -> Tensor | ContrastiveOutput:
        return super().forward(text_emb, image_emb, negative_embs, **overrides)
