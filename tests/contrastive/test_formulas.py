"""Contrastive losses: the printed formulas of known libraries, the edges, and what a row of the cases cannot say."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from fastloss import (
    ContrastiveLoss,
    NegativeSampling,
    clip_loss,
    info_nce,
    nt_xent_loss,
    siglip_loss,
    supcon_loss,
)
from tests.conformance.eager_contrastive import eager_info_nce, eager_nt_xent, eager_siglip, eager_supcon

close = torch.testing.assert_close


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(randn(*shape, seed=seed, dtype=dtype), dim=-1)


def gradients(fn, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = fn(*leaves)
    return loss, torch.autograd.grad(loss, leaves, materialize_grads=True)


# The libraries' conventions, from their documented formulas


def printed_cross_entropy(q, k):
    return F.cross_entropy(F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.1, torch.arange(len(q)))


def printed_open_clip(q, k):
    labels = torch.arange(len(q))
    return (F.cross_entropy(10.0 * q @ k.T, labels) + F.cross_entropy(10.0 * k @ q.T, labels)) / 2


def printed_open_siglip(q, k):
    labels = 2 * torch.eye(len(q), dtype=q.dtype) - torch.ones(len(q), len(q), dtype=q.dtype)
    return -F.logsigmoid(labels * (10.0 * q @ k.T - 5.0)).sum() / len(q)


def printed_nt_xent(q, k):
    """The mean over all ordered positive pairs of -log(e^p / (e^p + sum of the anchor's negatives))."""
    z = F.normalize(torch.cat((q, k)), dim=1)
    labels = torch.arange(len(q)).repeat(2)
    losses = []
    for i in range(len(z)):
        similar = (z[i] @ z.T) / 0.5
        negative = similar[labels != labels[i]].exp().sum()
        for j in range(len(z)):
            if j != i and labels[j] == labels[i]:
                losses.append(-(similar[j].exp() / (similar[j].exp() + negative)).log())
    return torch.stack(losses).mean()


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


def printed_supcon(q, k):
    """The outer-sum form: -1/|P(i)| times the sum of log-probabilities of the positives among all other rows."""
    z = F.normalize(q, dim=1)
    losses = []
    for i in range(len(z)):
        similar = z @ z[i] / 0.1
        others = [a for a in range(len(z)) if a != i]
        denominator = similar[others].exp().sum()
        positives = [p for p in others if LABELS[p] == LABELS[i]]
        losses.append(-sum((similar[p].exp() / denominator).log() for p in positives) / len(positives))
    return torch.stack(losses).mean()


def printed_info_nce(q, k, negatives):
    """Positive in column 0, then the negatives, shared or each query's own."""
    q, k, n = (F.normalize(t, dim=-1) for t in (q, k, negatives))
    positive = (q * k).sum(1, keepdim=True)
    negative = q @ n.T if n.ndim == 2 else (q[:, None] @ n.transpose(1, 2)).squeeze(1)
    logits = torch.cat((positive, negative), 1) / 0.1
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


FORMULAS = {
    "cross_entropy": (info_nce, printed_cross_entropy),
    "open_clip ClipLoss": (lambda q, k: clip_loss(q, k, logit_scale=10.0), printed_open_clip),
    "open_clip SigLipLoss": (lambda q, k: siglip_loss(q, k, logit_scale=10.0, logit_bias=-5.0), printed_open_siglip),
    "NTXent": (lambda q, k: nt_xent_loss(q, k, temperature=0.5), printed_nt_xent),
    "SupCon": (lambda q, k: supcon_loss(q, LABELS), printed_supcon),
}


def library_open_clip(name):
    import open_clip.loss

    if name == "ClipLoss":
        return lambda q, k: open_clip.loss.ClipLoss()(q, k, 10.0)
    return lambda q, k: open_clip.loss.SigLipLoss()(q, k, 10.0, -5.0)


def library_metric_learning(name):
    from pytorch_metric_learning import losses

    if name == "NTXent":
        ours = losses.NTXentLoss(temperature=0.5)
        return lambda q, k: ours(torch.cat((q, k)), torch.arange(len(q)).repeat(2))
    return lambda q, k: losses.SupConLoss(temperature=0.1)(q, LABELS)


def library_info_nce(_):
    import info_nce as library

    return lambda q, k: library.InfoNCE(temperature=0.1)(q, k)


LIBRARIES = [
    ("open_clip", library_open_clip, "ClipLoss", "open_clip ClipLoss"),
    ("open_clip", library_open_clip, "SigLipLoss", "open_clip SigLipLoss"),
    ("pytorch_metric_learning", library_metric_learning, "NTXent", "NTXent"),
    ("pytorch_metric_learning", library_metric_learning, "SupCon", "SupCon"),
    ("info_nce", library_info_nce, "InfoNCE", "cross_entropy"),
]
PAIRS = [pytest.param(*row, id=name) for name, row in FORMULAS.items()] + [
    pytest.param(FORMULAS[formula][0], make(name), id=f"{package}.{name}")
    for package, make, name, formula in LIBRARIES
    if importlib.util.find_spec(package)
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_agrees_with_the_formula(ours, theirs):
    q, k = unit(7, 12), unit(7, 12, seed=1)
    (value, grads), (expected, wanted) = gradients(ours, q, k), gradients(theirs, q, k)
    close(value, expected, rtol=1e-12, atol=0)
    close(grads, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 12), (7, 4, 12)], ids=["shared", "own"])
def test_negatives_agree_with_the_info_nce_convention(shape):
    tensors = randn(7, 12), randn(7, 12, seed=1), randn(*shape, seed=2)
    got, expected = gradients(info_nce, *tensors), gradients(printed_info_nce, *tensors)
    close(got, expected, rtol=1e-10, atol=1e-13)


def test_label_smoothing_and_weights_are_cross_entropys():
    q, k, w = unit(6, 5), unit(9, 5, seed=1), torch.rand(6, dtype=torch.float64)
    targets = torch.tensor([8, 0, 0, 3, 7, 2])
    got = info_nce(q, k, targets=targets, label_smoothing=0.3, weights=w, temperature=0.2)
    rows = F.cross_entropy(q @ k.T / 0.2, targets, label_smoothing=0.3, reduction="none")
    close(got, (rows * w).sum() / w.sum())
    close(
        info_nce(q, k, targets=targets, reduction="none", temperature=0.2, weights=w),
        w * F.cross_entropy(q @ k.T / 0.2, targets, reduction="none"),
    )
    assert info_nce(q, k, weights=torch.zeros(6)).item() == 0


def test_decoupled_form_by_hand():
    q, k = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert info_nce(q, k, temperature=0.5, include_positive=False).item() == pytest.approx(math.log(2) - 2)
    assert info_nce(q, k, temperature=0.5).item() == pytest.approx(math.log(math.exp(2) + 2) - 2)


def test_contrastive_loss_has_the_loops_signature():
    text, image, bank = randn(5, 8), randn(5, 8, seed=1), randn(6, 8, seed=2)
    own = randn(5, 3, 8, seed=3)
    loss = ContrastiveLoss(temp=0.2)
    for negatives in (None, bank, own):
        close(loss(text, image, negatives), eager_info_nce(text, image, negatives, temperature=0.2))
    close(ContrastiveLoss()(text, image), info_nce(text, image, temperature=0.1))
    close(loss(text_emb=text, image_emb=image, negative_embs=bank), loss(text, image, bank))
    printed = ContrastiveLoss(0.2, include_positive=False)(text, image, bank)
    close(printed, eager_info_nce(text, image, bank, temperature=0.2, include_positive=False))
    loss.temp = 0.7
    close(copy.deepcopy(loss)(text, image), info_nce(text, image, temperature=0.7))
    learned = ContrastiveLoss(torch.nn.Parameter(torch.tensor(0.3)))
    learned(text, image).backward()
    assert learned.temp.grad.isfinite() and learned.temp.grad != 0
    for bad in (0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temp: expected a finite number > 0"):
            ContrastiveLoss(temp=bad)
    with pytest.raises(TypeError, match="the option is called temp"):
        ContrastiveLoss(temperature=0.1)


# Gradients of temperature, scale and bias


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


SCALARS = {
    "info_nce": (info_nce, eager_info_nce, {"temperature": 0.2}),
    "decoupled": (
        lambda *a, **o: info_nce(*a, include_positive=False, **o),
        lambda *a, **o: eager_info_nce(*a, include_positive=False, **o),
        {"temperature": 0.2, "bias": 0.4},
    ),
    "sampling": (
        lambda *a, **o: info_nce(*a, sampling=NegativeSampling(0.05, 0.5), **o),
        lambda *a, **o: eager_info_nce(*a, sampling=NegativeSampling(0.05, 0.5), **o),
        {"temperature": 0.9},
    ),
    "nt_xent": (nt_xent_loss, eager_nt_xent, {"temperature": 0.2}),
    "siglip": (siglip_loss, eager_siglip, {"logit_scale": 3.0, "logit_bias": -2.0}),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalar_gradients(name):
    ours, eager, options = SCALARS[name]
    q, k = randn(6, 5), randn(6, 5, seed=1)

    def run(fn):
        leaves = {n: scalar(v).requires_grad_() for n, v in options.items()}
        loss = fn(q, k, **leaves)
        return loss, torch.autograd.grad(loss, list(leaves.values()))

    close(run(ours), run(eager), rtol=1e-10, atol=1e-13)
    values = tuple(scalar(v).requires_grad_() for v in options.values())
    assert torch.autograd.gradcheck(lambda *v: ours(q, k, **dict(zip(options, v, strict=True))), values)


def test_clip_and_supcon_scale_gradients_and_column_bias():
    q, k = unit(6, 5), unit(6, 5, seed=1)
    s = scalar(7.0).requires_grad_()
    got = torch.autograd.grad(clip_loss(q, k, logit_scale=s), s)[0]
    labels = torch.arange(6)
    both = (F.cross_entropy(s * q @ k.T, labels) + F.cross_entropy(s * k @ q.T, labels)) / 2
    close(got, torch.autograd.grad(both, s)[0])
    t, names = scalar(0.3).requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 5])
    got = torch.autograd.grad(supcon_loss(q, names, temperature=t), t)[0]
    close(got, torch.autograd.grad(eager_supcon(q, names, temperature=t), t)[0])
    bank, bias = unit(3, 5, seed=2), randn(9, seed=3).requires_grad_()
    got = info_nce(q, k, bank, bias=bias, in_batch=True)
    expected = F.cross_entropy(q @ torch.cat((k, bank)).T / 0.1 + bias, labels)
    close(torch.autograd.grad(got, bias), torch.autograd.grad(expected, bias))


def test_second_derivatives():
    q, k = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_()
    for fn in (
        lambda a, b: info_nce(a, b, temperature=0.5, symmetric=True),
        lambda a, b: info_nce(a, b, temperature=0.5, include_positive=False),
        lambda a, b: siglip_loss(a, b, logit_scale=2.0, logit_bias=-1.0),
    ):
        assert torch.autograd.gradgradcheck(fn, (q, k))


# Options


def test_lse_and_top1():
    q, k = unit(6, 5), unit(6, 5, seed=1)
    logits = q @ k.T / 0.1
    loss, lse, top1 = info_nce(q, k, return_lse=True)
    close(lse, logits.logsumexp(1))
    assert torch.equal(top1, logits.argmax(1) == torch.arange(6))
    close(loss, (lse - logits.diagonal()).mean())
    out = clip_loss(q, k, logit_scale=10.0, return_lse=True)
    close(out.lse, torch.stack((logits.logsumexp(1), logits.logsumexp(0))))
    assert torch.equal(out.top1[1], logits.argmax(0) == torch.arange(6))
    decoupled = info_nce(q, k, include_positive=False, return_lse=True).lse
    close(decoupled, logits.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).logsumexp(1))
    z = torch.cat((q, k))
    views = (z @ z.T / 0.1).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    got = nt_xent_loss(q, k, return_lse=True)
    close(got.lse, views.logsumexp(1))
    assert torch.equal(got.top1, views.argmax(1) == torch.arange(12).roll(6))
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    similar = (q @ q.T / 0.1).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
    got = supcon_loss(q, labels, return_lse=True)
    close(got.lse, similar.logsumexp(1))
    assert torch.equal(got.top1, labels[similar.argmax(1)] == labels)
    assert torch.autograd.gradcheck(lambda a: info_nce(a, k, return_lse=True).lse, randn(6, 5).requires_grad_())


def test_ids_of_a_shared_bank_mask_its_columns():
    q, k, bank = unit(4, 6), unit(4, 6, seed=1), unit(3, 6, seed=2)
    ids, key_ids = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 1, 8, 3])
    got = info_nce(q, k, bank, query_ids=ids, key_ids=key_ids)
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ bank.T), 1) / 0.1
    logits[1, 1] = logits[3, 3] = -torch.inf
    close(got, F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)))


def test_siglip_blocks_of_other_devices_add_up():
    """The positive block plus negative-only blocks are the loss over all texts."""
    q, k = randn(3, 5), randn(7, 5, seed=1)
    options = {"logit_scale": 2.0, "logit_bias": -1.0, "reduction": "sum"}
    parts = siglip_loss(q, k[:3], **options) + siglip_loss(q, k[3:], negative_only=True, **options)
    sign = -torch.ones(3, 7, dtype=torch.float64).fill_diagonal_(-1.0)
    close(parts, -F.logsigmoid(sign * (2 * q @ k.T - 1)).sum())
    with pytest.raises(ValueError, match="text_ids: expected it beside"):
        siglip_loss(q, k, negative_only=True, image_ids=torch.arange(3), **options)


def test_margin_filter_and_debiasing_by_hand():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    k = torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    got = info_nce(q, k, bank, sampling=NegativeSampling(margin=0.3), temperature=1.0, reduction="none")
    first = math.log(math.exp(0.6) + math.exp(0.8)) - 0.6  # similarity 1.0 passes 0.6 + 0.3 and is left out
    second = math.log(math.exp(1.0) + 1 + math.exp(0.6)) - 1.0
    close(got, torch.tensor([first, second], dtype=torch.float64))
    got = info_nce(q, k, bank, sampling=NegativeSampling(tau_plus=0.1), temperature=1.0, reduction="none")
    total = (math.exp(1.0) + math.exp(0.8) - 0.1 * 2 * math.exp(0.6)) / 0.9
    assert got[0].item() == pytest.approx(math.log(math.exp(0.6) + total) - 0.6)
    floor = info_nce(q[:1], q[:1], -bank[:1], sampling=NegativeSampling(tau_plus=0.5), temperature=1.0)
    assert floor.item() == pytest.approx(math.log(math.e + math.exp(-1)) - 1)
    close(info_nce(q, k, sampling=NegativeSampling()), info_nce(q, k))
    for bad, text in (
        ({"tau_plus": 1.0}, "tau_plus"),
        ({"tau_plus": -0.1}, "tau_plus"),
        ({"hardness": -1}, "hardness"),
        ({"margin": math.nan}, "margin"),
    ):
        with pytest.raises(ValueError, match=text):
            NegativeSampling(**bad)


def test_ids_must_be_paired_when_rows_are_not():
    q, k = randn(3, 4), randn(5, 4)
    with pytest.raises(ValueError, match="key_ids: expected it beside the other ids"):
        info_nce(q, k, query_ids=torch.arange(3))
    with pytest.raises(ValueError, match="query_ids: expected it beside the other ids"):
        info_nce(q, k, key_ids=torch.arange(5))
    with pytest.raises(ValueError, match="symmetric: expected as many keys as queries"):
        info_nce(q, k, symmetric=True)
