"""Feature distance beyond the conformance tests: torch's own losses, ties, edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss import FeatureDistance, feature_distance, lpips_distance


@pytest.mark.parametrize("layers", [1, 5, 40])
@pytest.mark.parametrize("criterion", ["l1", "l2", "smooth_l1"])
def test_sums_of_torchs_own_losses(layers, criterion):
    torch.manual_seed(1)
    of = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[criterion]
    features = [torch.randn(2, 1 + i, 3, 5, requires_grad=True) for i in range(layers)]
    targets = [torch.randn_like(f) for f in features]
    weights = [0.5 + i for i in range(layers)]
    for reduction in ("mean", "sum"):
        ours = feature_distance(features, targets, weights=weights, criterion=criterion, reduction=reduction)
        torchs = sum(w * of(f, t, reduction=reduction) for w, f, t in zip(weights, features, targets, strict=True))
        torch.testing.assert_close(ours, torchs)
        torch.testing.assert_close(torch.autograd.grad(ours, features), torch.autograd.grad(torchs, features))


def test_relu_ties_get_the_gradient_zero():
    torch.manual_seed(2)
    f, t = torch.randn(2, 4, 6, 6).relu().requires_grad_(), torch.randn(2, 4, 6, 6).relu()
    tied = f.detach() == t
    assert tied.float().mean() > 0.15
    for criterion in ("l1", "l2", "charbonnier", "smooth_l1"):
        (g,) = torch.autograd.grad(feature_distance([f], [t], criterion=criterion), f)
        assert (g[tied] == 0).all() and (g[~tied] != 0).all()
    (g,) = torch.autograd.grad(feature_distance([f], [t]), f)
    assert torch.equal(g, (f.detach() - t).sign() / f.numel())


def test_none_is_one_value_a_sample_whose_mean_is_mean():
    torch.manual_seed(3)
    features = [torch.randn(3, 4, 5, 2), torch.randn(3, 7), torch.randn(3)]
    targets = [torch.randn_like(f) for f in features]
    each = feature_distance(features, targets, weights=[1, 2, 0.5], reduction="none")
    by_hand = [
        sum(w * (f[n] - t[n]).abs().mean() for w, f, t in zip((1, 2, 0.5), features, targets, strict=True))
        for n in range(3)
    ]
    torch.testing.assert_close(each, torch.stack(by_hand))
    torch.testing.assert_close(each.mean(), feature_distance(features, targets, weights=[1, 2, 0.5]))
    assert feature_distance([torch.zeros(0, 3)], [torch.zeros(0, 3)], reduction="none").shape == (0,)
    with pytest.raises(ValueError, match=r"features\[1\]: expected as many samples as features\[0\], 3, got 2"):
        feature_distance([features[0], features[1][:2]], [targets[0], targets[1][:2]], reduction="none")
    with pytest.raises(ValueError, match="0-D"):
        feature_distance([torch.zeros(())], [torch.zeros(())], reduction="none")


def test_layers_of_size_one_and_mixed_dtypes():
    f = [torch.tensor(2.0), torch.tensor([1.0, 4.0], dtype=torch.bfloat16), torch.full((1, 1, 1, 1), 3.0).half()]
    t = [torch.tensor(0.5), torch.zeros(2), torch.zeros(1, 1, 1, 1)]
    assert feature_distance(f, t).item() == 1.5 + 2.5 + 3.0
    assert feature_distance(f, t, criterion="l2", reduction="sum").item() == 2.25 + 17.0 + 9.0
    assert feature_distance([f[0].double()], [t[0]]).dtype == torch.float64


def test_half_precision_whose_eager_sum_overflows():
    f, t = torch.full((1, 8, 128, 128), 3.0).half().requires_grad_(), torch.ones(1, 8, 128, 128).half()
    assert F.l1_loss(f, t, reduction="sum").isinf()
    total = feature_distance([f], [t], reduction="sum")
    assert total.dtype == torch.float32 and total.item() == 2 * 8 * 128 * 128
    total.backward()
    assert (f.grad == 1).all()
    far = torch.tensor([6e4]).half()
    assert feature_distance([far], [-far]).item() == 2 * far.float().item()  # the difference is no half either
    assert feature_distance([far], [-far], criterion="l2").isfinite()


def test_empty_layers_raise_under_mean_and_add_nothing_to_a_sum():
    empty = torch.zeros(0, 3, 4, 4)
    with pytest.raises(ValueError, match="mean of an empty batch"):
        feature_distance([empty], [empty])
    with pytest.raises(ValueError, match="mean of an empty batch"):
        feature_distance([torch.zeros(2, 0)], [torch.zeros(2, 0)], reduction="none")
    assert feature_distance([empty], [empty], reduction="sum").item() == 0


def test_the_module_compiles_into_one_graph():
    torch._dynamo.reset()
    module = FeatureDistance(weights=[1.0, 0.25], criterion="charbonnier", eps=1e-3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    features = [torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 6, 4, 4, requires_grad=True)]
    targets = [torch.randn_like(f) for f in features]
    got, expected = compiled(features, targets), module(features, targets)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, features), torch.autograd.grad(expected, features))


@pytest.mark.parametrize("of", [feature_distance, lambda f, t: lpips_distance(f, t, None, spatial=True).sum()])
def test_functorch_forward_mode_and_double_backward_through_lists(of):
    torch.manual_seed(7)
    features, targets = ([torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)] for _ in range(2))
    leaves = [f.clone().requires_grad_() for f in features]
    expected = list(torch.autograd.grad(of(leaves, targets), leaves))
    torch.testing.assert_close(torch.func.grad(lambda f: of(f, targets))(features), expected)
    directions = [torch.randn_like(f) for f in features]
    _, tangent = torch.func.jvp(lambda f: of(f, targets), (features,), (directions,))
    torch.testing.assert_close(tangent, sum((g * d).sum() for g, d in zip(expected, directions, strict=True)))
    stacked = torch.func.vmap(lambda f: of(f, targets))([torch.stack((f, 2 * f)) for f in features])
    torch.testing.assert_close(stacked, torch.stack((of(features, targets), of([2 * f for f in features], targets))))
