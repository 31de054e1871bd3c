"""Gradients through networks in float16, whatever arrives from above; gradients made in the forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastloss import Execution, PerceptualLoss
from fastloss.perceptual.criteria import Criterion, gradient_counts
from fastloss.perceptual.scale import ScaleBack, ScaleUp, base_of, power_below
from tests.perceptual.test_backbones import needs_torchvision
from tests.perceptual.test_perceptual_loss import images

TAPS = ["relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"]
SCALES = (1.0, 2.0**10, 2.0**16, 2.0**20)


class Listed(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, stride=2)
        self.to(dtype)

    def forward(self, x):
        a = self.a(x).relu()
        return [a, self.b(a)]


def gradient(loss, targets, image_pred, upstream=1.0):
    leaf = image_pred.detach().requires_grad_()
    return torch.autograd.grad(upstream * loss(targets, leaf), leaf)[0]


def zeros(t):
    return (t == 0).double().mean().item()


@needs_torchvision
@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_five_taps_of_vgg_in_float16_under_any_loss_scale(criterion):
    """Targets far below every feature, so that no sign flips. All that differs from the float32 network is what float16
    rounds: 2^-11 of each activation, where now and then a ReLU or the choice of a pool turns over (3 % of the gradient
    of a random network). A gradient of the float32 network is hardly ever 0; in float16 one in a thousand may be."""
    options = {"layers": TAPS, "pretrained": False, "criterion": criterion}
    torch.manual_seed(1)
    half = PerceptualLoss("vgg16", execution=Execution(dtype=torch.float16), **options)
    single = PerceptualLoss("vgg16", **options)
    single.backbones.load_state_dict(half.backbones.state_dict())
    _, image_pred = images(1, 64)
    targets = [[-1 - f.abs().amax() * torch.ones_like(f) for f in single.encode(image_pred.detach())[0]]]
    exact = gradient(single, targets, image_pred)
    found = [gradient(half, targets, image_pred, scale) / scale for scale in SCALES]
    for got in found:
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert torch.equal(got, found[0])  # powers of two, undone exactly
    assert (found[0] - exact).norm() < 0.05 * exact.norm()
    assert zeros(found[0]) <= zeros(exact) + 1e-3
    half_pred = image_pred.detach().half()
    for got in (gradient(half, targets, half_pred, 2.0**16), gradient(half, targets, half_pred, 2.0**10)):
        assert got.dtype == torch.float16 and got.isfinite().all() and zeros(got) <= zeros(exact) + 1e-2


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("weights", [[1e-30, 1e-30], [1e5, 1.0], [3e38, 1e38]])
def test_weights_of_any_size_in_float16(weights, chunk):
    """The gradient of the float32 network, times the weight."""
    single = PerceptualLoss(Listed(), layer_weights=[w / weights[0] for w in weights])
    half = PerceptualLoss(Listed(), layer_weights=weights, execution=Execution(dtype=torch.float16, chunk=chunk))
    image, image_pred = images(3, 16)
    targets = [[f - 0.5 for f in single.encode(image)[0]]]
    upstream = min(1.0, 2.0**32 / weights[0])
    expected = gradient(single, targets, image_pred)
    got = gradient(half, targets, image_pred, upstream) / (upstream * weights[0])
    assert (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("upstream", SCALES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_made_in_the_forward_are_not_rounded_before_the_scale_arrives(dtype, upstream):
    """The gradient of a mean over 4 x 3 x 32 x 32 is as small as 1e-8: 0 in float16 until the loss scale is there."""
    image, image_pred = images(4, 32)
    image, image_pred = image.to(dtype), image_pred.detach().to(dtype)
    net = Listed()
    whole, exact, pieces = (
        PerceptualLoss(net, layer_weights=[0.01, 0.01], execution=Execution(chunk=chunk)) for chunk in (None, None, 2)
    )
    expected = gradient(exact, image.float(), image_pred.float(), upstream).to(dtype)
    for loss in (whole, pieces):
        got = gradient(loss, image, image_pred, upstream)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=2**-24)
        assert zeros(got) <= zeros(expected) + 1e-3


@pytest.mark.parametrize("normalize", [True, False])
def test_a_callable_that_computes_in_the_images_float16(normalize):
    """Its network has no weights that the loss could see: the dtype of the image says how it computes."""
    net = Listed(torch.float16).requires_grad_(False)
    image, image_pred = (x.detach().half() for x in images(2, 32))
    exact = gradient(PerceptualLoss(copy.deepcopy(net).float(), normalize=normalize), image.float(), image_pred.float())
    call = (lambda x: net(x.half())) if normalize else net.forward
    for chunk in (None, 1):
        loss = PerceptualLoss(call, normalize=normalize, execution=Execution(chunk=chunk))
        got = gradient(loss, image, image_pred, 2.0**16).float() / 2**16
        if not normalize:  # with it, what the callable does inside is its own affair
            assert (got - exact).norm() < 0.1 * exact.norm()  # signs of small differences flip
            assert zeros(got) <= zeros(exact) + 1e-2


@pytest.mark.parametrize("upstream", [float("inf"), float("nan"), 0.0])
def test_an_upstream_that_is_no_number_arrives(upstream):
    image, image_pred = images(1, 16)
    got = gradient(PerceptualLoss(Listed(), execution=Execution(dtype=torch.float16)), image, image_pred, upstream)
    assert (got == 0).all() if upstream == 0 else not got.isfinite().any()


def test_power_below():
    for value, power in ((1.0, 1.0), (-3.0, 2.0), (0.75, 0.5), (2.0**-126, 2.0**-126), (3e38, 2.0**127), (0.0, 1.0),
                         (1e-40, 1.0), (float("inf"), 1.0), (float("nan"), 1.0)):  # fmt: skip
        got = power_below(torch.tensor([value, 0.0]))
        assert got.item() == power and got.dtype == torch.float32 and got.ndim == 0
    assert power_below(torch.zeros(0)).item() == 1.0
    assert power_below(torch.tensor(5.0, dtype=torch.float64)).item() == 4.0


def test_base_of():
    assert base_of([1024.0, 2048.0], [1.0, 1.0]) == 512.0  # the largest gradient, 1 / 1024, becomes 1/2
    assert base_of([1024.0, 2048.0], [0.0, -1.0]) == 1024.0
    assert base_of([10.0], [0.0]) == 1.0 and base_of([], []) == 1.0
    assert base_of([1.0], [3e38]) == 2.0**-120


def test_gradient_counts():
    features = [torch.zeros(2, 4, 3, 5), torch.zeros(2, 6, 1, 2)]
    for criterion, reduction, counts in (
        ("l1", "mean", [120, 24]), ("l2", "none", [60, 12]), ("smooth_l1", "sum", [1, 1]),
        ("lpips", "mean", [30, 4]), ("lpips", "sum", [15, 2]), ("dists", "none", [300, 40]),
        ("style", "mean", [480, 144]), ("style", "sum", [15, 2]),
    ):  # fmt: skip
        assert gradient_counts(Criterion(criterion, {}), features, reduction) == counts


def test_the_scale_is_undone_exactly_and_any_number_of_times():
    x = torch.tensor([1.5, -0.3, 7.0], requires_grad=True)

    def loss(base):
        inside, token = ScaleBack.apply(x)
        seen.clear()
        inside.register_hook(lambda g: seen.append(g))
        return ScaleUp.apply((inside**3).sum(), token, base)

    seen: list[torch.Tensor] = []
    for upstream in (1.0, 3.0, 2.0**20, 1e-20):
        value = loss(2.0**12)
        for _ in range(2):
            (first,) = torch.autograd.grad(value, x, torch.tensor(upstream), create_graph=True)
            assert torch.equal(first, upstream * 3 * x * x)
            top = seen[-1][0].item() / (3 * 1.5**2)
            assert 2.0**12 <= top < 2.0**13
    (second,) = torch.autograd.grad((first * torch.tensor([1.0, 2.0, 3.0])).sum(), x)
    torch.testing.assert_close(second, 1e-20 * 6 * x.detach() * torch.tensor([1.0, 2.0, 3.0]), atol=0, rtol=1e-6)


def test_float16_networks_compile_into_one_graph():
    torch._dynamo.reset()
    image, image_pred = images(2, 16)
    loss = PerceptualLoss(Listed(), execution=Execution(dtype=torch.float16))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for upstream in (1.0, 2.0**16):
        torch.testing.assert_close(gradient(compiled, image, image_pred, upstream),
                                   gradient(loss, image, image_pred, upstream))  # fmt: skip
