"""The contrastive losses of a batch whose rows lie on several ranks.

Each rank computes the losses of its own rows against the columns of all ranks, in the family's own ops, and their sum
is the loss. The columns come with this rank's own first, so that a row's positive stands where it does on one
rank. A loss of two directions has both from the same similarities (:mod:`once`); with a margin it gathers both sides
and computes each direction as a loss of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contrastive import query_key_losses
from ..contrastive.checks import dropped_rows, reduce_output
from ..contrastive.nt_xent import nt_xent_rows
from ..contrastive.options import Columns, ContrastiveOutput, SoftmaxOptions
from ..contrastive.query_key_losses import QueryKey
from ..contrastive.siglip import SigLip, checked_siglip_loss
from ..contrastive.supcon import supcon_rows
from ..core import check_reduction, full_precision, result_dtype
from .collectives import Counts
from .once import both_directions
from .ranks import Ranks, needs, process_group


def query_key_loss(x: QueryKey, loss: str, group: Any, exchange: Any) -> Tensor | ContrastiveOutput:
    """InfoNCE and CLIP."""
    check_reduction(x.reduction)
    ranks = Ranks.of(group, exchange)
    if ranks.size == 1:
        return query_key_losses.query_key_loss(x)
    own = _parts(x, ranks)
    travels = _travelling(own, x, ranks)
    sizes = {"query": x.query.shape[0], "key": x.key.shape[0]}
    if "negatives" in travels:
        sizes["negatives"] = travels["negatives"].shape[0]
    form = x.form
    same: dict[str, Any] = {
        "loss": loss, "include_positive": form.include_positive, "symmetric": form.symmetric,
        "normalize": form.normalize, "in_batch": form.in_batch, "reduction": x.reduction, "return_lse": x.return_lse,
        "weights": x.weights is not None, "targets": x.targets is not None,
        "gradients of": needs(query=x.query, key=x.key, negatives=x.negatives, scale=x.scale, bias=x.bias),
    }  # fmt: skip
    numbers = {"label_smoothing": form.label_smoothing, "sampling": form.sampling, **_floats(x.scale, x.bias)}
    gathered, counts = ranks.meet(same, numbers, sizes, travels)
    dtype = result_dtype(x.query, x.key, x.negatives)
    weights = ranks.shares(x.weights, x.reduction, dtype, counts)
    rows = x.return_lse or x.reduction == "none"
    x = x._replace(scale=ranks.number(x.scale), weights=weights, reduction="none" if rows else "sum")
    if _made_once(form):
        return _symmetric_loss(x, own | gathered, same["reduction"], ranks, counts)
    directions = [query_key_losses.query_key_loss(_queries_to_keys(x, own | gathered))]
    if form.symmetric:
        directions.append(query_key_losses.query_key_loss(_keys_to_queries(x, own | gathered)))
    losses = [out if isinstance(out, Tensor) else out.loss for out in directions]
    mean = losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2
    total = ranks.reduced(mean, weights, same["reduction"], counts)
    if not x.return_lse:
        return total
    return _with_by_products(total, directions, own.get("key bias"), dropped_rows(weights))


def _made_once(form: SoftmaxOptions) -> bool:
    """Whether both directions come from the same similarities: not with a margin, for which a row and a column may
    leave out different pairs and the op has one limit for both."""
    return form.symmetric and (form.sampling is None or form.sampling.margin is None)


def _symmetric_loss(
    x: QueryKey, parts: dict[str, Any], reduction: str, ranks: Ranks, counts: Counts
) -> Tensor | ContrastiveOutput:
    """Both directions at once, see :mod:`once`."""
    dropped = dropped_rows(x.weights)
    x = _queries_to_keys(x, parts)._replace(form=x.form)
    with full_precision(x.query):
        rows = query_key_losses.softmax_rows(x, dropped, lambda inputs: both_directions(inputs, ranks, counts))
        own = reduce_output(rows, x.weights, x.reduction, False)
    assert isinstance(own, Tensor)
    loss = ranks.reduced(own, x.weights, reduction, counts)
    return rows._replace(loss=loss) if x.return_lse else loss


def _parts(x: QueryKey, ranks: Ranks) -> dict[str, Any]:
    """What belongs to the keys, the negatives and the queries, each by itself."""
    keys, (query_ids, key_ids) = x.key.shape[0], x.ids
    parts: dict[str, Any] = {"query": x.query, "key": x.key, "negatives": x.negatives}
    if key_ids is not None:
        parts |= {"query ids": query_ids, "key ids": key_ids[:keys]}
        if key_ids.shape[0] > keys:
            parts["negatives ids"] = key_ids[keys:]
    if not isinstance(x.bias, Tensor) or x.bias.ndim == 0:
        return parts | {"one bias": ranks.number(x.bias)}
    parts["key bias"] = x.bias[:keys]
    if x.bias.shape[0] > keys:
        parts["negatives bias"] = x.bias[keys:]
    return parts


def _travelling(own: dict[str, Any], x: QueryKey, ranks: Ranks) -> dict[str, Tensor]:
    """Those parts that other ranks need. What is the same on all of them becomes so for autograd too."""
    kinds = {"key"} if x.form.in_batch else set()
    if x.form.symmetric and not _made_once(x.form):
        kinds |= {"query"}
    if x.negatives is not None and x.negatives.ndim == 2:
        if ranks.exchange.negatives == "sharded":
            kinds |= {"negatives"}
        else:
            for name in ("negatives", "negatives bias"):
                if name in own:
                    own[name] = ranks.number(own[name])
    return {name: t for name, t in own.items() if name.split()[0] in kinds}


def _queries_to_keys(x: QueryKey, parts: dict[str, Any]) -> QueryKey:
    """This rank's queries against the keys of all."""
    form, bias = x.form, parts.get("one bias")
    if "key bias" in parts:
        bias = torch.cat([parts[name] for name in ("key bias", "negatives bias") if name in parts])
    ids = x.ids
    if ids[1] is not None:
        ids = ids[0], torch.cat([parts[name] for name in ("key ids", "negatives ids") if name in parts])
    rows = SoftmaxOptions(
        form.include_positive, False, form.normalize, form.label_smoothing, form.in_batch, form.sampling
    )
    return x._replace(key=parts["key"], negatives=parts["negatives"], bias=bias, ids=ids, form=rows)


def _keys_to_queries(x: QueryKey, parts: dict[str, Any]) -> QueryKey:
    """This rank's keys against the queries of all. A bias per key is one number of the row, which cancels."""
    form = x.form
    rows = SoftmaxOptions(form.include_positive, False, form.normalize, form.label_smoothing, True, form.sampling)
    ids = (None, None) if x.ids[1] is None else (x.ids[1][: x.key.shape[0]], parts["query ids"])
    return x._replace(query=x.key, key=parts["query"], negatives=None, bias=parts.get("one bias"), ids=ids, form=rows)


def _with_by_products(
    loss: Tensor, directions: list[Any], key_bias: Tensor | None, dropped: Tensor | None
) -> ContrastiveOutput:
    lse, top1 = [out.lse for out in directions], [out.top1 for out in directions]
    if len(directions) == 1:
        return ContrastiveOutput(loss, lse[0], top1[0])
    if key_bias is not None:
        lse[1] = lse[1] + (key_bias if dropped is None else key_bias.masked_fill(dropped, 0.0))
    return ContrastiveOutput(loss, torch.stack(lse), torch.stack(top1))


def siglip_loss(x: SigLip, group: Any, exchange: Any) -> Tensor:
    """Own images against the texts of all ranks: with positives against the own ones, without against the others."""
    ranks = Ranks.of(group, exchange)
    image_ids, text_ids = x.ids
    same: dict[str, Any] = {
        "loss": "siglip_loss", "normalize": x.normalize, "negative_only": x.negative_only, "reduction": x.reduction,
        "weights": x.weights is not None,
        "gradients of": needs(image=x.image, text=x.text, scale=x.scale, bias=x.bias),
    }  # fmt: skip
    sizes = {"image": x.image.shape[0], "text": x.text.shape[0]}
    travels = {"text": x.text, "text ids": text_ids}
    if x.groups is not None:
        of_images, of_texts, symmetric, soft_labels = x.groups
        same |= {"symmetric": symmetric, "soft_labels": soft_labels}
        counted = None if x.weights is None else (x.weights != 0).long()
        travels |= {"text groups": of_texts, "image groups": of_images, "image counted": counted}
    gathered, counts = ranks.meet(same, _floats(x.scale, x.bias), sizes, travels)
    weights = ranks.shares(x.weights, x.reduction, result_dtype(x.image, x.text), counts)
    x = x._replace(
        scale=ranks.number(x.scale), bias=ranks.number(x.bias), weights=weights,
        reduction="none" if x.reduction == "none" else "sum",
    )  # fmt: skip
    if x.groups is not None:
        everyone = x.groups._replace(of_images=gathered["image groups"], of_texts=gathered["text groups"])
        shares = everyone.shares(gathered.get("image counted"), result_dtype(x.image, x.text))
        x = x._replace(text=gathered["text"], groups=x.groups._replace(of_texts=everyone.of_texts))
        loss = checked_siglip_loss(x, (shares[0][: x.image.shape[0]], shares[1]))
        return ranks.reduced(loss, weights, same["reduction"], counts)
    rows, columns = x.text.shape[0], counts.total(1)
    if x.negative_only:
        loss = checked_siglip_loss(x._replace(text=gathered["text"], ids=(image_ids, gathered.get("text ids"))))
        return ranks.reduced(loss, weights, same["reduction"], counts)
    own, others = gathered["text"].split([rows, columns - rows])
    loss = checked_siglip_loss(x._replace(text=own))
    if ranks.size > 1:
        ids = (image_ids, None if text_ids is None else gathered["text ids"][rows:])
        loss = loss + checked_siglip_loss(x._replace(text=others, ids=ids, negative_only=True))
    return ranks.reduced(loss, weights, same["reduction"], counts)


def nt_xent_loss(
    view_a: Tensor,
    view_b: Tensor,
    scale: Tensor | float,
    ids: Tensor | None,
    weights: Tensor | None,
    form: SoftmaxOptions,
    reduction: str,
    return_lse: bool,
    workspace_mib: float,
    group: Any,
    exchange: Any,
) -> Tensor | ContrastiveOutput:
    """Both views of this rank's samples against those of all ranks. `weights` are those of the 2M rows."""
    check_reduction(reduction)
    ranks = Ranks.of(group, exchange)
    same: dict[str, Any] = {
        "loss": "nt_xent_loss", "include_positive": form.include_positive, "normalize": form.normalize,
        "reduction": reduction, "weights": weights is not None,
        "gradients of": needs(view_a=view_a, view_b=view_b, scale=scale),
    }  # fmt: skip
    numbers = {"label_smoothing": form.label_smoothing, "sampling": form.sampling, **_floats(scale, None)}
    sizes = {"view": 2 * view_a.shape[0]}
    met = [Counts(list(sizes.values()), 1)]

    def gather(own: Columns) -> Columns:
        travels = {"view": own.embeddings, "view norms": own.inverse_norms, "view ids": own.ids}
        gathered, counts = ranks.meet(same, numbers, sizes, travels, rows_each=2)
        met[0] = counts
        return Columns(gathered["view"], gathered.get("view norms"), gathered.get("view ids"))

    with full_precision(view_a):
        rows = nt_xent_rows(
            view_a,
            view_b,
            ranks.number(scale),
            ids,
            form,
            workspace_mib,
            dropped_rows(weights),
            gather if ranks.size > 1 else None,
        )
    return _of_rows(rows, weights, reduction, return_lse, ranks, met[0])


def supcon_loss(
    features: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    weights: Tensor | None,
    include_positive: bool,
    normalize: bool,
    reduction: str,
    return_lse: bool,
    workspace_mib: float,
    known_labels: bool,
    group: Any,
    exchange: Any,
) -> Tensor | ContrastiveOutput:
    """This rank's rows against those of all ranks; the labels travel beside them."""
    check_reduction(reduction)
    ranks = Ranks.of(group, exchange)
    same: dict[str, Any] = {
        "loss": "supcon_loss", "include_positive": include_positive, "normalize": normalize, "reduction": reduction,
        "return_lse": return_lse, "weights": weights is not None, "labels": known_labels,
        "gradients of": needs(features=features, scale=scale),
    }  # fmt: skip
    sizes = {"features": features.shape[0]}
    met = [Counts(list(sizes.values()), 1)]

    def gather(own: Columns) -> Columns:
        travels = {"features": own.embeddings, "features norms": own.inverse_norms, "features labels": own.ids}
        gathered, counts = ranks.meet(same, _floats(scale, None), sizes, travels)
        met[0] = counts
        return Columns(gathered["features"], gathered.get("features norms"), gathered["features labels"])

    with full_precision(features):
        rows = supcon_rows(
            features, labels, ranks.number(scale), include_positive, normalize, return_lse, workspace_mib,
            dropped_rows(weights), gather if ranks.size > 1 else None,
        )  # fmt: skip
    return _of_rows(rows, weights, reduction, return_lse, ranks, met[0])


def first_label(group: Any) -> int:
    """Of the samples of this rank, where they have no labels: each sample of all ranks has one of its own."""
    return process_group(group).rank() << 32


def _of_rows(
    rows: ContrastiveOutput, weights: Tensor | None, reduction: str, return_lse: bool, ranks: Ranks, counts: Counts
) -> Tensor | ContrastiveOutput:
    """The loss of all ranks from the losses of this one's rows."""
    shares = ranks.shares(weights, reduction, rows.loss.dtype, counts)
    own = reduce_output(rows, shares, "none", False)
    assert isinstance(own, Tensor)
    loss = ranks.reduced(own, shares, reduction, counts)
    return rows._replace(loss=loss) if return_lse else loss


def _floats(scale: Tensor | float, bias: Tensor | float | None) -> dict[str, float]:
    """Those of the two that are no tensors: all ranks must have the same."""
    both = {"scale": scale, "bias": bias}
    return {name: value for name, value in both.items() if isinstance(value, float)}
