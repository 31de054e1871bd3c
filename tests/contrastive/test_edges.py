"""Contrastive losses at their edges: zero and identical rows, no negatives left, large scales, late training."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastloss import NegativeSampling, clip_loss, core, info_nce, nt_xent_loss, siglip_loss, supcon_loss
from tests.conformance.tools import INTERPRETING
from tests.contrastive.test_formulas import close, gradients, randn, unit

DEBIASED = NegativeSampling(tau_plus=0.1, hardness=1.0, margin=0.1)
ALL = {
    "info_nce": info_nce,
    "symmetric": lambda q, k, **o: info_nce(q, k, symmetric=True, **o),
    "decoupled": lambda q, k, **o: info_nce(q, k, include_positive=False, **o),
    "debiased": lambda q, k, **o: info_nce(q, k, sampling=DEBIASED, **o),
    "clip": lambda q, k, **o: clip_loss(q, k, logit_scale=10.0, **o),
    "siglip": lambda q, k, **o: siglip_loss(q, k, logit_scale=10.0, logit_bias=-10.0, **o),
    "nt_xent": nt_xent_loss,
    "supcon": lambda q, k, **o: supcon_loss(q, torch.arange(len(q)) // 2, **o),
}


@pytest.mark.parametrize("name", ALL)
def test_identical_rows_one_row_and_zero_vectors(name):
    identical = unit(1, 5).expand(6, 5)
    holed = torch.cat((torch.zeros(2, 5, dtype=torch.float64), randn(4, 5)))
    for q, k in ((identical, identical), (unit(1, 5), unit(1, 5, seed=1)), (holed, holed.roll(1, 0)), (holed, holed)):
        loss, grads = gradients(ALL[name], q, k)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_zero_vectors_have_similarity_and_gradient_zero():
    q = torch.cat((torch.zeros(1, 5), torch.full((1, 5), 1e-20), torch.randn(2, 5)))
    loss, (grad, _) = gradients(lambda a, b: info_nce(a, b, reduction="none").sum(), q, torch.randn(4, 5))
    assert (grad[:2] == 0).all() and (grad[2:] != 0).any()
    close(info_nce(q, torch.randn(4, 5), reduction="none")[:2], torch.full((2,), math.log(4)))


def test_identical_rows_give_log_of_the_candidates():
    same = torch.ones(6, 5)
    assert info_nce(same, same).item() == pytest.approx(math.log(6), rel=1e-6)
    assert nt_xent_loss(same, same).item() == pytest.approx(math.log(11), rel=1e-6)
    assert not info_nce(same, same, return_lse=True).top1.any()


@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_negatives_left(include_positive, symmetric):
    """All ids equal, or one row: loss 0 and gradient 0 by definition."""
    options = {"include_positive": include_positive, "symmetric": symmetric, "label_smoothing": 0.1, "return_lse": True}
    for rows, ids in ((5, torch.full((5,), 3)), (1, None)):
        q, k = randn(rows, 4), randn(rows, 4, seed=1)
        loss, grads = gradients(lambda a, b, ids=ids: info_nce(a, b, query_ids=ids, **options).loss, q, k)
        assert loss.item() == 0 and all((g == 0).all() for g in grads)
        lse = info_nce(q, k, query_ids=ids, **options).lse
        assert lse.isfinite().all() if include_positive else (lse == -math.inf).all()
    nothing = torch.empty(0, 4, dtype=torch.float64)
    assert info_nce(randn(5, 4), randn(5, 4), nothing, include_positive=include_positive).item() == 0
    ids = torch.tensor([1, 1, 2])  # every row but none of its own is masked for some: the others go on
    q, k = unit(3, 4), unit(3, 4, seed=1)
    keep = torch.tensor([[False, False, True], [False, False, True], [True, True, False]])
    got = info_nce(q, k, key_ids=ids, include_positive=False, reduction="none")
    logits = q @ k.T / 0.1
    close(got, logits.masked_fill(~keep, -torch.inf).logsumexp(1) - logits.diagonal())
    one, (grad,) = gradients(lambda z: nt_xent_loss(z[:1], z[1:], include_positive=include_positive), unit(2, 4))
    assert one.item() == 0 and (grad == 0).all()


def test_supcon_without_positives_and_without_negatives():
    z = randn(4, 3)
    alone, (grad,) = gradients(lambda f: supcon_loss(f, torch.arange(4)), z)
    assert alone.item() == 0 and (grad == 0).all()
    one_class, (grad,) = gradients(lambda f: supcon_loss(f, torch.zeros(4).int(), include_positive=False), z)
    assert one_class.item() == 0 and (grad == 0).all()
    rows = supcon_loss(z, torch.tensor([0, 0, 1, 2]), reduction="none")
    assert (rows[:2] > 0).all() and (rows[2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_200_on_unnormalised_embeddings(dtype):
    """A fixed maximum underflows or overflows here; the running one does not."""
    q, k = (2 * randn(16, 64, seed=s).to(dtype) for s in (0, 1))
    labels = torch.arange(16)
    for fn in (
        lambda a, b: clip_loss(a, b, logit_scale=200.0),
        lambda a, b: info_nce(a, b, temperature=1 / 200, normalize=False, symmetric=True),
    ):
        loss, grads = gradients(fn, q, k)
        s = 200.0 * q.double() @ k.double().T
        close(loss.double(), (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2, rtol=1e-5, atol=0)
        assert loss.item() > 1000 and all(g.isfinite().all() for g in grads)
    unaligned = unit(512, 768, dtype=torch.float32), unit(512, 768, seed=1, dtype=torch.float32)
    s = 200.0 * unaligned[0].double() @ unaligned[1].double().T
    close(info_nce(*unaligned, temperature=1 / 200).double(), F.cross_entropy(s, torch.arange(512)), rtol=1e-5, atol=0)


def test_late_training_keeps_its_digits():
    """p_ii -> 1: log-sum-exp minus the positive logit would be rounding noise in float32."""
    q = F.normalize(torch.eye(8) + 0.01 * randn(8, 8, dtype=torch.float32), dim=1)
    loss, (grad,) = gradients(lambda a: info_nce(a, q, temperature=0.05), q)
    exact, (wanted,) = gradients(lambda a: info_nce(a, q.double(), temperature=0.05), q.double())
    assert exact < 1e-7
    close(loss.double(), exact, rtol=1e-4, atol=0)
    assert ((grad - wanted).abs().max() / wanted.abs().max()).item() < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_permutation_equivariance(name):
    order = torch.tensor([2, 3, 0, 1, 5, 4])  # keeps supcon's label pairs together
    q, k = randn(6, 5), randn(6, 5, seed=1)
    loss, grads = gradients(ALL[name], q, k)
    moved, moved_grads = gradients(ALL[name], q[order], k[order])
    close(moved, loss)
    close(moved_grads, tuple(g[order] for g in grads))


@pytest.mark.parametrize("name", ALL)
def test_autocast_takes_weights_of_any_dtype(name):
    """torch's own cat of float16 raises under the CPU's autocast."""
    q, k, weights = randn(6, 5), randn(6, 5, seed=1).half(), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25]).half()
    plain = ALL[name](q, k, weights=weights)
    with torch.autocast("cpu", torch.bfloat16):
        close(ALL[name](q, k, weights=weights), plain)


def test_empty_batch():
    none = torch.empty(0, 4)
    for fn in (
        info_nce,
        nt_xent_loss,
        lambda q, k, **o: clip_loss(q, k, logit_scale=1.0, **o),
        lambda q, k, **o: siglip_loss(q, k, logit_scale=1.0, logit_bias=0.0, **o),
        lambda q, k, **o: supcon_loss(q, torch.empty(0).long(), **o),
    ):
        assert fn(none, none, reduction="sum").item() == 0
        assert fn(none, none, reduction="none").shape == (0,)
        with pytest.raises(ValueError, match="mean of an empty batch"):
            fn(none, none)


def test_temperatures_and_scales_at_the_ends_of_float32():
    """Losses near 1e38 and logits near 0 are what float64 has."""
    q, k, bank, own = (unit(*s, seed=i).float() for i, s in enumerate(((4, 5), (4, 5), (3, 5), (4, 3, 5))))
    for temperature in (1.2e-38, 3e38):
        for negatives in (None, bank, own):
            ours, exact = (
                info_nce(*(None if x is None else x.to(t) for x in (q, k, negatives)), temperature=temperature)
                for t in (torch.float32, torch.float64)
            )
            close(ours.double(), exact, rtol=1e-5, atol=0)
        exact = clip_loss(q.double(), k.double(), logit_scale=temperature)
        close(clip_loss(q, k, logit_scale=temperature), exact.float(), rtol=1e-5, atol=0)
    for option, value in (("temperature", 1e-45), ("temperature", 1e39), ("bias", -1e39)):
        with pytest.raises(ValueError, match=f"{option}: expected a number that float32 holds"):
            info_nce(q, k, **{option: value})


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64])
def test_ids_of_no_integers_are_refused_by_name(dtype):
    q, k, ids = randn(4, 3), randn(4, 3, seed=1), torch.arange(4).to(dtype)
    calls = {
        "query_ids": lambda: info_nce(q, k, query_ids=ids), "key_ids": lambda: info_nce(q, k, key_ids=ids),
        "targets": lambda: info_nce(q, k, targets=ids), "labels": lambda: supcon_loss(q, ids),
        "image_ids": lambda: clip_loss(q, k, logit_scale=1.0, image_ids=ids),
        "ids": lambda: nt_xent_loss(q, k, ids=ids),
        "text_ids": lambda: siglip_loss(q, k, logit_scale=1.0, logit_bias=None, text_ids=ids),
    }  # fmt: skip
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name}: expected an integer tensor, got {dtype}"):
            call()


def test_targets_at_the_ends_of_64_bits_are_refused():
    q, k = randn(4, 3), randn(4, 3, seed=1)
    for value in (2**63 - 1, -(2**63)):
        with pytest.raises(ValueError, match=f"targets: expected indices of key's 4 rows, 0 to 3, got .*{value}"):
            info_nce(q, k, targets=torch.tensor([0, 1, 2, value]))


def test_labels_of_any_integers_are_alike():
    z, labels = randn(5, 3, dtype=torch.float32), torch.tensor([0, 1, 0, 1, 2])
    expected = supcon_loss(z, labels)
    for other in (labels.int(), labels.to(torch.uint8), labels.to(torch.int8) - 128, labels + (2**63 - 3)):
        assert torch.equal(supcon_loss(z, other), expected)


@pytest.mark.parametrize("length", [1e18, 3e19, 1e30])
@pytest.mark.parametrize("shape", [(6, 8), (5, 6, 8)], ids=["shared", "of each query"])
def test_lengths_whose_square_float32_cannot_hold(length, shape):
    """The loss of embeddings of any length is that of their directions, or NaN: never another number."""
    generator = torch.Generator().manual_seed(0)
    query, key, negatives = (torch.randn(s, generator=generator) for s in ((5, 8), (5, 8), shape))
    expected = info_nce(query, key, negatives)
    got = info_nce(query, key, length * negatives)
    assert got.isnan() or (got - expected).abs() <= 1e-5 * expected
    assert length > 1e18 or not got.isnan()


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_bias_of_another_device_is_named(shape):
    rows = torch.randn(3, 4)
    with pytest.raises(ValueError, match="bias: expected it on the device of .*, cpu, got meta"):
        info_nce(rows, rows, bias=torch.zeros(shape, device="meta"))


INFINITE = {  # losses of (query, key), which are infinite where a query is
    "info_nce": lambda q, k, **o: info_nce(q, k, normalize=False, **o),
    "decoupled": lambda q, k, **o: info_nce(q, k, normalize=False, include_positive=False, **o),
    "clip": lambda q, k, **o: clip_loss(q, k, logit_scale=2.0, **o),
    "clip, ids": lambda q, k, **o: clip_loss(q, k, logit_scale=2.0, image_ids=torch.arange(len(q)), **o),
    "smoothed": lambda q, k, **o: info_nce(q, k, normalize=False, label_smoothing=0.1, **o),
    "own": lambda q, k, **o: info_nce(q, k, k.roll(1, 0)[:, None].expand(-1, 2, -1), normalize=False, **o),
}


@pytest.mark.parametrize("backend", ["triton"] if INTERPRETING else ["reference", "cpp"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen keys", "all learn"])
@pytest.mark.parametrize("name", INFINITE)
def test_an_infinite_loss_has_no_finite_gradient(name, frozen, backend):
    """Of the queries alone, too: a loss scaler sees nothing else where the keys are frozen."""
    if backend == "cpp" and core.backend_report()["cpp"] != "available":
        pytest.skip("the C++ kernels are not built")
    q, k = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    q[1, 0], k[:, 0], k[1, 0] = torch.inf, 1.0, -1.0
    if name.startswith("clip"):  # whose columns may be infinite alone: all logits of row 1 are -infinity
        k[:, 0] = -1.0
    q.requires_grad_()
    k.requires_grad_(not frozen)
    with core.use_backend(backend):
        loss = INFINITE[name](q, k)
        assert loss == torch.inf or loss.isnan()
        grad = torch.autograd.grad(loss, q)[0]
        assert not grad[1].isfinite().all()
        if not name.startswith("clip"):  # whose columns all have the query among their negatives
            assert INFINITE[name](q, k, reduction="none").isfinite().tolist() == [i != 1 for i in range(5)]
