"""Attention consistency: agreement with torch's KL divergence and attention, and the edges of the definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastloss import attention_consistency_from_qk as from_qk
from fastloss import attention_consistency_loss as loss_of
from tests.conformance.tools import INTERPRETING

METRICS = ("js", "kl", "sym_kl", "mse", "l1", "cosine")


def maps(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(2))


def test_agrees_with_torch_kl_div():
    a, b = maps(2, 3, 4, 5)
    lp, lq = a.log_softmax(-1), b.log_softmax(-1)
    kl, lk = F.kl_div(lq, lp, log_target=True, reduction="sum"), F.kl_div(lp, lq, log_target=True, reduction="sum")
    lm = torch.logaddexp(lp, lq) - math.log(2)
    js = [F.kl_div(lm, x, log_target=True, reduction="sum") for x in (lp, lq)]
    for metric, expected in (("kl", kl), ("sym_kl", (kl + lk) / 2), ("js", sum(js) / 2)):
        for inputs, (x, y) in (("logits", (a, b)), ("probs", (lp.exp(), lq.exp()))):
            total = loss_of(x, y, inputs=inputs, metric=metric, reduction="sum")
            torch.testing.assert_close(total, expected)
            torch.testing.assert_close(loss_of(x, y, inputs=inputs, metric=metric), expected / 24)
    torch.testing.assert_close(loss_of(lp.exp(), lq.exp(), metric="mse"), F.mse_loss(lp.exp(), lq.exp()))
    torch.testing.assert_close(loss_of(a, b, metric="l1", inputs="logits"), F.l1_loss(lp.exp(), lq.exp()))


def test_bounds_and_symmetry():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert loss_of(one, other).item() == pytest.approx(math.log(2), rel=1e-6)
    assert loss_of(one, other, metric="kl").item() == math.inf
    a, b = (x.softmax(-1) for x in maps(3, 4, 7))
    torch.testing.assert_close(loss_of(a, b), loss_of(b, a))
    assert loss_of(a, b, metric="kl") != loss_of(b, a, metric="kl")
    for metric in METRICS:
        assert loss_of(a, a.clone(), metric=metric).item() == 0


@pytest.mark.parametrize("metric", METRICS)
def test_zero_probabilities_have_finite_gradients(metric):
    """0 log 0 = 0, in both maps or one: the gradient stays finite, also through the softmax that made them."""
    a = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    b = torch.tensor([[0.2, 0.8, 0.0], [0.3, 0.3, 0.4]], requires_grad=True)
    if metric == "sym_kl":  # infinite where only one is 0
        b = torch.tensor([[0.2, 0.8, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    value = loss_of(a, b, metric=metric)
    value.backward()
    assert value.isfinite() and a.grad.isfinite().all() and b.grad.isfinite().all()
    if metric in ("js", "kl", "sym_kl"):
        assert a.grad[0, 2] == 0 and b.grad[0, 2] == 0 and a.grad[1, 0] == 0
    logits = torch.tensor([[0.0, 0.0, -200.0], [300.0, 0.0, -300.0]], requires_grad=True)
    loss_of(logits.softmax(-1), torch.full((2, 3), 1 / 3), metric="js" if metric == "sym_kl" else metric).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_extreme_logits_stay_finite(metric):
    a = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    b = torch.tensor([[-1e4, 0.0, 1e4], [90.0, -90.0, 0.0]], requires_grad=True)
    value = loss_of(a, b, inputs="logits", metric=metric, reduction="none")
    value.sum().backward()
    assert value.isfinite().all() and a.grad.isfinite().all() and b.grad.isfinite().all()
    assert value[0].item() == pytest.approx(
        {"js": math.log(2), "kl": 2e4, "sym_kl": 2e4, "mse": 2 / 3, "l1": 2 / 3, "cosine": 1.0}[metric], rel=1e-6
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("inputs", ["probs", "logits"])
def test_mask_is_the_loss_of_the_keys_left(metric, inputs):
    """Garbage at masked keys, NaN included, counts for nothing; rows without keys leave the mean."""
    a, b = maps(2, 3, 5)
    keep = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
    if inputs == "probs":
        a, b = (x.masked_fill(~keep, -math.inf).softmax(-1).nan_to_num() for x in (a, b))
    dirty = [x.masked_fill(~keep, math.nan).requires_grad_() for x in (a, b)]
    got = loss_of(*dirty, inputs=inputs, metric=metric, mask=keep, reduction="none")
    rows = [[0, 2, 3], [0, 1, 2, 3, 4]]
    for row, keys in zip((0, 2), rows, strict=True):
        expected = loss_of(
            a[:, row, keys][:, None], b[:, row, keys][:, None], inputs=inputs, metric=metric, reduction="none"
        )
        torch.testing.assert_close(got[:, row], expected[:, 0])
    assert (got[:, 1] == 0).all()
    mean = loss_of(*dirty, inputs=inputs, metric=metric, mask=keep)
    torch.testing.assert_close(mean, got.sum() / 4)
    for x in torch.autograd.grad(mean, dirty):
        assert (x[:, ~keep] == 0).all() and x.isfinite().all()
    nothing = loss_of(*dirty, inputs=inputs, metric=metric, mask=torch.zeros(5, dtype=torch.bool))
    assert nothing.item() == 0
    assert all((x == 0).all() for x in torch.autograd.grad(nothing, dirty))


@pytest.mark.parametrize("metric", METRICS)
def test_minus_infinity_in_the_logits_is_a_mask(metric):
    a, b = maps(2, 4, 4)
    lower = torch.ones(4, 4).tril(-1).bool()  # the first row has no key
    x, y = (t.masked_fill(~lower, -math.inf).requires_grad_() for t in (a, b))
    got = loss_of(x, y, inputs="logits", metric=metric)
    if metric in ("js", "kl", "sym_kl"):
        torch.testing.assert_close(got, loss_of(a, b, inputs="logits", metric=metric, mask=lower))
    assert all(g.isfinite().all() for g in torch.autograd.grad(got, (x, y)))
    assert loss_of(torch.full((1, 3), math.nan), torch.zeros(1, 3), inputs="logits", metric=metric).isnan()


@pytest.mark.parametrize("metric", ["js", "kl", "sym_kl"])
@pytest.mark.parametrize("inputs", ["probs", "logits"])
def test_close_maps_keep_their_digits(metric, inputs):
    """Maps 1e-3 apart, where the textbook formula in float32 is mostly rounding: relative error under 1 %."""
    a, noise = maps(8, 64)
    b = a + 1e-3 * noise
    x, y = (t.float().softmax(-1) if inputs == "probs" else t.float() for t in (a, b))
    got = loss_of(x, y, inputs=inputs, metric=metric)
    exact = loss_of(x.double(), y.double(), inputs=inputs, metric=metric)
    assert abs(got / exact - 1) < 1e-2
    lp, lq = (x.log(), y.log()) if inputs == "probs" else (x.log_softmax(-1), y.log_softmax(-1))
    textbook = F.kl_div(lq, lp, log_target=True, reduction="batchmean")
    if metric == "kl" and inputs == "logits":
        assert abs(got - exact) < 0.2 * abs(textbook - exact)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("inputs", ["probs", "logits"])
def test_second_derivatives(metric, inputs):
    a, b = maps(2, 3, 4)
    x, y = ((t.softmax(-1) if inputs == "probs" else t).detach().requires_grad_() for t in (a, b))
    assert torch.autograd.gradgradcheck(lambda x, y: loss_of(x, y, inputs=inputs, metric=metric), (x, y))


@pytest.mark.parametrize("causal", [False, True])
def test_qk_maps_are_those_of_torch_attention(causal):
    """With the identity as values, scaled_dot_product_attention returns its map."""
    generator = torch.Generator().manual_seed(1)
    q1, k1, q2, k2 = (torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    eye = torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)
    a, b = (F.scaled_dot_product_attention(q, k, eye, is_causal=causal) for q, k in ((q1, k1), (q2, k2)))
    for metric in ("kl", "sym_kl", "js"):
        torch.testing.assert_close(from_qk(q1, k1, q2, k2, metric=metric, causal=causal), loss_of(a, b, metric=metric))
    mask = torch.rand(2, 1, 5, 5, generator=generator) > 0.4
    mask[..., 0] = True
    a, b = (F.scaled_dot_product_attention(q, k, eye, attn_mask=mask, scale=0.2) for q, k in ((q1, k1), (q2, k2)))
    torch.testing.assert_close(from_qk(q1, k1, q2, k2, scale=0.2, mask=mask), loss_of(a, b, metric="kl", mask=mask))


def test_qk_closed_form_gradient_and_widths():
    """dS2 = P2 - P1 for kl; and a teacher of another width, each with its own 1 / sqrt(d)."""
    generator = torch.Generator().manual_seed(2)
    q1, k1 = (torch.randn(1, 1, 4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    q2, k2 = (torch.randn(1, 1, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    q2.requires_grad_()
    from_qk(q1, k1, q2, k2, reduction="sum").backward()
    p1, p2 = (q1 @ k1.mT / 3).softmax(-1), (q2 @ k2.mT / 5**0.5).softmax(-1)
    torch.testing.assert_close(q2.grad, ((p2 - p1) @ k2 / 5**0.5).detach())


def test_published_formulas():
    """R-Drop's loss of two passes, MiniLM's of attention, TinyBERT's of raw scores, as their authors write them."""
    a, b = maps(2, 3, 4, 5)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    r_drop = (F.kl_div(p, q.exp(), reduction="sum") + F.kl_div(q, p.exp(), reduction="sum")) / 2
    torch.testing.assert_close(loss_of(a, b, inputs="logits", metric="sym_kl", reduction="sum"), r_drop)
    teacher, student = p.exp(), q.exp()  # the mean over heads and positions of KL(teacher || student)
    mini_lm = (teacher * (teacher.log() - student.log())).sum(-1).mean(dim=(1, 2)).mean()
    torch.testing.assert_close(loss_of(a, b, inputs="logits", metric="kl"), mini_lm)
    scores = [
        torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.3, x - 1e4, x) for x in (a, b)
    ]
    student, teacher = (torch.where(x <= -1e2, torch.zeros_like(x), x) for x in scores)
    x, y = (t.requires_grad_() for t in scores)
    got = loss_of(x, y, inputs="scores", metric="mse")
    torch.testing.assert_close(got, F.mse_loss(student, teacher))
    assert all(
        (g[t.detach() <= -1e2] == 0).all() for g, t in zip(torch.autograd.grad(got, (x, y)), (x, y), strict=True)
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("inputs", ["probs", "logits"])
def test_identical_maps_have_no_loss_and_no_gradient(metric, inputs):
    """In float32, on kernels: exactly. (A row of probabilities has the slope 1 in "kl", which is not symmetric.)"""
    a = maps(3, 4, 37, dtype=torch.float32)[0] * 4
    a = a.softmax(-1) if inputs == "probs" else a
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    loss = loss_of(x, y, inputs=inputs, metric=metric)
    assert loss.item() == 0
    if (metric, inputs) != ("kl", "probs"):
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize("inputs", ["probs", "scores"])
def test_rows_of_one_number_have_no_direction_to_turn_to(inputs):
    """The cosine of rows with one key, or one that is not 0, has a gradient of exactly 0."""
    a, b = (t.abs() if inputs == "probs" else t for t in maps(2, 40, 1, dtype=torch.float32))
    hot = F.pad(a, (3, 14)), F.pad(b, (3, 14))
    mask = torch.arange(18) == 3
    for x, y, keep in ((a, b, None), (*hot, None), (hot[0] + 1, hot[1] + 1, mask)):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        rows = loss_of(x, y, inputs=inputs, metric="cosine", mask=keep, reduction="none")
        assert torch.isin(rows, torch.tensor([0.0, 2.0])).all()
        along = (slice(None), slice(None), 3 if x.shape[-1] > 1 else 0)
        least = 1e-6 if INTERPRETING else 0  # what runs there has no fused multiplications
        assert all(g[along].abs().max() <= least for g in torch.autograd.grad(rows.sum(), (x, y)))


def test_a_held_side_gets_no_gradient():
    a, b = (x.requires_grad_() for x in maps(2, 3, 5, dtype=torch.float32))
    loss = loss_of(a, b, inputs="logits", stop_gradient="a")
    held, moved = torch.autograd.grad(loss, (a, b), allow_unused=True)
    assert held is None
    torch.testing.assert_close(moved, torch.autograd.grad(loss_of(a.detach(), b, inputs="logits"), b)[0])


def test_mean_over_heads():
    """Of logits the mean of their softmax; heads without a key are left out of it, rows without a head of the loss."""
    a, b = maps(2, 3, 4, 5)
    means = [x.softmax(-1).mean(1) for x in (a, b)]
    torch.testing.assert_close(loss_of(a, b, inputs="logits", head_mean=True), loss_of(*means))
    a[0, 1, 2], a[1, :, 3] = -math.inf, -math.inf
    rows = loss_of(a, b, inputs="logits", head_mean=True, reduction="none")
    two = a[0, [0, 2], 2].softmax(-1).mean(0), b[0, :, 2].softmax(-1).mean(0)
    torch.testing.assert_close(rows[0, 2], loss_of(*(x[None] for x in two), reduction="sum"))
    assert rows.shape == (2, 4) and rows[1, 3] == 0
    torch.testing.assert_close(loss_of(a, b, inputs="logits", head_mean=True), rows.sum() / 7)


def test_masks_are_not_expanded():
    """A mask of the keys alone, and one of long rows with other strides: as the expanded one."""
    a, b = maps(2, 3, 4, 700, dtype=torch.float32)
    keep = torch.rand(2, 1, 1, 700, generator=torch.Generator().manual_seed(5)) > 0.5
    added = torch.randn(700, 4, generator=torch.Generator().manual_seed(6)).T
    for mask in (keep, added):
        one, other = (loss_of(a, b, inputs="logits", mask=m) for m in (mask, mask.expand(a.shape).contiguous()))
        assert torch.equal(one, other)


def test_layers():
    a, b = maps(2, 3, 4, 5)
    c, d = maps(1, 7, 2, seed=1)
    one, two = (loss_of(x, y, inputs="logits") for x, y in ((a, b), (c, d)))
    torch.testing.assert_close(loss_of([a, c], (b, d), inputs="logits"), (one + two) / 2)
    torch.testing.assert_close(loss_of([a, c], [b, d], inputs="logits", layer_weights=[1.0, 3.0]), one + 3 * two)
    rows = loss_of([a, c], [b, d], inputs="logits", layer_weights=[1.0, 3.0], reduction="none")
    assert [r.shape for r in rows] == [(2, 3, 4), (1, 7)]
    torch.testing.assert_close(rows[1], 3 * loss_of(c, d, inputs="logits", reduction="none"))
