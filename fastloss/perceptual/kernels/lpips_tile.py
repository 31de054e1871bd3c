"""A tile of the LPIPS head in Triton: all channels of some pixels of an image of a layer. The formulas: lpips.py.

Of INDEX and LAYERS, LAYERS[INDEX] says how the tile is shaped, in the order of lpips.py's `_describe`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layer_table import number_of, pointer_of, small_number_of


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
    if LAYERS[INDEX][5]:
        return tl.full((LAYERS[INDEX][1],), True, tl.int1)
    else:
        return pixel < pixels


@triton.jit
def _where(channel, channels, pixel, pixels, INDEX: tl.constexpr, LAYERS: tl.constexpr):
    """Offsets within an image, and which of them lie inside. LAYERS[INDEX] as `_describe` makes it."""
    if LAYERS[INDEX][3]:
        channel = channel.to(tl.int64)
        pixel = pixel.to(tl.int64)
    if LAYERS[INDEX][2]:
        offsets = pixel[None, :] * channels + channel[:, None]
    else:
        # A thread reads few pixels of many channels, since what it computes of each pixel is dear
        together: tl.constexpr = LAYERS[INDEX][9]
        offsets = tl.max_contiguous(channel[:, None] * pixels + pixel[None, :], [1, together])
    inside = tl.full((LAYERS[INDEX][0], LAYERS[INDEX][1]), True, tl.int1)
    if LAYERS[INDEX][6]:
        inside = inside & (channel < channels)[:, None]
    if not LAYERS[INDEX][5]:
        inside = inside & (pixel < pixels)[None, :]
    return offsets, inside


@triton.jit
def _read(x_ptr, offsets, inside):
    return tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _lin(lin_ptr, channel, channels, INDEX: tl.constexpr, LAYERS: tl.constexpr):
    if lin_ptr is None:
        return tl.where(channel < channels, 1.0, 0.0)[:, None]
    elif LAYERS[INDEX][6]:
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
    x_ptr, y_ptr, lin_ptr, channels, pixel, pixels, kept_ptr, total, eps, INDEX: tl.constexpr, LAYERS: tl.constexpr
):
    """The values of the pixels; their statistics go to `kept_ptr`, which points to the image's first pixel."""
    channel = tl.arange(0, LAYERS[INDEX][0])
    offsets, inside = _where(channel, channels, pixel, pixels, INDEX, LAYERS)
    x = _read(x_ptr, offsets, inside)
    y = _read(y_ptr, offsets, inside)
    square_x = x * x
    square_y = y * y
    if LAYERS[INDEX][7]:
        for start in range(LAYERS[INDEX][0], channels, LAYERS[INDEX][0]):
            offsets, inside = _where(start + channel, channels, pixel, pixels, INDEX, LAYERS)
            more_x = _read(x_ptr, offsets, inside)
            more_y = _read(y_ptr, offsets, inside)
            square_x += more_x * more_x
            square_y += more_y * more_y
    square_x, square_y = _both_sums(square_x, square_y)
    norm_x = tl.sqrt_rn(square_x)
    norm_y = tl.sqrt_rn(square_y)
    _, inverse_x, rest_x = _divisor(norm_x, eps)
    _, inverse_y, rest_y = _divisor(norm_y, eps)
    lin = _lin(lin_ptr, channel, channels, INDEX, LAYERS)
    value, k = _compare(x, y, lin, inverse_x, rest_x, inverse_y, rest_y)
    if LAYERS[INDEX][7]:
        for start in range(LAYERS[INDEX][0], channels, LAYERS[INDEX][0]):
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
def pointers(values, layer, starts, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Of a column of pointers the layer's, alone in a tuple, where there is a table; else the column."""
    if values is None or DTYPE is None:
        return values
    else:
        return (pointer_of(values, layer, starts, DTYPE, ALIGNED),)


@triton.jit
def lin_pointers(lins, layer, starts, DTYPE: tl.constexpr):
    if lins is None or DTYPE is None:
        return lins
    else:
        return (pointer_of(lins, layer, starts, tl.float32, False),)


@triton.jit
def sizes(layer, starts, pixels, firsts, channels, kinds, DTYPE: tl.constexpr):
    """Likewise the layer's first tile, pixels, first pixel in `kept`, channels and kind of tile."""
    if DTYPE is None:
        return starts, pixels, firsts
    else:
        count = small_number_of(pixels, layer, starts)
        width = small_number_of(channels, layer, starts)
        kind = small_number_of(kinds, layer, starts)
        return small_number_of(0, layer, starts), count, number_of(firsts, layer, starts, DTYPE), width, kind


@triton.jit
def is_of(tile, of, INDEX: tl.constexpr, LAYERS: tl.constexpr, DTYPE: tl.constexpr):
    """Whether this program's tile is LAYERS[INDEX]'s: of the layer INDEX, or of one with that tile."""
    if DTYPE is None:
        nth = tile - ((of[0][INDEX] - 3) >> 1)
        return (nth >= 0) & (nth < tl.cdiv((of[1][INDEX] - 3) >> 1, LAYERS[INDEX][1]))
    else:
        return of[4] == INDEX


@triton.jit
def place(tile, image, of, INDEX: tl.constexpr, LAYERS: tl.constexpr, DTYPE: tl.constexpr):
    """The layer's channels and pixels, this tile's pixels, and where the image starts in the layer and in `kept`."""
    if DTYPE is None:
        nth = tile - ((of[0][INDEX] - 3) >> 1)
        count = (of[1][INDEX] - 3) >> 1
        first = (of[2][INDEX] - 3) >> 1
        width = LAYERS[INDEX][8]
    else:
        nth = tile - of[0]
        count = of[1]
        first = of[2]
        width = of[3] // 16 * 16 if LAYERS[INDEX][8] else of[3]
    if LAYERS[INDEX][4]:
        count = count // 16 * 16  # the same, and now the compiler knows it
        first = first // 16 * 16
    pixel = nth * LAYERS[INDEX][1] + tl.arange(0, LAYERS[INDEX][1])
    return width, count, pixel, image * width * count, first.to(tl.int64) + image * count


@triton.jit
def factors(norm_ptr, k_ptr, pixel, there, g, eps):
    """The inverse of what x is divided by and its rest, what u pulls with, and the factor of all."""
    norm = tl.load(norm_ptr + pixel, mask=there, other=0.0)
    k = tl.load(k_ptr + pixel, mask=there, other=0.0)
    by, inverse, rest = _divisor(norm, eps)
    # |x| + eps over |x|: 1, unless |x| is as small as eps
    pull = k * tl.where(norm == 0.0, 0.0, tl.div_rn(by, tl.where(norm == 0.0, 1.0, norm)))
    return inverse[None, :], rest[None, :], pull[None, :], (g * inverse)[None, :]


@triton.jit
def bwd_tile(
    x_ptr, y_ptr, lin_ptr, x_grad_ptr, y_grad_ptr, channels, pixel, pixels, of_x, of_y,
    INDEX: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    for start in range(0, channels, LAYERS[INDEX][0]):
        channel = start + tl.arange(0, LAYERS[INDEX][0])
        offsets, inside = _where(channel, channels, pixel, pixels, INDEX, LAYERS)
        u = _divide(_read(x_ptr, offsets, inside), of_x[0], of_x[1])
        v = _divide(_read(y_ptr, offsets, inside), of_y[0], of_y[1])
        weighted = _lin(lin_ptr, channel, channels, INDEX, LAYERS) * (u - v)
        if x_grad_ptr is not None:
            dx = (weighted - u * of_x[2]) * of_x[3]
            tl.store(x_grad_ptr + offsets, dx.to(x_grad_ptr.dtype.element_ty), mask=inside)
        if y_grad_ptr is not None:
            dy = (v * of_y[2] - weighted) * of_y[3]
            tl.store(y_grad_ptr + offsets, dy.to(y_grad_ptr.dtype.element_ty), mask=inside)
