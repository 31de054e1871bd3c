"""What a row cannot say of smoothness_loss: other libraries' conventions, known values, edges, fp16 sums."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from fastloss import SmoothnessLoss, smoothness_loss

DISTANCES = (1, 2, "isotropic", "norm")


@pytest.fixture
def image():
    return torch.rand(3, 2, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def same_gradient(ours, theirs, image):
    """Value and gradient of two functions of an image agree."""
    found = []
    for fn in (ours, theirs):
        leaf = image.clone().requires_grad_()
        value = fn(leaf)
        found.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def steps(x):
    return x.diff(dim=-2), x.diff(dim=-1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kornia_total_variation(image, reduction):
    def total_variation(x):
        return sum(getattr(d.abs(), reduction)(dim=(-2, -1)) for d in steps(x))

    assert smoothness_loss(image, convention="kornia", reduction=reduction).shape == (3, 2)
    same_gradient(lambda x: smoothness_loss(x, convention="kornia", reduction=reduction), total_variation, image)


def test_kornia_inverse_depth_smoothness(image):
    depth, guide = image[:, :1], torch.rand(3, 3, 7, 9, dtype=torch.float64)

    def inverse_depth_smoothness(x):
        edges = [torch.exp(-d.abs().mean(1, keepdim=True)) for d in steps(guide)]
        dy, dx = steps(x)
        return (dx * edges[1]).abs().mean() + (dy * edges[0]).abs().mean()

    same_gradient(lambda x: smoothness_loss(x, guide=guide), inverse_depth_smoothness, depth)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torchmetrics_total_variation(image, reduction):
    def total_variation(x):
        score = sum(d.abs().sum((1, 2, 3)) for d in steps(x))
        return {"none": score, "sum": score.sum(), "mean": score.sum() / len(x)}[reduction]

    same_gradient(lambda x: smoothness_loss(x, convention="torchmetrics", reduction=reduction), total_variation, image)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("p", "norm_type"), [(1, "l1"), ("norm", "l2"), (2, "l2_squared")])
def test_piq_total_variation(image, p, norm_type, reduction):
    def total_variation(x):
        power = 1 if norm_type == "l1" else 2
        score = sum((d.abs() ** power).sum((1, 2, 3)) for d in steps(x))
        score = score.sqrt() if norm_type == "l2" else score
        return score if reduction == "none" else getattr(score, reduction)()

    same_gradient(lambda x: smoothness_loss(x, p=p, convention="piq", reduction=reduction), total_variation, image)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("channels", [None, 1, 2])
def test_basicsr_weighted_tv(image, channels, reduction):
    weight = None if channels is None else torch.rand(3, channels, 7, 9, dtype=torch.float64)

    def l1(pred, target, w):
        loss = (pred - target).abs()
        if w is None:
            return getattr(loss, reduction)()
        total = w.sum() * (loss.shape[1] if w.shape[1] == 1 else 1)
        return (loss * w).sum() / total if reduction == "mean" else (loss * w).sum()

    def weighted_tv(x):
        rows, columns = (None, None) if weight is None else (weight[:, :, :-1], weight[..., :-1])
        return l1(x[:, :, :-1], x[:, :, 1:], rows) + l1(x[..., :-1], x[..., 1:], columns)

    same_gradient(
        lambda x: smoothness_loss(x, weight=weight, convention="basicsr", reduction=reduction), weighted_tv, image
    )


def library_kornia(reduction):
    from kornia.losses import total_variation

    return lambda x: total_variation(x, reduction=reduction)


def library_kornia_depth(_):
    from kornia.losses import inverse_depth_smoothness_loss

    return lambda x: inverse_depth_smoothness_loss(x[:, :1], GUIDE)


def library_torchmetrics(reduction):
    from torchmetrics.functional.image import total_variation  # its module sums in float32

    return lambda x: total_variation(x, reduction=reduction)


def library_piq(norm_type, reduction):
    from piq import TVLoss

    return TVLoss(norm_type=norm_type, reduction=reduction)


GUIDE = torch.rand(3, 3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
LIBRARIES = [
    *(("kornia", library_kornia, (r,), {"convention": "kornia", "reduction": r}) for r in ("mean", "sum")),
    ("kornia", library_kornia_depth, ("mean",), {"guide": GUIDE}),
    *(("torchmetrics", library_torchmetrics, (r,), {"convention": "torchmetrics", "reduction": r})
      for r in ("none", "mean", "sum")),
    *(("piq", library_piq, (norm, r), {"convention": "piq", "p": p, "reduction": r})
      for p, norm in ((1, "l1"), ("norm", "l2"), (2, "l2_squared")) for r in ("none", "mean", "sum")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "named", "options"),
    [pytest.param(*row[1:], id=".".join(row[:1] + row[2])) for row in LIBRARIES if importlib.util.find_spec(row[0])],
)
def test_agrees_with_the_library(image, make, named, options):
    """As installed; the tests above have their printed formulas, for where they are not."""
    ours = (lambda x: smoothness_loss(x[:, :1], **options)) if "guide" in options else None
    same_gradient(ours or (lambda x: smoothness_loss(x, **options)), make(*named), image)


@pytest.mark.parametrize("convention", ["kornia", "basicsr"])
def test_what_a_library_has_not_is_refused(image, convention):
    with pytest.raises(ValueError, match=f"reduction: '{convention}' has 'mean' and 'sum', got 'none'"):
        smoothness_loss(image, convention=convention, reduction="none")


def test_default_is_the_mean_of_the_images(image):
    each = smoothness_loss(image, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(smoothness_loss(image), each.mean())
    torch.testing.assert_close(smoothness_loss(image, reduction="sum"), each.sum())
    torch.testing.assert_close(smoothness_loss(image), smoothness_loss(image, convention="basicsr"))


@pytest.mark.parametrize(("p", "expected"), [(1, 2.0), (2, 2.0), ("norm", 2**0.5)])
def test_checkerboard(p, expected):
    board = torch.arange(8)[:, None].add(torch.arange(8)).remainder(2).float().expand(2, 3, 8, 8)
    assert smoothness_loss(board, p=p).item() == pytest.approx(expected, rel=1e-6)
    assert smoothness_loss(board, order=2).item() == 4.0  # 0 1 0: each second difference is +-2


def test_checkerboard_isotropic():
    """49 pixels have both differences, 14 only one, one none."""
    board = torch.arange(8)[:, None].add(torch.arange(8)).remainder(2).float()[None, None]
    assert smoothness_loss(board, p="isotropic").item() == pytest.approx((49 * 2**0.5 + 14) / 64, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("p", DISTANCES)
def test_constant_images_have_value_and_gradient_zero(p, order):
    x = torch.full((2, 3, 6, 5), 0.7, requires_grad=True)
    loss = smoothness_loss(x, p=p, order=order, guide=torch.rand(2, 3, 6, 5))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_ramps_are_smooth_to_second_order():
    ramp = torch.arange(6.0)[:, None] * 2 + torch.arange(5.0)
    assert smoothness_loss(ramp[None, None]).item() == 3.0
    assert smoothness_loss(ramp[None, None], order=2).item() == 0.0


@pytest.mark.parametrize(
    ("size", "order"), [((1, 6), 1), ((6, 1), 1), ((1, 1), 1), ((1, 6), 2), ((6, 2), 2), ((2, 1), 2)]
)
@pytest.mark.parametrize("p", DISTANCES)
def test_directions_without_differences_add_nothing(size, order, p):
    x = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    d = x.detach().diff(n=order, dim=2 if size[0] > size[1] else 3)
    total = d.abs().sum() if p in (1, "isotropic") else d.square().sum()
    expected = total / max(x.numel() if p == "isotropic" else d.numel(), 1)
    loss = smoothness_loss(x, p=p, order=order, guide=torch.zeros(2, 1, *size))
    torch.testing.assert_close(loss, expected.sqrt() if p == "norm" else expected)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty_images(shape):
    for p in DISTANCES:
        for order in (1, 2):
            loss = smoothness_loss(
                torch.zeros(shape), p=p, order=order, guide=torch.zeros(shape[0], 1, *shape[2:]), reduction="none"
            )
            assert torch.equal(loss, torch.zeros(shape[0]))
        with pytest.raises(ValueError, match="the mean of an empty batch"):
            smoothness_loss(torch.zeros(shape), p=p)


def test_guide_without_gradient_changes_nothing(image):
    for order in (1, 2):
        for p in DISTANCES:
            flat = smoothness_loss(image, p=p, order=order, guide=torch.full((3, 1, 7, 9), 0.3))
            torch.testing.assert_close(flat, smoothness_loss(image, p=p, order=order))


@pytest.mark.parametrize("p", [1, "isotropic"])
def test_an_edge_of_the_guide_lets_an_edge_pass(p):
    """A step of height 1 in the image costs exp(-height of the guide's step) of what it costs alone."""
    step = (torch.arange(8) >= 4).double().expand(1, 1, 8, 8)
    alone = smoothness_loss(step, p=p)
    guided = smoothness_loss(step, p=p, guide=5 * step.expand(1, 3, 8, 8))
    torch.testing.assert_close(guided, alone * torch.exp(torch.tensor(-5.0, dtype=torch.float64)))


def test_weights_that_are_all_zero_give_zero(image):
    leaf = image.clone().requires_grad_()
    for p in DISTANCES:
        loss = smoothness_loss(leaf, p=p, weight=torch.zeros(7, 9))
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.item() == 0.0 and not gradient.any()


def test_weights_count_once_per_image_and_channel_that_they_are_broadcast_to():
    image, weight = torch.rand(2, 3, 5, 6).double(), torch.rand(1, 1, 5, 6).double()
    whole = smoothness_loss(image, weight=weight.expand(2, 3, 5, 6).contiguous(), reduction="none")
    for broadcast in (weight, weight[0], weight[0, 0], weight.expand(2, 1, 5, 6).contiguous()):
        torch.testing.assert_close(smoothness_loss(image, weight=broadcast, reduction="none"), whole)
    row = torch.rand(6).double()
    full = row.expand(2, 3, 5, 6).contiguous()
    torch.testing.assert_close(smoothness_loss(image, weight=row), smoothness_loss(image, weight=full))


def test_a_constant_weight_changes_no_mean(image):
    weight = torch.full((1,), 3.0)
    for p in DISTANCES:
        torch.testing.assert_close(smoothness_loss(image, p=p, weight=weight), smoothness_loss(image, p=p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_that_overflow_half_precision(dtype):
    board = torch.arange(256)[:, None].add(torch.arange(512)).remainder(2).to(dtype)[None, None]
    total = smoothness_loss(board, convention="torchmetrics", reduction="sum")
    assert total.dtype == torch.float32
    assert total.item() == 255 * 512 + 256 * 511  # 261376: fp16 ends at 65504, bf16 counts in steps of 1024 there
    assert smoothness_loss(board).item() == 2.0


@pytest.mark.parametrize("p", DISTANCES)
def test_volumes(p):
    """[N, C, D, H, W]: one more direction; a volume one slice deep is its image."""
    x = torch.rand(2, 2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    d = [x.diff(dim=i) for i in (2, 3, 4)]
    if p == "isotropic":
        padded = [F.pad(t, [0, 0] * (2 - i) + [0, 1]) for i, t in enumerate(d)]
        expected = torch.stack(padded).square().sum(0).clamp_min(1e-300).sqrt().mean()
    elif p == "norm":
        expected = sum(t.square().mean() for t in d).sqrt()
    else:
        expected = sum(t.abs().pow(p).mean() for t in d)
    torch.testing.assert_close(smoothness_loss(x, p=p), expected)
    flat = x[:, :, :1]
    torch.testing.assert_close(smoothness_loss(flat, p=p), smoothness_loss(flat[:, :, 0], p=p))
    assert torch.autograd.gradcheck(lambda t: smoothness_loss(t, p=p), x, fast_mode=True)


@pytest.mark.parametrize("p", DISTANCES)
def test_gradgradcheck(p):
    x = torch.rand(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(1, 1, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda t: smoothness_loss(t, p=p, weight=weight), x)


def test_module_takes_a_guide_at_call(image):
    guide = torch.rand(3, 3, 7, 9)
    module = SmoothnessLoss(p=2)
    torch.testing.assert_close(module(image, guide=guide), smoothness_loss(image, p=2, guide=guide))


def test_bad_guides_and_weights(image):
    for name in ("guide", "weight"):
        with pytest.raises(TypeError, match=f"{name}: expected a float16"):
            smoothness_loss(image, **{name: torch.ones(3, 1, 7, 9, dtype=torch.uint8)})
        with pytest.raises(ValueError, match=f"{name}: no gradient is provided for it; pass {name}.detach"):
            smoothness_loss(image, **{name: torch.ones(3, 1, 7, 9, requires_grad=True)})
