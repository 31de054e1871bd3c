"""Triton kernels for the LPIPS head: one launch forward and one backward for up to eight layers.

With u = x / (|x| + eps) over the channels of a pixel, v the same of y, and d = u - v:

    value of a pixel   sum_c w d^2
    gradients          dx = 2 g (w d - x k / |x|) / (|x| + eps), k = sum_c w d u;   dy the same of -d, v and y

A program handles a tile of one image of one layer: all channels of some pixels, 8192 elements of x and of y, which stay
in registers from the norms to the sums. It keeps |x|, |y| and both k of a pixel; from them the backward is one pass.
More channels than a tile has are read twice by the forward, the second time from the caches. Bytes per element of size
s: forward 2 s, backward 3 s (4 s with both gradients), and 32 per pixel in all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import AotCase, on_device

TILE = 8192  # elements of x, and of y: 32 of each in every thread
MOST_CHANNELS = 1024  # of a tile: its rows of pixels are 32 bytes then
MOST_LAYERS = 8  # of a launch: the code grows with them
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # the default of enable_fp_fusion changes in triton 3.10
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _divisor(norm, eps):
    """|x| + eps and its inverse. Both 0 where |x| is 0 or infinite: so then are the quotients (inf over it is NaN)."""
    dead = (norm == 0.0) | (norm == float("inf"))
    value = tl.where(dead, 0.0, norm + eps)
    return value, tl.where(value == 0.0, 0.0, tl.div_rn(1.0, value))


@triton.jit
def _divide(x, value, inverse):
    """x / value, rounded as a division is: a lone channel gives 1 in u and in v, and their difference is 0."""
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, value, x), inverse, quotient)


@triton.jit
def _there(pixel, pixels, INDEX: tl.constexpr, LAYERS: tl.constexpr):
    """Which pixels there are. A constant where all are: it compiles to no mask at all."""
    if LAYERS[INDEX][6]:
        return tl.full((LAYERS[INDEX][2],), True, tl.int1)
    else:
        return pixel < pixels


@triton.jit
def _where(channel, pixel, pixels, INDEX: tl.constexpr, LAYERS: tl.constexpr):
    """Offsets within an image, and which of them lie inside. LAYERS[INDEX] as `_describe` makes it."""
    if LAYERS[INDEX][4]:
        channel = channel.to(tl.int64)
        pixel = pixel.to(tl.int64)
    if LAYERS[INDEX][3]:
        offsets = pixel[None, :] * LAYERS[INDEX][0] + channel[:, None]
    else:
        offsets = channel[:, None] * pixels + pixel[None, :]
    inside = tl.full((LAYERS[INDEX][1], LAYERS[INDEX][2]), True, tl.int1)
    if LAYERS[INDEX][0] % LAYERS[INDEX][1] != 0:
        inside = inside & (channel < LAYERS[INDEX][0])[:, None]
    if not LAYERS[INDEX][6]:
        inside = inside & (pixel < pixels)[None, :]
    return offsets, inside


@triton.jit
def _read(x_ptr, offsets, inside):
    return tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _lin(lin_ptr, channel, channels: tl.constexpr):
    if lin_ptr is None:
        return tl.where(channel < channels, 1.0, 0.0)[:, None]
    else:
        return tl.load(lin_ptr + channel, mask=channel < channels, other=0.0)[:, None]


@triton.jit
def _compare(x, y, lin, by_x, inverse_x, by_y, inverse_y):
    u = _divide(x, by_x[None, :], inverse_x[None, :])
    v = _divide(y, by_y[None, :], inverse_y[None, :])
    d = u - v
    weighted = lin * d
    return weighted * d, weighted * u, weighted * v


@triton.jit
def _fwd_tile(
    x_ptr, y_ptr, lin_ptr, pixel, pixels, kept_ptr, total, eps, INDEX: tl.constexpr, LAYERS: tl.constexpr
):
    """The values of the pixels; their statistics go to `kept_ptr`, which points to the image's first pixel."""
    channel = tl.arange(0, LAYERS[INDEX][1])
    offsets, inside = _where(channel, pixel, pixels, INDEX, LAYERS)
    x = _read(x_ptr, offsets, inside)
    y = _read(y_ptr, offsets, inside)
    square_x = x * x
    square_y = y * y
    if LAYERS[INDEX][1] < LAYERS[INDEX][0]:
        for start in range(LAYERS[INDEX][1], LAYERS[INDEX][0], LAYERS[INDEX][1]):
            offsets, inside = _where(start + channel, pixel, pixels, INDEX, LAYERS)
            more_x = _read(x_ptr, offsets, inside)
            more_y = _read(y_ptr, offsets, inside)
            square_x += more_x * more_x
            square_y += more_y * more_y
    norm_x = tl.sqrt_rn(tl.sum(square_x, 0))
    norm_y = tl.sqrt_rn(tl.sum(square_y, 0))
    by_x, inverse_x = _divisor(norm_x, eps)
    by_y, inverse_y = _divisor(norm_y, eps)
    value, k_x, k_y = _compare(x, y, _lin(lin_ptr, channel, LAYERS[INDEX][0]), by_x, inverse_x, by_y, inverse_y)
    if LAYERS[INDEX][1] < LAYERS[INDEX][0]:
        for start in range(LAYERS[INDEX][1], LAYERS[INDEX][0], LAYERS[INDEX][1]):
            offsets, inside = _where(start + channel, pixel, pixels, INDEX, LAYERS)
            x = _read(x_ptr, offsets, inside)
            y = _read(y_ptr, offsets, inside)
            lin = _lin(lin_ptr, start + channel, LAYERS[INDEX][0])
            more, more_k_x, more_k_y = _compare(x, y, lin, by_x, inverse_x, by_y, inverse_y)
            value += more
            k_x += more_k_x
            k_y += more_k_y
    there = _there(pixel, pixels, INDEX, LAYERS)
    tl.store(kept_ptr + pixel, norm_x, mask=there)
    tl.store(kept_ptr + total + pixel, norm_y, mask=there)
    tl.store(kept_ptr + 2 * total + pixel, tl.sum(k_x, 0), mask=there)
    tl.store(kept_ptr + 3 * total + pixel, tl.sum(k_y, 0), mask=there)
    return tl.sum(value, 0)


@triton.jit
def _place(sizes, INDEX: tl.constexpr, LAYERS: tl.constexpr):
    """This program's image; of layer INDEX its pixels, first and last tile, and where that image starts in `kept`."""
    count: tl.constexpr = len(LAYERS)
    first = 0
    before = 0
    for i in tl.static_range(INDEX):
        first += tl.cdiv(sizes[i], LAYERS[i][2])
        before += sizes[i]
    pixels = sizes[INDEX]
    if LAYERS[INDEX][5]:
        pixels = tl.multiple_of(pixels, 16)
    image = (tl.program_id(0) // sizes[count]).to(tl.int64)
    start = sizes[count + 1].to(tl.int64) + before * sizes[count + 2].to(tl.int64) + image * pixels
    return image, pixels, first, first + tl.cdiv(pixels, LAYERS[INDEX][2]), start


@triton.jit(do_not_specialize=["sizes", "total"])
def _lpips_fwd_kernel(
    xs,  # of each layer (images, channels, pixels), or (images, pixels, channels) in rows
    ys,  # the same
    lins,  # of each layer (channels,) float32, or None
    sizes,  # each layer's pixels, tiles, first pixel in `kept`, images, tiles of all launches, the first of this one
    out_ptr,  # (images, tiles of all launches), or SPATIAL (total,); float32
    kept_ptr,  # (4, total) float32
    total,  # pixels of all layers and images
    eps,
    SPATIAL: tl.constexpr,
    LAYERS: tl.constexpr,
):
    total = total.to(tl.int64)
    tile = tl.program_id(0) % sizes[len(xs)]
    for i in tl.static_range(len(xs)):
        image, pixels, first, last, own = _place(sizes, i, LAYERS)
        if (tile >= first) & (tile < last):
            pixel = (tile - first) * LAYERS[i][2] + tl.arange(0, LAYERS[i][2])
            start = image * LAYERS[i][0] * pixels
            lin = None if lins is None else lins[i]
            value = _fwd_tile(xs[i] + start, ys[i] + start, lin, pixel, pixels, kept_ptr + own, total, eps, i, LAYERS)
            if SPATIAL:
                tl.store(out_ptr + own + pixel, value, mask=_there(pixel, pixels, i, LAYERS))
            else:
                tl.store(out_ptr + image * sizes[len(xs) + 3] + sizes[len(xs) + 4] + tile, tl.sum(value) / pixels)


@triton.jit
def _factors(norm_ptr, k_ptr, pixel, there, g, eps):
    """What x is divided by and the inverse of that, what u pulls with, and the factor of all."""
    norm = tl.load(norm_ptr + pixel, mask=there, other=0.0)
    k = tl.load(k_ptr + pixel, mask=there, other=0.0)
    by, inverse = _divisor(norm, eps)
    # |x| + eps over |x|: 1, unless |x| is as small as eps
    pull = k * tl.where(norm == 0.0, 0.0, tl.div_rn(by, tl.where(norm == 0.0, 1.0, norm)))
    return by[None, :], inverse[None, :], pull[None, :], (g * inverse)[None, :]


@triton.jit
def _bwd_tile(
    x_ptr, y_ptr, lin_ptr, x_grad_ptr, y_grad_ptr, pixel, pixels, of_x, of_y,
    INDEX: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    for start in range(0, LAYERS[INDEX][0], LAYERS[INDEX][1]):
        channel = start + tl.arange(0, LAYERS[INDEX][1])
        offsets, inside = _where(channel, pixel, pixels, INDEX, LAYERS)
        u = _divide(_read(x_ptr, offsets, inside), of_x[0], of_x[1])
        v = _divide(_read(y_ptr, offsets, inside), of_y[0], of_y[1])
        weighted = _lin(lin_ptr, channel, LAYERS[INDEX][0]) * (u - v)
        if x_grad_ptr is not None:
            dx = (weighted - u * of_x[2]) * of_x[3]
            tl.store(x_grad_ptr + offsets, dx.to(x_grad_ptr.dtype.element_ty), mask=inside)
        if y_grad_ptr is not None:
            dy = (v * of_y[2] - weighted) * of_y[3]
            tl.store(y_grad_ptr + offsets, dy.to(y_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["sizes", "total"])
def _lpips_bwd_kernel(
    xs,  # as in the forward
    ys,
    lins,
    x_grads,  # like xs, or None
    y_grads,  # the same
    sizes,  # as in the forward
    grad_ptr,  # (images,), or SPATIAL (total,); float32
    kept_ptr,  # (4, total) float32
    total,
    eps,
    SPATIAL: tl.constexpr,
    LAYERS: tl.constexpr,
):
    total = total.to(tl.int64)
    tile = tl.program_id(0) % sizes[len(xs)]
    for i in tl.static_range(len(xs)):
        image, pixels, first, last, own = _place(sizes, i, LAYERS)
        if (tile >= first) & (tile < last):
            pixel = (tile - first) * LAYERS[i][2] + tl.arange(0, LAYERS[i][2])
            there = _there(pixel, pixels, i, LAYERS)
            start = image * LAYERS[i][0] * pixels
            if SPATIAL:
                g = 2.0 * tl.load(grad_ptr + own + pixel, mask=there, other=0.0)
            else:
                g = 2.0 * tl.load(grad_ptr + image) / pixels
            kept = kept_ptr + own
            of_x = _factors(kept, kept + 2 * total, pixel, there, g, eps)
            of_y = _factors(kept + total, kept + 3 * total, pixel, there, g, eps)
            lin = None if lins is None else lins[i]
            x_grad = None if x_grads is None else x_grads[i] + start
            y_grad = None if y_grads is None else y_grads[i] + start
            _bwd_tile(xs[i] + start, ys[i] + start, lin, x_grad, y_grad, pixel, pixels, of_x, of_y, i, LAYERS)


def _in_rows(t: Tensor) -> bool:
    """Channels last, dense."""
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _describe(x: Tensor, rows: bool, backward: bool) -> tuple:
    """Channels of the layer, channels and pixels of a tile, whether it lies in rows, whether its offsets need 64 bits,
    whether its pixels are a multiple of 16, and of the tile's. A backward takes the channels in two halves: it holds
    more of each."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    block = min(triton.next_power_of_2(channels), MOST_CHANNELS)
    tile = min(TILE // block, triton.next_power_of_2(pixels))
    wide = (channels + block) * (pixels + tile) >= 2**31
    block = max(block // 2, 1) if backward else block
    return channels, block, tile, rows, wide, pixels % 16 == 0, pixels % tile == 0


class _Launches:
    """The layers, laid out, in groups of MOST_LAYERS."""

    def __init__(
        self, features: Sequence[Tensor], targets: Sequence[Tensor], lins: Sequence[Tensor], backward: bool
    ) -> None:
        rows = [_in_rows(f) and _in_rows(t) for f, t in zip(features, targets, strict=True)]
        self.xs = [f if row else f.contiguous() for f, row in zip(features, rows, strict=True)]
        self.ys = [t if row else t.contiguous() for t, row in zip(targets, rows, strict=True)]
        self.lins = [lin.contiguous() for lin in lins]
        self.layers = [_describe(x, row, backward) for x, row in zip(self.xs, rows, strict=True)]
        self.images = features[0].shape[0]
        pixels = [f.shape[2] * f.shape[3] for f in features]
        tiles = [triton.cdiv(count, layer[2]) for count, layer in zip(pixels, self.layers, strict=True)]
        self.total, self.tiles = self.images * sum(pixels), sum(tiles)
        self.groups: list[tuple[slice, int, tuple[int, ...]]] = []  # layers, tiles, sizes
        for low in range(0, len(features), MOST_LAYERS):
            part, own = slice(low, low + MOST_LAYERS), sum(tiles[low : low + MOST_LAYERS])
            at = (self.images * sum(pixels[:low]), self.images, self.tiles, sum(tiles[:low]))
            self.groups.append((part, own, (*pixels[part], own, *at)))


def lpips_fwd(
    features: list[Tensor], targets: list[Tensor], lin_weights: list[Tensor], eps: float, spatial: bool
) -> tuple[Tensor, Tensor]:
    plan = _Launches(features, targets, lin_weights, False)
    shape = (plan.total,) if spatial else (plan.images, plan.tiles)
    out = features[0].new_empty(shape, dtype=torch.float32)
    kept = features[0].new_empty((4, plan.total), dtype=torch.float32)
    with on_device(features[0]):
        for part, tiles, sizes in plan.groups if plan.images else ():
            lins = tuple(plan.lins[part]) or None
            _lpips_fwd_kernel[(plan.images * tiles,)](
                tuple(plan.xs[part]), tuple(plan.ys[part]), lins, sizes, out, kept, plan.total, eps,
                spatial, tuple(plan.layers[part]), **OPTIONS,
            )  # fmt: skip
    return out if spatial else out.sum(1), kept


def lpips_bwd(
    grad: Tensor, statistics: Tensor, features: list[Tensor], targets: list[Tensor], lin_weights: list[Tensor],
    eps: float, spatial: bool, needs_features: bool, needs_targets: bool,
) -> list[Tensor]:  # fmt: skip
    plan = _Launches(features, targets, lin_weights, True)
    made = [torch.empty_like(t) for t in (features if needs_features else []) + (targets if needs_targets else [])]
    like = (plan.xs if needs_features else []) + (plan.ys if needs_targets else [])
    written = [m if m.stride() == t.stride() else torch.empty_like(t) for m, t in zip(made, like, strict=True)]
    count = len(features)
    x_grads = written[:count] if needs_features else None
    y_grads = written[-count:] if needs_targets else None
    grad = grad.contiguous()
    with on_device(features[0]):
        for part, tiles, sizes in plan.groups if plan.images else ():
            lins = tuple(plan.lins[part]) or None
            to_x, to_y = (None if side is None else tuple(side[part]) for side in (x_grads, y_grads))
            _lpips_bwd_kernel[(plan.images * tiles,)](
                tuple(plan.xs[part]), tuple(plan.ys[part]), lins, to_x, to_y, sizes, grad, statistics, plan.total, eps,
                spatial, tuple(plan.layers[part]), **OPTIONS,
            )  # fmt: skip
    return [m if m is w else m.copy_(w) for m, w in zip(made, written, strict=True)]


def aot_cases() -> Iterator[AotCase]:
    """VGG16's layers in every dtype, layout and form; other networks' widths; more layers than a launch takes."""
    vgg = [(2, c, s, s) for c, s in ((64, 64), (128, 32), (256, 16), (512, 8), (512, 4))]
    for dtype, rows in itertools.product(HALF_AND_SINGLE, (False, True)):
        yield from _aot_calls(vgg, dtype, rows, True, False)
    yield from _aot_calls(vgg, torch.float32, False, True, True)
    yield from _aot_calls(vgg, torch.bfloat16, True, False, True)
    alex = [(2, c, s, s) for c, s in ((64, 16), (192, 8), (384, 4), (256, 4), (256, 4))]
    yield from _aot_calls(alex, torch.float32, False, True, False)
    odd = [(2, 2048, 8, 8), (2, 1280, 7, 7), (2, 3, 8, 8), (2, 1, 1, 1)]
    for rows in (False, True):
        yield from _aot_calls(odd, torch.bfloat16, rows, True, False, vector=False)
    yield from _aot_calls([(2, 64, 8192, 8192)], torch.bfloat16, False, True, False)  # offsets pass 2**31
    yield from _aot_calls([(2, 8, 4, 4)] * 9, torch.float32, False, True, False, vector=False)


def _aot_calls(
    shapes: list, dtype: torch.dtype, rows: bool, lin: bool, spatial: bool, vector: bool = True
) -> Iterator[AotCase]:
    order = torch.channels_last if rows else torch.contiguous_format
    features = [torch.empty(s, dtype=dtype, device="meta", memory_format=order) for s in shapes]
    lins = [torch.empty(s[1], device="meta") for s in shapes] if lin else []
    total = sum(math.prod(s) // s[1] for s in shapes)
    grad = torch.empty(total if spatial else shapes[0][0], device="meta")
    kept = torch.empty(4, total, device="meta")
    label = f"{len(shapes)} layers of {shapes[0][1]} {str(dtype).removeprefix('torch.')}"
    label += f"{' rows' if rows else ''}{' map' if spatial else ''}{'' if lin else ' no lin'}"
    forward, backward = (("_lpips_fwd_kernel",), ("_lpips_bwd_kernel",)) if vector else ((), ())
    yield AotCase(f"forward {label}", lpips_fwd, (features, features, lins, 1e-10, spatial), forward)
    for needs in ((True, False), (True, True)):
        args = (grad, kept, features, features, lins, 1e-10, spatial, *needs)
        yield AotCase(f"backward {label}{' both' if all(needs) else ''}", lpips_bwd, args, backward)
