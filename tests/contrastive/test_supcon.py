"""SupCon of views [B, V, D]: SupContrast's layout, its formula, and SimCLR where there are no labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss import SupConLoss, nt_xent_loss, supcon_loss
from tests.contrastive.test_formulas import close, gradients, randn


def definition(features: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Khosla et al., equation 2: each view of each sample against all other views, [B, V]."""
    samples, views, _ = features.shape
    rows = torch.nn.functional.normalize(features, dim=2).reshape(samples * views, -1)
    labels = torch.arange(samples) if labels is None else labels
    label = labels.repeat_interleave(views)
    logits = rows @ rows.T / temperature
    other = ~torch.eye(samples * views, dtype=torch.bool)
    log_prob = logits - logits.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
    positive = (label[:, None] == label) & other
    return (-(log_prob * positive).sum(1) / positive.sum(1)).reshape(samples, views)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 3, 0, 1, 3])], ids=["no labels", "labels"])
@pytest.mark.parametrize("views", [2, 3])
def test_views_are_supcontrasts(labels, views):
    features = randn(5, views, 6)
    close(supcon_loss(features, labels, temperature=0.2, reduction="none"), definition(features, labels, 0.2))
    got, got_grads = gradients(lambda f: supcon_loss(f, labels, temperature=0.2), features)
    expected, grads = gradients(lambda f: definition(f, labels, 0.2).mean(), features)
    close(got, expected)
    close(got_grads[0], grads[0])


def test_views_are_rows_of_their_sample():
    features, labels, weights = randn(4, 3, 5), torch.tensor([1, 0, 1, 2]), torch.tensor([1.0, 0.0, 2.0, 0.5])
    rows = features.flatten(0, 1)
    by_row = {"labels": labels.repeat_interleave(3), "weights": weights.repeat_interleave(3)}
    for reduction in ("none", "mean"):
        close(
            supcon_loss(features, labels, weights=weights, reduction=reduction).flatten(),
            supcon_loss(rows, **by_row, reduction=reduction).flatten(),
        )
    out = SupConLoss(0.2, return_lse=True)(features, labels)
    close(out.lse, supcon_loss(rows, by_row["labels"], temperature=0.2, return_lse=True).lse.reshape(4, 3))
    assert out.top1.shape == (4, 3) and out.loss.ndim == 0
    pair = randn(4, 2, 5)
    close(supcon_loss(pair, temperature=0.5), nt_xent_loss(pair[:, 0], pair[:, 1], temperature=0.5))
    assert supcon_loss(randn(0, 2, 5), reduction="none").shape == (0, 2)


def test_what_does_not_fit_is_named():
    features = randn(4, 3, 5)
    for change, error, says in (
        ((features, torch.zeros(12, dtype=torch.long)), ValueError, r"labels: expected shape \[4\], got \(12,\)"),
        ((features[:, 0],), TypeError, r"labels: expected integers \[M\]; only views"),
        ((features[:, :0],), ValueError, r"features: expected \[B, V, D\] with V and D >= 1"),
        ((features[0, 0],), ValueError, "features: expected a 2-D or 3-D tensor"),
    ):
        with pytest.raises(error, match=says):
            supcon_loss(*change)
    with pytest.raises(ValueError, match=r"weights: expected one per sample, shape \(4,\), got \(12,\)"):
        supcon_loss(features, weights=torch.ones(12))
