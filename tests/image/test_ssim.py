"""What a row cannot say of ssim_loss and ms_ssim_loss: other libraries' formulas, known values, edges."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from fastloss import SSIMLoss, ms_ssim_loss, ssim_loss
from fastloss.image import ssim_volume


def pair(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(*shape, dtype=torch.float64, generator=generator)
    y = (x + 0.2 * torch.randn(*shape, dtype=torch.float64, generator=generator)).clamp(0, 1)
    return x.to(dtype), y.to(dtype)


def taps(size, sigma):
    g = torch.tensor([math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)], dtype=torch.float64)
    return g / g.sum()


def msssim_library(x, y, size=11, sigma=1.5, span=1.0):
    """pytorch-msssim's _ssim: separable valid windows; per image and channel, SSIM and the contrast term."""
    g = taps(size, sigma).to(x).repeat(x.shape[1], 1, 1, 1)

    def blur(t):
        t = F.conv2d(t, g.transpose(2, 3), groups=t.shape[1])
        return F.conv2d(t, g, groups=t.shape[1])

    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mx, my = blur(x), blur(y)
    sx, sy, sxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    cs = (2 * sxy + c2) / (sx + sy + c2)
    return ((2 * mx * my + c1) / (mx**2 + my**2 + c1) * cs).mean((2, 3)), cs.mean((2, 3))


def gradients(fn, *images):
    leaves = [t.clone().requires_grad_() for t in images]
    value = fn(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize(("size", "sigma", "span"), [(11, 1.5, 1.0), (7, 1.0, 1.0), (11, 1.5, 255.0)])
def test_pytorch_msssim_ssim(size, sigma, span):
    x, y = (span * t for t in pair(2, 3, 21, 17))
    ours = gradients(lambda a, b: ssim_loss(a, b, padding="valid", window=size, sigma=sigma, data_range=span), x, y)
    theirs = gradients(lambda a, b: 1 - msssim_library(a, b, size, sigma, span)[0].mean(), x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    each = ssim_loss(x, y, padding="valid", window=size, sigma=sigma, data_range=span, reduction="none")
    torch.testing.assert_close(each, 1 - msssim_library(x, y, size, sigma, span)[0].mean(1))


def test_fused_ssim():
    """The 3D Gaussian splatting form: a square window, zero padding, mean of the map."""
    x, y = pair(1, 3, 19, 23)
    window = (taps(11, 1.5)[:, None] @ taps(11, 1.5)[None, :]).expand(3, 1, 11, 11)

    def splatting(a, b):
        mx, my, xx, yy, xy = (F.conv2d(t, window, padding=5, groups=3) for t in (a, b, a * a, b * b, a * b))
        upper = (2 * mx * my + 0.01**2) * (2 * (xy - mx * my) + 0.03**2)
        lower = (mx**2 + my**2 + 0.01**2) * (xx - mx**2 + yy - my**2 + 0.03**2)
        return 1 - (upper / lower).mean()

    torch.testing.assert_close(gradients(ssim_loss, x, y), gradients(splatting, x, y), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_luminance(dtype):
    """The contrast term that pytorch-msssim has for its levels, and with weights as many of its pixels."""
    x, y = pair(2, 3, 20, 24, dtype=dtype)
    wanted = 1 - msssim_library(x.double(), y.double())[1].mean(1)
    found = ssim_loss(x, y, padding="valid", luminance=False, reduction="none")
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)
    half = torch.ones(20, 24).index_fill(1, torch.arange(12), 0)
    whole = [ssim_loss(*t, padding="valid", luminance=False) for t in ((x, y), (x[..., 7:], y[..., 7:]))]
    torch.testing.assert_close(ssim_loss(x, y, padding="valid", luminance=False, weight=half), whole[1])
    assert whole[0] != whole[1] and whole[0] < ssim_loss(x, y, padding="valid")
    with pytest.raises(TypeError, match="luminance"):
        ssim_loss(x, y, luminance=1.5)


def test_pytorch_msssim_ms_ssim():
    x, y = pair(2, 2, 163, 177)
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

    def library(a, b):
        levels = []
        for i in range(5):
            ssim, cs = msssim_library(a, b)
            levels.append(torch.relu(ssim if i == 4 else cs))
            pad = [s % 2 for s in a.shape[2:]]
            a, b = F.avg_pool2d(a, 2, padding=pad), F.avg_pool2d(b, 2, padding=pad)
        return 1 - torch.prod(torch.stack([t**w for t, w in zip(levels, weights, strict=True)]), 0).mean()

    torch.testing.assert_close(gradients(ms_ssim_loss, x, y), gradients(library, x, y), rtol=1e-9, atol=1e-13)


def test_large_volumes_go_slab_by_slab(monkeypatch):
    """The same values and gradients, whatever a slab holds; the low end of the range is what lies outside."""
    x, y = pair(2, 2, 13, 4, 5)
    weight = torch.rand(2, 1, 13, 4, 5, generator=torch.Generator().manual_seed(1))
    for options in ({"data_range": (-1, 1)}, {"window": 3, "padding": "valid", "reduction": "map"}, {"weight": weight}):
        whole = gradients(lambda a, b, o=options: (ssim_loss(a, b, **o) ** 2).sum(), x, y)
        for size in (1, 100):
            monkeypatch.setattr(ssim_volume, "STREAMED_FROM", size)
            found = gradients(lambda a, b, o=options: (ssim_loss(a, b, **o) ** 2).sum(), x, y)
            torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-13)
            monkeypatch.undo()


@pytest.mark.parametrize("options", [{}, {"window": (3, 5, 11), "padding": "valid"}], ids=str)
def test_volumes_of_several_tiles_and_blocks(options):
    """More rows than a tile, more slices than a block, of any strides; gradients of one image or both."""
    x, y = pair(1, 2, 23, 67, 19, dtype=torch.float32)
    x, y = x.transpose(2, 4).contiguous().transpose(2, 4), y.contiguous(memory_format=torch.channels_last_3d)
    wanted = gradients(lambda a, b: ssim_loss(a, b, **options), x.double(), y.double())
    found = gradients(lambda a, b: ssim_loss(a, b, **options), x, y)
    for each in (found, (*found[:2], gradients(lambda b: ssim_loss(x, b, **options), y)[1])):
        for got, exact in zip(each, wanted, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6 * exact.abs().max().item())


def reflected(*images):
    return [F.pad(t, (5, 5, 5, 5), mode="reflect") for t in images]


def valid(x, y):
    return ssim_loss(x, y, padding="valid")


def library_msssim(name):
    import pytorch_msssim as library

    return lambda x, y: 1 - getattr(library, name)(x, y, data_range=1.0)


def library_piq(name):
    import piq

    more = {"downsample": False} if name == "ssim" else {}
    return lambda x, y: 1 - getattr(piq, name)(x, y, **more)


def library_piq_loss(name):
    import piq

    return getattr(piq, name)(downsample=False)


def library_kornia(padding):
    from kornia.losses import ssim_loss as library

    return lambda x, y: 2 * library(x, y, 11, padding=padding)


def library_torchmetrics(_):
    from torchmetrics.functional.image import structural_similarity_index_measure as library

    return lambda x, y: 1 - library(y, x, data_range=1.0)


# (package, its function, ours, relative tolerance): pytorch-msssim's window and weights are float32, kornia adds 1e-12
LIBRARIES = [
    ("pytorch_msssim", library_msssim, "ssim", valid, 1e-5),
    ("pytorch_msssim", library_msssim, "ms_ssim", ms_ssim_loss, 1e-4),
    ("piq", library_piq, "ssim", valid, 1e-10),
    ("piq", library_piq_loss, "SSIMLoss", valid, 1e-10),
    ("piq", library_piq, "multi_scale_ssim", ms_ssim_loss, 1e-10),
    ("kornia", library_kornia, "valid", valid, 1e-8),
    ("kornia", library_kornia, "same", lambda x, y: valid(*reflected(x, y)), 1e-8),
    ("torchmetrics", library_torchmetrics, "ssim", lambda x, y: valid(*reflected(x, y)), 1e-10),
]


@pytest.mark.parametrize(
    ("make", "name", "ours", "rtol"),
    [pytest.param(*row[1:], id=f"{row[0]}.{row[2]}") for row in LIBRARIES if importlib.util.find_spec(row[0])],
)
def test_agrees_with_the_library(make, name, ours, rtol):
    x, y = pair(1, 2, 176, 192)
    theirs = gradients(make(name), x, y)
    for got, expected in zip(gradients(ours, x, y), theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=rtol * expected.abs().max().item())


def test_the_smallest_image_for_five_levels():
    x, y = pair(1, 1, 161, 161)
    assert 0 < ms_ssim_loss(x, y).item() < 1
    with pytest.raises(ValueError, match="got 11 for images of 161 x 160 pixels, which is 11 x 10 at level 5"):
        ms_ssim_loss(x[..., :160], y[..., :160])
    assert 0 < ms_ssim_loss(x[..., :160], y[..., :160], padding="same").item() < 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_images_have_loss_and_gradient_zero(dtype):
    x, _ = pair(2, 3, 16, 16, dtype=dtype)
    value, *grads = gradients(ssim_loss, x, x.clone())
    assert value.item() == 0.0
    assert not any(g.any() for g in grads)


def test_nearly_equal_images_keep_their_digits():
    """Where 1 - SSIM is 1e-9, forming SSIM first would leave nothing of it in float32."""
    x = pair(1, 1, 32, 32, dtype=torch.float32)[0]
    y = x + 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    exact = ssim_loss(x.double(), y.double()).item()
    assert exact < 1e-8
    assert ssim_loss(x, y).item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_constant_images(padding):
    """No variance: 1 - luminance is left, (a - b)^2 / (a^2 + b^2 + C1) inside; every gradient is finite."""
    x, y = torch.full((1, 2, 16, 16), 0.25), torch.full((1, 2, 16, 16), 0.75)
    value, *grads = gradients(lambda a, b: ssim_loss(a, b, padding=padding), x, y)
    assert all(g.isfinite().all() for g in grads)
    if padding == "valid":
        assert value.item() == pytest.approx(0.25 / (0.625 + 1e-4), rel=1e-5)
    black, *grads = gradients(lambda a, b: ssim_loss(a, b, padding=padding), torch.zeros_like(x), torch.zeros_like(x))
    assert black.item() == 0.0 and not any(g.any() for g in grads)


def test_inverted_checkerboards():
    """A one-pixel window has no variance; a wide one sees the same mean and opposite signs, SSIM near -1."""
    board = torch.arange(32)[:, None].add(torch.arange(32)).remainder(2).double()[None, None]
    pixel = ssim_loss(board, 1 - board, window=1)
    assert pixel.item() == pytest.approx(1 - 1e-4 / (1 + 1e-4), rel=1e-12)
    wide = ssim_loss(board, 1 - board, padding="valid")
    c2 = 0.03**2
    assert wide.item() == pytest.approx(1 - (c2 - 0.5) / (0.5 + c2), rel=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 40)])
def test_images_smaller_than_the_window(size):
    x, y = pair(2, 3, *size)
    padded = [F.pad(t, (5, 5, 5, 5)) for t in (x, y)]
    torch.testing.assert_close(ssim_loss(x, y), ssim_loss(*padded, padding="valid"))
    with pytest.raises(ValueError, match="window: expected at most the image's sides with padding='valid', got 11"):
        ssim_loss(x, y, padding="valid")


def test_masks():
    """A 0/1 weight picks pixels of the map; all-zero weights give 0; "valid" uses the centre of the weight."""
    x, y = pair(2, 3, 20, 20)
    mask = torch.zeros(2, 1, 20, 20)
    mask[:, :, 5:15, 5:15] = 1
    valid = ssim_loss(x, y, padding="valid", reduction="none")
    torch.testing.assert_close(ssim_loss(x, y, weight=mask, reduction="none"), valid)
    torch.testing.assert_close(ssim_loss(x, y, weight=mask, padding="valid", reduction="none"), valid)
    mask[1] = 0  # "mean" is weighted over the batch, so an image without weight does not count
    torch.testing.assert_close(ssim_loss(x, y, weight=mask), valid[0])
    value, *grads = gradients(lambda a, b: ssim_loss(a, b, weight=0 * mask), x, y)
    assert value.item() == 0.0 and not any(g.any() for g in grads)


def test_range_and_scale_cancel():
    x, y = pair(1, 3, 16, 16)
    torch.testing.assert_close(ssim_loss(255 * x, 255 * y, data_range=255), ssim_loss(x, y))


def test_half_precision_is_computed_in_float32():
    """fp16 squares of 8-bit values overflow; the loss is float32 and that of the rounded images."""
    x, y = (200 * t for t in pair(1, 3, 24, 24, dtype=torch.float16))
    loss = ssim_loss(x, 1.5 * y, data_range=255.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(ssim_loss(x.double(), (1.5 * y).double(), data_range=255.0).item(), rel=1e-5)


def test_levels_without_similarity_have_loss_one_and_gradient_zero():
    board = torch.arange(48)[:, None].add(torch.arange(48)).remainder(2).double()[None, None]
    value, *grads = gradients(lambda a, b: ms_ssim_loss(a, b, level_weights=(0.5, 0.5)), board, 1 - board)
    assert value.item() == 1.0
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("loss", [ssim_loss, lambda a, b, **o: ms_ssim_loss(a, b, level_weights=(0.4, 0.6), **o)])
def test_empty_batches(loss):
    x = torch.zeros(0, 3, 32, 32, requires_grad=True)
    assert loss(x, x.detach(), reduction="none").shape == (0,)
    assert loss(x, x.detach(), reduction="sum").item() == 0.0
    with pytest.raises(ValueError, match="the mean of an empty batch"):
        loss(x, x.detach())


def test_gradcheck_and_gradgradcheck():
    x, y = (t.requires_grad_() for t in pair(1, 2, 6, 5))
    weight = torch.rand(1, 1, 6, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: ssim_loss(a, b, window=3, weight=weight), (x, y))
    assert torch.autograd.gradgradcheck(lambda a, b: ssim_loss(a, b, window=3), (x, y), fast_mode=True)


def test_bad_input():
    x, y = pair(1, 3, 16, 16)
    with pytest.raises(ValueError, match="weight: no gradient is provided for it"):
        ssim_loss(x, y, weight=torch.ones(16, 16, requires_grad=True))
    with pytest.raises(ValueError, match="k1: expected a finite number > 0, got 0"):
        ssim_loss(x, y, k1=0.0)
    with pytest.raises(TypeError, match="window: expected an odd integer, got bool True"):
        ssim_loss(x, y, window=True)
    with pytest.raises(ValueError, match="data_range: expected a finite number > 0, got nan"):
        SSIMLoss(data_range=float("nan"))(x, y)
