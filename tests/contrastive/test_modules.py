"""Contrastive losses: gradients without a graph, modules, half precision, and that no value is looked at."""

from __future__ import annotations

import pytest
import torch

import fastloss
from fastloss import (
    ClipLoss,
    InfoNCELoss,
    NegativeSampling,
    clip_loss,
    info_nce,
    loss_and_grads,
    nt_xent_loss,
    siglip_loss,
    supcon_loss,
)
from tests.contrastive.test_formulas import close, gradients, randn, scalar


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_loss_and_grads(around):
    with around():
        q, k, bank = randn(5, 4), randn(5, 4, seed=1), randn(3, 4, seed=2)
        t = torch.nn.Parameter(scalar(0.2))
        out = loss_and_grads(q, k, bank, temperature=t, in_batch=True)
    loss, (gq, gk, gt) = gradients(
        lambda a, b, c: info_nce(a, b, randn(3, 4, seed=2), temperature=c, in_batch=True),
        randn(5, 4),
        randn(5, 4, seed=1),
        scalar(0.2),
    )
    close(out.loss, loss.detach())
    close(out.query, gq)
    close(out.key, gk)
    assert out.negatives is None and not out.loss.requires_grad and not out.query.requires_grad
    if around is not torch.inference_mode:
        close(out.options["temperature"], gt)


def test_loss_and_grads_leaves_the_callers_graph_alone():
    base = randn(5, 4).requires_grad_()
    q, bank = base * 2, randn(3, 4, seed=2).requires_grad_()
    out = loss_and_grads(q, randn(5, 4, seed=1), bank)
    assert base.grad is None and bank.grad is None and out.negatives.shape == bank.shape
    q.backward(out.query)  # gradient caching's second pass
    wanted = torch.autograd.grad(info_nce(base * 2, randn(5, 4, seed=1), bank), base)[0]
    close(base.grad, wanted)
    half = loss_and_grads(q.bfloat16(), q.bfloat16(), loss_fn=clip_loss, logit_scale=2.0)
    assert half.query.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    with pytest.raises(ValueError, match="loss_fn: expected a scalar loss"):
        loss_and_grads(q, q, reduction="none")


def test_modules_learn_and_take_calls():
    q, k = randn(4, 3), randn(4, 3, seed=1)
    scale = torch.nn.Parameter(torch.tensor(3.0))
    module = ClipLoss(logit_scale=scale)
    module(q, k).backward()
    assert scale.grad.isfinite() and list(module.state_dict()) == ["logit_scale"]
    close(ClipLoss()(q, k, logit_scale=3.0), module(q, k))
    with pytest.raises(TypeError, match="logit_scale"):
        ClipLoss()(q, k)
    assert "temperature=0.2" in repr(InfoNCELoss(temperature=0.2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(dtype):
    q, k = randn(6, 1152, seed=4).to(dtype), randn(6, 1152, seed=5).to(dtype)
    loss, grads = gradients(info_nce, q, k)
    close(loss, info_nce(q.float(), k.float()), rtol=0, atol=0)
    assert loss.dtype == torch.float32 and all(g.dtype == dtype for g in grads)
    mixed = info_nce(q, k.double())
    assert mixed.dtype == torch.float64


def test_values_of_tensor_options_are_not_looked_at():
    """No step may wait for the device: on the meta device every look at a value would raise."""
    q, k = torch.empty(4, 3, device="meta"), torch.empty(4, 3, device="meta")
    t, ids = torch.empty((), device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    sampling = NegativeSampling(tau_plus=0.1, hardness=1.0, margin=0.1)
    weights = torch.empty(4, device="meta")
    for loss in (
        info_nce(q, k, temperature=t, symmetric=True, query_ids=ids, weights=weights, sampling=sampling),
        info_nce(q, k, k, temperature=t, targets=ids, include_positive=False, label_smoothing=0.1),
        clip_loss(q, k, logit_scale=t, logit_bias=t, weights=weights),
        siglip_loss(q, k, logit_scale=t, logit_bias=t, image_ids=ids, weights=weights),
        siglip_loss(q, k[:3], logit_scale=t, logit_bias=t, image_groups=ids, text_groups=ids[:3], weights=weights),
        clip_loss(q, k[:3], logit_scale=t, logit_bias=t, image_groups=ids, text_groups=ids[:3]),
        supcon_loss(q, ids, temperature=t, weights=weights),
        nt_xent_loss(q, k, temperature=t, ids=ids, weights=weights),
    ):
        assert loss.device.type == "meta" and loss.shape == ()


def test_public_names():
    for name in (
        "info_nce",
        "clip_loss",
        "siglip_loss",
        "supcon_loss",
        "nt_xent_loss",
        "loss_and_grads",
        "InfoNCELoss",
        "ClipLoss",
        "SigLipLoss",
        "SupConLoss",
        "NTXentLoss",
        "ContrastiveLoss",
    ):
        assert name in fastloss.__all__
