"""The contrastive losses as plain PyTorch, written independently: what the conformance tests compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def eager_reduce(rows, weights, reduction):
    if weights is None:
        return rows if reduction == "none" else getattr(rows, reduction)()
    rows = rows * weights
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / weights.sum()}[reduction]


def without_pairs(allowed, excluded_pairs, negative_pairs=None):
    """The mask of the negatives [M, C] where some pairs, or all others, are none."""
    listed = torch.zeros_like(allowed)
    for row, column in [] if excluded_pairs is None else excluded_pairs.tolist():
        listed[row, column] = True
    if negative_pairs is None:
        return allowed & ~listed
    return allowed & ~without_pairs(torch.ones_like(allowed), negative_pairs)


def eager_rows(
    similar, target, allowed, temperature=0.1, bias=None, include_positive=True, label_smoothing=0.0, sampling=None
):
    """Row losses from scaled similarities [M, C], the positives' columns and the mask of the negatives, and a bias.

    With plain exponentials below the largest. Rows without negatives have loss 0: their 0 / 0 and log 0 get numbers in
    their place.
    """
    logits = similar + (0.0 if bias is None else bias)
    positive = torch.zeros_like(allowed).scatter(1, target[:, None], True)
    pos = logits.gather(1, target[:, None])[:, 0]
    if sampling is not None and sampling.margin is not None:
        limit = similar.gather(1, target[:, None]) * temperature + sampling.margin
        allowed = allowed & (similar * temperature <= limit)
    none = ~allowed.any(1)
    if sampling is not None and (sampling.tau_plus or sampling.hardness):
        number = allowed.sum(1).clamp(min=1).to(logits)
        row_max = logits.detach().masked_fill(~allowed, -torch.inf).amax(1).masked_fill(none, 0.0)
        below = logits - row_max[:, None]
        negative = below.masked_fill(~allowed, -torch.inf).exp()
        importance = (sampling.hardness * below).masked_fill(~allowed, -torch.inf).exp()
        sum_exp = (importance * negative).sum(1) / ((importance.sum(1) + none) / number)
        if sampling.tau_plus:
            sum_exp = (sum_exp - sampling.tau_plus * number * (pos - row_max).exp()) / (1 - sampling.tau_plus)
            floor = number * torch.exp(torch.as_tensor(-1 / temperature).to(logits) - row_max)
            sum_exp = torch.maximum(sum_exp, floor)
        lse = sum_exp.masked_fill(none, 1.0).log() + row_max
        rows = (torch.logaddexp(pos, lse) if include_positive else lse) - pos
    else:
        candidates = allowed | positive if include_positive else allowed | (positive & none[:, None])
        rows = logits.masked_fill(~candidates, -torch.inf).logsumexp(1) - pos
    if label_smoothing:
        mean = torch.where(allowed | positive, logits, 0).sum(1) / (allowed.sum(1) + 1)
        rows = rows + label_smoothing * (pos - mean)
    return rows.masked_fill(none, 0.0)


def eager_info_nce(
    query, key, negatives=None, *, temperature=0.1, symmetric=False, normalize=True, query_ids=None, key_ids=None,
    in_batch=None, targets=None, weights=None, reduction="mean", negatives_mask=None, excluded_pairs=None,
    negative_pairs=None, **row_options,
):  # fmt: skip
    """`row_options`: those of :func:`eager_rows`."""
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        negatives = None if negatives is None else F.normalize(negatives, dim=-1)
    if targets is not None and targets.ndim == 2:
        return eager_several_positives(
            query, key, negatives, targets, temperature, negatives_mask, in_batch, weights, reduction, **row_options
        )
    target = torch.arange(len(query), device=query.device) if targets is None else targets
    logits = query @ key.T * (1 / temperature)
    allowed = torch.ones_like(logits, dtype=torch.bool).scatter(1, target[:, None], False)
    if query_ids is not None:
        allowed = allowed & (query_ids[:, None] != key_ids)
    if negatives is not None and not in_batch:
        allowed = torch.zeros_like(allowed)
    row_view, mask = logits, allowed
    if negatives is not None:
        extra = query @ negatives.T if negatives.ndim == 2 else torch.einsum("md,mkd->mk", query, negatives)
        row_view = torch.cat((row_view, extra * (1 / temperature)), 1)
        counts = torch.ones_like(extra, dtype=torch.bool) if negatives_mask is None else negatives_mask
        mask = torch.cat((allowed, counts), 1)
    mask = without_pairs(mask, excluded_pairs, negative_pairs)
    rows = eager_rows(row_view, target, mask, temperature, **row_options)
    if symmetric:
        of_keys = mask[:, : len(key)].T
        of_columns = eager_rows(logits.T, target, of_keys, temperature, **(row_options | {"bias": None}))
        rows = (rows + of_columns) / 2
    return eager_reduce(rows, weights, reduction)


def eager_several_positives(
    query, key, negatives, targets, temperature, negatives_mask, in_batch, weights, reduction, positives="mean",
    label_smoothing=0.0, bias=None,
):  # fmt: skip
    logits = query @ key.T / temperature + (0.0 if bias is None else bias)
    there = (targets[:, :, None] == torch.arange(len(key), device=key.device)).any(1)
    candidates = there if negatives is not None and not in_batch else torch.ones_like(there)
    if negatives is not None:
        extra = query @ negatives.T if negatives.ndim == 2 else torch.einsum("md,mkd->mk", query, negatives)
        counts = torch.ones_like(extra, dtype=torch.bool) if negatives_mask is None else negatives_mask
        logits, there = torch.cat((logits, extra / temperature), 1), F.pad(there, (0, extra.shape[1]))
        candidates = torch.cat((candidates, counts), 1)
    log_p = logits - logits.masked_fill(~candidates, -torch.inf).logsumexp(1, keepdim=True)
    if positives == "mean":
        rows = -torch.where(there, log_p, 0).sum(1) / there.sum(1).clamp(min=1)
    else:
        rows = -log_p.masked_fill(~there, -torch.inf).masked_fill(~there.any(1)[:, None], 0.0).logsumexp(1)
    mean = torch.where(candidates, log_p, 0).sum(1) / candidates.sum(1)
    rows = (1 - label_smoothing) * rows - label_smoothing * mean
    return eager_reduce(rows.masked_fill(~there.any(1), 0.0), weights, reduction)


def eager_clip(
    image, text, logit_scale, logit_bias=0.0, normalize=False, label_smoothing=0.0, reduction="mean",
    excluded_pairs=None,
):  # fmt: skip
    if normalize:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits, labels = logit_scale * (image @ text.T) + logit_bias, torch.arange(len(image), device=image.device)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    if excluded_pairs is not None:
        counts = without_pairs(torch.ones_like(logits, dtype=torch.bool), excluded_pairs)
        logits = logits.masked_fill(~(counts | torch.eye(len(image), device=image.device).bool()), -torch.inf)
    return (F.cross_entropy(logits, labels, **options) + F.cross_entropy(logits.T, labels, **options)) / 2


def eager_grouped_clip(
    image, text, image_groups, text_groups, logit_scale, normalize=False, label_smoothing=0.0, reduction="mean"
):
    if normalize:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits, positive = logit_scale * (image @ text.T), image_groups[:, None] == text_groups

    def direction(logits, positive):
        labels = positive / positive.sum(1, keepdim=True).clamp_min(1).to(logits)
        rows = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
        return eager_reduce(torch.where(positive.any(1), rows, 0.0), None, reduction)

    return (direction(logits, positive) + direction(logits.T, positive.T)) / 2


def eager_siglip(
    image, text, logit_scale, logit_bias, normalize=False, image_ids=None, text_ids=None, negative_only=False,
    weights=None, reduction="mean", image_groups=None, text_groups=None, symmetric=True, soft_labels=False,
):  # fmt: skip
    if normalize:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits = logit_scale * (image @ text.T) + (logit_bias or 0.0)
    if image_groups is not None:
        positive = image_groups[:, None] == (image_groups if text_groups is None else text_groups)
        share = (1 / positive.sum(1, keepdim=True).clamp_min(1).to(logits)).expand(positive.shape)
        share = (share + 1 / positive.sum(0).clamp_min(1).to(logits)) / 2 if symmetric else share
        weight = torch.where(positive, 1.0 if soft_labels else share, 1.0).to(logits)
        label = torch.where(positive, share if soft_labels else 1.0, 0.0).to(logits)
        pairs = F.binary_cross_entropy_with_logits(logits, label, weight, reduction="none")
        return eager_reduce(pairs.sum(1), weights, reduction)
    sign = -torch.ones_like(logits) if negative_only else 2 * torch.eye(len(image), device=image.device).to(logits) - 1
    pairs = -F.logsigmoid(sign * logits)
    if image_ids is not None:
        pairs = pairs * ((image_ids[:, None] != text_ids) | (sign > 0))
    return eager_reduce(pairs.sum(1), weights, reduction)


def eager_supcon(
    features, labels, temperature=0.1, include_positive=True, normalize=True, weights=None, reduction="mean",
    keys=None, key_labels=None, excluded_pairs=None,
):  # fmt: skip
    among, key_labels = (features, labels) if keys is None else (keys, key_labels)
    if normalize:
        features, among = F.normalize(features, dim=1), F.normalize(among, dim=1)
    logits = features @ among.T * (1 / temperature)
    other = torch.ones_like(logits, dtype=torch.bool)
    if keys is None:
        other = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    same = (labels[:, None] == key_labels) & other
    candidates = without_pairs(other if include_positive else other & ~same, excluded_pairs)
    none = ~candidates.any(1) if excluded_pairs is not None else torch.zeros_like(same[:, 0])
    log_p = logits - logits.masked_fill(~candidates & ~none[:, None], -torch.inf).logsumexp(1, keepdim=True)
    rows = (-torch.where(same, log_p, 0).sum(1) / same.sum(1).clamp(min=1)).masked_fill(none, 0.0)
    return eager_reduce(rows, weights, reduction)


def eager_nt_xent(
    view_a, view_b, temperature=0.1, normalize=True, ids=None, weights=None, reduction="mean", excluded_pairs=None,
    negative_pairs=None, **row_options,
):  # fmt: skip
    """`row_options`: those of :func:`eager_rows`."""
    z = torch.cat((view_a, view_b))
    z = F.normalize(z, dim=1) if normalize else z
    target = torch.arange(len(z), device=z.device).roll(len(view_a))
    allowed = ~torch.eye(len(z), dtype=torch.bool, device=z.device).scatter(1, target[:, None], True)
    if ids is not None:
        allowed = allowed & (ids.repeat(2)[:, None] != ids.repeat(2))
    logits = z @ z.T * (1 / temperature)
    allowed = without_pairs(allowed, excluded_pairs, negative_pairs)
    rows = eager_rows(logits, target, allowed, temperature, **row_options)
    return eager_reduce(rows, None if weights is None else weights.repeat(2), reduction)
