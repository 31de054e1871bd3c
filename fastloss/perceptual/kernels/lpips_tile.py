"""A tile of the LPIPS head in Triton: all channels of some pixels of an image of a layer. The formulas: lpips.py.

LAYERS is a `Tile` whose fields are tuples, with an entry a layer, of which INDEX says which one. (From a tuple of named
tuples Triton 3.6 loses the names.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...core.kernels.layer_table import float32_pointer_of, number_of, pointer_of, small_number_of


class Tile(NamedTuple):
    """How a layer is cut into tiles, as a constant of the kernel; one for several layers where there is a table."""

    channels: int
    pixels: int
    in_rows: bool  # the channels of a pixel lie side by side, else its plane's pixels
    wide: bool  # offsets need 64 bits
    even: bool  # the layer's pixels are a multiple of `together`
    whole: bool  # in all layers of the launch the pixels are a multiple of the tile's
    ragged: bool  # the layer's channels are no multiple of the tile's
    more: bool  # they are more than those
    layer_channels: int  # how many they are; with a table, whether they are multiples of 16
    together: int  # pixels of a plane that a thread reads side by side


class Pointers(NamedTuple):
    """Columns of a launch, see layer_table.py: of each layer (images, channels, pixels), or (images, pixels, channels)
    in rows."""

    x: Any
    y: Any
    lin: Any  # (channels,) float32, or None
    x_grad: Any = None
    y_grad: Any = None


class Layers(NamedTuple):
    """Likewise, a number of each layer."""

    starts: Any  # its first tile
    pixels: Any
    first_pixels: Any  # its first pixel in what is kept
    channels: Any  # None, or with a table
    kinds: Any  # None, or with a table: where its tile is in LAYERS


class Factors(NamedTuple):
    """Of the pixels of a tile, for the gradient of one side."""

    inverse: Any  # of what x is divided by
    rest: Any  # what rounding took from that
    ratio: Any  # of u to be subtracted: k (|x| + eps) / |x|
    scale: Any  # of all


@triton.jit
def _divisor(norm, eps):
    """|x| + eps, its inverse, and what rounding took from that. The last two are 0 where |x| is 0 or infinite: so then
    are the quotients (inf over it is NaN)."""
    dead = (norm == 0.0) | (norm == float("inf"))
    value = tl.where(dead, 1.0, norm + eps)
    inverse = tl.where(dead, 0.0, 1.0 / value)
    return value, inverse, tl.fma(-inverse, value, 1.0) * inverse


@triton.jit
def _divide(x, inverse, rest):
    """x / value, rounded as a division is: a lone channel gives 1 in u and in v, and their difference is 0."""
    return tl.fma(x, inverse, x * rest)


@triton.jit
def there(pixel, pixels, INDEX: tl.constexpr, LAYERS: tl.constexpr):
    """Which pixels there are. A constant where all are: it compiles to no mask at all."""
    if LAYERS.whole[INDEX]:
        return tl.full((LAYERS.pixels[INDEX],), True, tl.int1)
    else:
        return pixel < pixels


@triton.jit
def _where(channel, channels, pixel, pixels, INDEX: tl.constexpr, LAYERS: tl.constexpr):
    """Offsets within an image, and which of them lie inside."""
    if LAYERS.wide[INDEX]:
        channel = channel.to(tl.int64)
        pixel = pixel.to(tl.int64)
    if LAYERS.in_rows[INDEX]:
        offsets = pixel[None, :] * channels + channel[:, None]
    else:
        # A thread reads few pixels of many channels, since what it computes of each pixel is dear
        together: tl.constexpr = LAYERS.together[INDEX]
        offsets = tl.max_contiguous(channel[:, None] * pixels + pixel[None, :], [1, together])
    inside = tl.full((LAYERS.channels[INDEX], LAYERS.pixels[INDEX]), True, tl.int1)
    if LAYERS.ragged[INDEX]:
        inside = inside & (channel < channels)[:, None]
    if not LAYERS.whole[INDEX]:
        inside = inside & (pixel < pixels)[None, :]
    return offsets, inside


@triton.jit
def _read(x_ptr, offsets, inside):
    return tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _lin(lin_ptr, channel, channels, INDEX: tl.constexpr, LAYERS: tl.constexpr):
    if lin_ptr is None:
        return tl.where(channel < channels, 1.0, 0.0)[:, None]
    elif LAYERS.ragged[INDEX]:
        return tl.load(lin_ptr + channel, mask=channel < channels, other=0.0)[:, None]
    else:
        return tl.load(lin_ptr + channel)[:, None]


@triton.jit
def _both_sums(a, b):
    """The sums over the channels of both, in one reduction: every one has its barriers."""
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def _compare(x, y, lin, inverse_x, rest_x, inverse_y, rest_y):
    u = _divide(x, inverse_x[None, :], rest_x[None, :])
    v = _divide(y, inverse_y[None, :], rest_y[None, :])
    d = u - v
    weighted = lin * d
    return weighted * d, weighted * (u + v)


@triton.jit
def fwd_tile(
    x_ptr, y_ptr, lin_ptr, channels, pixel, pixels, kept_ptr, total, eps, inside_eps, INDEX: tl.constexpr,
    LAYERS: tl.constexpr,
):  # fmt: skip
    """The values of the pixels; their statistics go to `kept_ptr`, which points to the image's first pixel."""
    channel = tl.arange(0, LAYERS.channels[INDEX])
    offsets, inside = _where(channel, channels, pixel, pixels, INDEX, LAYERS)
    x = _read(x_ptr, offsets, inside)
    y = _read(y_ptr, offsets, inside)
    square_x = x * x
    square_y = y * y
    if LAYERS.more[INDEX]:
        for start in range(LAYERS.channels[INDEX], channels, LAYERS.channels[INDEX]):
            offsets, inside = _where(start + channel, channels, pixel, pixels, INDEX, LAYERS)
            more_x = _read(x_ptr, offsets, inside)
            more_y = _read(y_ptr, offsets, inside)
            square_x += more_x * more_x
            square_y += more_y * more_y
    square_x, square_y = _both_sums(square_x, square_y)
    norm_x = tl.sqrt_rn(square_x + inside_eps)
    norm_y = tl.sqrt_rn(square_y + inside_eps)
    _, inverse_x, rest_x = _divisor(norm_x, eps)
    _, inverse_y, rest_y = _divisor(norm_y, eps)
    lin = _lin(lin_ptr, channel, channels, INDEX, LAYERS)
    value, k = _compare(x, y, lin, inverse_x, rest_x, inverse_y, rest_y)
    if LAYERS.more[INDEX]:
        for start in range(LAYERS.channels[INDEX], channels, LAYERS.channels[INDEX]):
            offsets, inside = _where(start + channel, channels, pixel, pixels, INDEX, LAYERS)
            x = _read(x_ptr, offsets, inside)
            y = _read(y_ptr, offsets, inside)
            lin = _lin(lin_ptr, start + channel, channels, INDEX, LAYERS)
            more, more_k = _compare(x, y, lin, inverse_x, rest_x, inverse_y, rest_y)
            value += more
            k += more_k
    value, k = _both_sums(value, k)
    # sum_c w d u and sum_c w d v, from k = sum_c w d (u + v): the errors of both sums count half
    # One store for all four, which have to change threads: so there are barriers once
    four = tl.join(tl.join(norm_x, norm_y), tl.join(0.5 * (k + value), 0.5 * (k - value)))
    of_side = tl.arange(0, 2)[None, :, None] + 2 * tl.arange(0, 2)[None, None, :]
    inside = there(pixel, pixels, INDEX, LAYERS)[:, None, None]
    tl.store(kept_ptr + of_side * total + pixel[:, None, None], four, mask=inside)
    return value


@triton.jit
def pointers(values, layer, starts, TABLE: tl.constexpr):
    """Of a column of pointers the layer's, alone in a tuple, where there is a table; else the column."""
    if values is None or TABLE.dtype is None:
        return values
    else:
        return (pointer_of(values, layer, starts, TABLE),)


@triton.jit
def lin_pointers(lins, layer, starts, TABLE: tl.constexpr):
    if lins is None or TABLE.dtype is None:
        return lins
    else:
        return (float32_pointer_of(lins, layer, starts, TABLE),)


@triton.jit
def is_of(tile, layer, layers, INDEX: tl.constexpr, LAYERS: tl.constexpr, TABLE: tl.constexpr):
    """Whether this program's tile is that of INDEX: of the layer INDEX, or of one with that tile."""
    if TABLE.dtype is None:
        nth = tile - ((layers.starts[INDEX] - 3) >> 1)
        return (nth >= 0) & (nth < tl.cdiv((layers.pixels[INDEX] - 3) >> 1, LAYERS.pixels[INDEX]))
    else:
        return small_number_of(layers.kinds, layer, layers.starts) == INDEX


@triton.jit
def place(tile, image, layer, layers, INDEX: tl.constexpr, LAYERS: tl.constexpr, TABLE: tl.constexpr):
    """The layer's channels and pixels, this tile's pixels, and where the image starts in the layer and in what is
    kept."""
    if TABLE.dtype is None:
        nth = tile - ((layers.starts[INDEX] - 3) >> 1)
        count = (layers.pixels[INDEX] - 3) >> 1
        first = (layers.first_pixels[INDEX] - 3) >> 1
        width = LAYERS.layer_channels[INDEX]
    else:
        nth = tile - small_number_of(0, layer, layers.starts)
        count = small_number_of(layers.pixels, layer, layers.starts)
        first = number_of(layers.first_pixels, layer, layers.starts, TABLE)
        width = small_number_of(layers.channels, layer, layers.starts)
        if LAYERS.layer_channels[INDEX]:
            width = width // 16 * 16
    if LAYERS.even[INDEX]:
        together: tl.constexpr = LAYERS.together[INDEX]
        count = count // together * together  # the same, and now the compiler knows it
    pixel = nth * LAYERS.pixels[INDEX] + tl.arange(0, LAYERS.pixels[INDEX])
    return width, count, pixel, image * width * count, first.to(tl.int64) + image * count


@triton.jit
def factors(norm_ptr, k_ptr, pixel, there, g, eps):
    norm = tl.load(norm_ptr + pixel, mask=there, other=0.0)
    k = tl.load(k_ptr + pixel, mask=there, other=0.0)
    by, inverse, rest = _divisor(norm, eps)
    # |x| + eps over |x|: 1, unless |x| is as small as eps
    ratio = k * tl.where(norm == 0.0, 0.0, tl.div_rn(by, tl.where(norm == 0.0, 1.0, norm)))
    return Factors(inverse[None, :], rest[None, :], ratio[None, :], (g * inverse)[None, :])


@triton.jit
def bwd_tile(
    x_ptr, y_ptr, lin_ptr, x_grad_ptr, y_grad_ptr, channels, pixel, pixels, of_x, of_y,
    INDEX: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    for start in range(0, channels, LAYERS.channels[INDEX]):
        channel = start + tl.arange(0, LAYERS.channels[INDEX])
        offsets, inside = _where(channel, channels, pixel, pixels, INDEX, LAYERS)
        u = _divide(_read(x_ptr, offsets, inside), of_x.inverse, of_x.rest)
        v = _divide(_read(y_ptr, offsets, inside), of_y.inverse, of_y.rest)
        weighted = _lin(lin_ptr, channel, channels, INDEX, LAYERS) * (u - v)
        if x_grad_ptr is not None:
            dx = (weighted - u * of_x.ratio) * of_x.scale
            tl.store(x_grad_ptr + offsets, dx.to(x_grad_ptr.dtype.element_ty), mask=inside)
        if y_grad_ptr is not None:
            dy = (v * of_y.ratio - weighted) * of_y.scale
            tl.store(y_grad_ptr + offsets, dy.to(y_grad_ptr.dtype.element_ty), mask=inside)
