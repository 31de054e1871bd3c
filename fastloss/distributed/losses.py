"""The contrastive losses of a batch whose rows lie on several ranks.

Each rank computes the losses of its own rows against the columns of all ranks, in the family's own ops, and their sum
is the loss. The columns come with this rank's own first, so that a row's positive stands where it does on one
rank; or only its own ones are there, and an op brings the others piece by piece (:mod:`pieces`). A loss of two
directions has both from the same similarities (:mod:`gathered`); with a margin both sides travel and each direction is
a loss of rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..contrastive import query_key_losses
from ..contrastive.checks import dropped_rows, reduce_output, without
from ..contrastive.groups import sizes as sizes_of_groups
from ..contrastive.nt_xent import nt_xent_rows
from ..contrastive.ops.softmax_stats import Inputs, softmax_statistics
from ..contrastive.options import Columns, ContrastiveOutput, SoftmaxOptions
from ..contrastive.query_key_losses import QueryKey
from ..contrastive.siglip import Inputs as SigLipInputs
from ..contrastive.siglip import SigLip, checked_siglip_loss
from ..contrastive.supcon import Among, logits_of_label, supcon_rows
from ..core import check_reduction, full_precision, result_dtype
from .gathered import statistics_in_pieces, statistics_of_gathered
from .pieces import Groups
from .ranks import Meeting, Ranks, dtypes, needs, process_group
from .siglip_pieces import siglip_of_pieces


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
        "targets": x.targets is not None,
        "gradients of": needs(query=x.query, key=x.key, negatives=x.negatives, scale=x.scale, bias=x.bias),
        **dtypes(query=x.query, key=x.key, negatives=x.negatives, weights=x.weights),
    }  # fmt: skip
    numbers = {"label_smoothing": form.label_smoothing, "sampling": form.sampling, **_floats(x.scale, x.bias)}
    meeting = ranks.meet(same, numbers, sizes, travels)
    weights, nobody = meeting.shares(x.weights, x.reduction, result_dtype(x.query, x.key, x.negatives))
    own |= {name: _counted(own[name], nobody) for name in ("query", "key", "negatives") if own[name] is not None}
    rows = x.return_lse or x.reduction == "none"
    x = x._replace(
        query=own["query"], scale=ranks.number(x.scale), weights=weights, reduction="none" if rows else "sum"
    )
    if meeting.strategy == "gather":
        own |= meeting.gather({name: own[name] for name in travels})
    if _made_once(form):
        return _symmetric_loss(x, own, same["reduction"], meeting)
    compute = query_key_losses.query_key_loss
    if meeting.strategy != "gather":
        compute = partial(_loss_in_pieces, meeting=meeting, sides=("key", "query"))
    directions = [compute(_queries_to_keys(x, own))]
    if form.symmetric:
        if meeting.strategy != "gather":
            compute = partial(_loss_in_pieces, meeting=meeting, sides=("query", "key"))
        directions.append(compute(_keys_to_queries(x, own)))
    losses = [out if isinstance(out, Tensor) else out.loss for out in directions]
    mean = losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2
    total = ranks.reduced(mean, weights, same["reduction"], meeting.counts)
    if not x.return_lse:
        return total
    return _with_by_products(total, directions, own.get("key bias"), dropped_rows(weights))


def _counted(t: Tensor, nobody: Tensor | None) -> Tensor:
    """Embeddings with zeros where no row of any rank counts: a NaN among them reaches no gradient."""
    return t if nobody is None else t.masked_fill(nobody, 0.0)


def _made_once(form: SoftmaxOptions) -> bool:
    """Whether both directions come from the same similarities: not with a margin, for which a row and a column may
    leave out different pairs and the op has one limit for both."""
    return form.symmetric and (form.sampling is None or form.sampling.margin is None)


def _symmetric_loss(x: QueryKey, parts: dict[str, Any], reduction: str, meeting: Meeting) -> Tensor | ContrastiveOutput:
    """Both directions at once, see :mod:`gathered`."""
    x = _queries_to_keys(x, parts)._replace(form=x.form)
    with full_precision(x.query):
        rows = _softmax_rows(x, meeting, "key")
        own = reduce_output(rows, x.weights, x.reduction, False)
    assert isinstance(own, Tensor)
    loss = meeting.ranks.reduced(own, x.weights, reduction, meeting.counts)
    return rows._replace(loss=loss) if x.return_lse else loss


def _loss_in_pieces(x: QueryKey, meeting: Meeting, sides: tuple[str, str]) -> Tensor | ContrastiveOutput:
    """The loss of this rank's rows, against its own columns and those of other ranks, which come in pieces. `sides`:
    what columns and rows are called."""
    x = x._replace(query=without(x.query, dropped_rows(x.weights)))
    with full_precision(x.query):
        rows = _softmax_rows(x, meeting, sides[0])
        return reduce_output(rows, x.weights, x.reduction, x.return_lse)


def _softmax_rows(x: QueryKey, meeting: Meeting, columns: str) -> ContrastiveOutput:
    in_pieces = meeting.strategy != "gather"
    wires = {"key": x.key.dtype, "negatives": (x.key if x.negatives is None else x.negatives).dtype}
    replicated = meeting.ranks.exchange.negatives == "replicated"

    def statistics(inputs: Inputs, of: str) -> Tensor:
        if of == "negatives" and (replicated or not in_pieces):
            return softmax_statistics(inputs)
        if not in_pieces:
            return torch.stack(statistics_of_gathered(inputs, meeting, columns))
        name = columns if of == "key" else of
        return torch.stack(statistics_in_pieces(inputs, meeting, name, wires[of]))

    return query_key_losses.softmax_rows(x, dropped_rows(x.weights), statistics)


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
    same: dict[str, Any] = {
        "loss": "siglip_loss", "normalize": x.normalize, "negative_only": x.negative_only, "reduction": x.reduction,
        "gradients of": needs(image=x.image, text=x.text, scale=x.scale, bias=x.bias),
        **dtypes(image=x.image, weights=x.weights),
    }  # fmt: skip
    sizes = {"image": x.image.shape[0], "text": x.text.shape[0]}
    small = {"text ids": x.ids[1]}
    if x.groups is not None:
        same |= {"symmetric": x.groups.symmetric, "soft_labels": x.groups.soft_labels}
        counted = None if x.weights is None else (x.weights != 0).long()
        small = {"text groups": x.groups.of_texts, "image groups": x.groups.of_images, "image counted": counted}
    meeting = ranks.meet(same, _floats(x.scale, x.bias), sizes, {"text": x.text} | small)
    weights, nobody = meeting.shares(x.weights, x.reduction, result_dtype(x.image, x.text))
    x = x._replace(
        text=_counted(x.text, nobody), scale=ranks.number(x.scale), bias=ranks.number(x.bias), weights=weights,
        reduction="none" if x.reduction == "none" else "sum",
    )  # fmt: skip
    in_pieces = ranks.size > 1 and meeting.strategy != "gather"
    gathered = meeting.gather(small if in_pieces else {"text": x.text} | small)
    shares: tuple[Tensor | None, Tensor | None] = (None, None)
    if x.groups is not None:
        everyone = x.groups._replace(of_images=gathered["image groups"], of_texts=gathered["text groups"])
        of_images, of_texts = everyone.shares(gathered.get("image counted"), result_dtype(x.image, x.text))
        shares = of_images[: x.image.shape[0]], of_texts
        x = x._replace(groups=x.groups._replace(of_texts=everyone.of_texts))
    x = x._replace(ids=(x.ids[0], gathered.get("text ids")))
    if in_pieces:
        loss = checked_siglip_loss(x, shares, partial(_siglip_in_pieces, meeting=meeting))
    elif x.groups is not None or x.negative_only:
        loss = checked_siglip_loss(x._replace(text=gathered["text"]), shares)
    else:
        loss = _siglip_of_gathered(x, gathered["text"], ranks.size)
    return ranks.reduced(loss, weights, same["reduction"], meeting.counts)


def _siglip_in_pieces(x: SigLipInputs, meeting: Meeting) -> Tensor:
    route = meeting.route("text", x.text, x.text.dtype)
    return siglip_of_pieces(*x, *route, *meeting.comparison())[0]


def _siglip_of_gathered(x: SigLip, text: Tensor, ranks: int) -> Tensor:
    """Positives are the own pairs alone, so these are a loss by themselves."""
    rows, (image_ids, text_ids) = x.text.shape[0], x.ids
    own, others = text.split([rows, text.shape[0] - rows])
    loss = checked_siglip_loss(x._replace(text=own, ids=(image_ids, None if text_ids is None else text_ids[:rows])))
    if ranks == 1:
        return loss
    ids = image_ids, None if text_ids is None else text_ids[rows:]
    return loss + checked_siglip_loss(x._replace(text=others, ids=ids, negative_only=True))


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
        "reduction": reduction, "gradients of": needs(view_a=view_a, view_b=view_b, scale=scale),
        **dtypes(weights=weights),
    }  # fmt: skip
    numbers = {"label_smoothing": form.label_smoothing, "sampling": form.sampling, **_floats(scale, None)}
    travels = {"view": view_a, "view b": view_b, "view ids": ids}
    meeting = ranks.meet(same, numbers, {"view": 2 * view_a.shape[0]}, travels, rows_each=2)
    shares, nobody = meeting.shares(weights, reduction, result_dtype(view_a, view_b))

    def statistics(x: Inputs) -> Tensor:
        if x.logit_limit is not None:  # a row and a column may leave out different pairs: all of the square
            x = x._replace(self_similarity=False, diagonal=True)
        if meeting.strategy != "gather":
            return torch.stack(statistics_in_pieces(x, meeting, "view", x.key.dtype))
        return torch.stack(statistics_of_gathered(_columns_of_all(x, meeting, "view")[0], meeting, "view"))

    with full_precision(view_a):
        rows = nt_xent_rows(
            _counted(view_a, nobody), _counted(view_b, nobody), ranks.number(scale), ids, form, workspace_mib,
            dropped_rows(weights), statistics if ranks.size > 1 else softmax_statistics,
        )  # fmt: skip
    return _of_rows(rows, shares, reduction, return_lse, meeting)


def _columns_of_all(x: Inputs, meeting: Meeting, name: str, labels: Tensor | None = None) -> tuple[Inputs, Columns]:
    """`x`, whose columns are its own rows, with those of all ranks; with labels also what these are of."""
    own = {name: x.key, f"{name} norms": x.column_scale, f"{name} ids": x.column_ids, f"{name} labels": labels}
    all_of = meeting.gather(own)
    columns = Columns(all_of[name], all_of.get(f"{name} norms"), all_of.get(f"{name} labels"))
    x = x._replace(key=columns.embeddings, column_scale=columns.inverse_norms, column_ids=all_of.get(f"{name} ids"))
    return x, columns


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
        "return_lse": return_lse, "labels": known_labels, "gradients of": needs(features=features, scale=scale),
        **dtypes(weights=weights),
    }  # fmt: skip
    sizes = {"features": features.shape[0]}
    meeting = ranks.meet(same, _floats(scale, None), sizes, {"features": features, "features labels": labels})
    shares, nobody = meeting.shares(weights, reduction, result_dtype(features))
    with full_precision(features):
        rows = supcon_rows(
            _counted(features, nobody), labels, ranks.number(scale), include_positive, normalize, return_lse,
            workspace_mib, dropped_rows(weights), partial(_among_labels, meeting=meeting) if ranks.size > 1 else None,
        )  # fmt: skip
    return _of_rows(rows, shares, reduction, return_lse, meeting)


def _among_labels(x: Inputs, labels: Tensor | None, meeting: Meeting) -> Among:
    """Among the rows of all ranks."""
    name, dtype = "features", x.row_scale.dtype
    if meeting.strategy == "gather":
        of_all, columns = _columns_of_all(x, meeting, name, labels)
        stats = statistics_of_gathered(of_all, meeting, name)[0]
        return Among(stats, None, None) if labels is None else Among(stats, *logits_of_label(x, columns, labels))
    if labels is None:
        return Among(statistics_in_pieces(x, meeting, name, x.key.dtype)[0], None, None)
    everyone = meeting.gather({"features labels": labels})["features labels"]
    (found,) = statistics_in_pieces(x, meeting, name, x.key.dtype, Groups(labels, everyone))
    itself = (x.query.to(dtype) ** 2).sum(1) * x.row_scale
    itself = itself if x.column_scale is None else itself * x.column_scale
    return Among(found[:-1], found[-1] - itself, sizes_of_groups(labels, everyone) - 1)


def first_label(group: Any) -> int:
    """Of the samples of this rank, where they have no labels: each sample of all ranks has one of its own."""
    return process_group(group).rank() << 32


def _of_rows(
    rows: ContrastiveOutput, shares: Tensor | None, reduction: str, return_lse: bool, meeting: Meeting
) -> Tensor | ContrastiveOutput:
    """The loss of all ranks from the losses of this one's rows."""
    own = reduce_output(rows, shares, "none", False)
    assert isinstance(own, Tensor)
    loss = meeting.ranks.reduced(own, shares, reduction, meeting.counts)
    return rows._replace(loss=loss) if return_lse else loss


def _floats(scale: Tensor | float, bias: Tensor | float | None) -> dict[str, float]:
    """Those of the two that are no tensors: all ranks must have the same."""
    both = {"scale": scale, "bias": bias}
    return {name: value for name, value in both.items() if isinstance(value, float)}
