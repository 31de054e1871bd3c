"""Triton kernels for the LPIPS head: one launch forward and one backward for up to 64 layers.

With u = x / (|x| + eps) over the channels of a pixel, v the same of y, and d = u - v:

    value of a pixel   sum_c w d^2
    gradients          dx = 2 g (w d - x k / |x|) / (|x| + eps), k = sum_c w d u;   dy the same of -d, v and y

With `inside_eps`, |x| is sqrt(sum x^2 + inside_eps) in all of these, and eps is 0.

A program handles a tile of one image of one layer: all channels of some pixels, 8192 elements of x and of y, which stay
in registers from the norms to the sums. It keeps |x|, |y| and both k of a pixel; from them the backward is one pass.
More channels than a tile has are read twice by the forward, the second time from the caches. Bytes per element of size
s: forward 2 s, backward 3 s (4 s with both gradients), and 32 per pixel in all.

Shapes of tiles are compiled in: up to eight layers have one each, longer lists share those of 16 to 1024 channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device, registers
from ...core.kernels.layer_table import DIRECT, MOST, Table, columns_of, layer_of
from ..lpips import Inputs, Needs, Saved
from .lpips_tile import (
    Layers,
    Pointers,
    Tile,
    bwd_tile,
    factors,
    fwd_tile,
    is_of,
    lin_pointers,
    place,
    pointers,
    there,
)

TILE = 4096  # elements of x, and of y: 32 of each in every thread
MOST_CHANNELS = 1024  # of a tile: its rows of pixels are 32 bytes then
PIXELS = 2  # that a thread reads side by side, of a plane
SHARED_CHANNELS = 16  # of the smallest tile that layers share
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # the default of enable_fp_fusion changes in triton 3.10
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["total", "tiles", "all_tiles", "first_tile"])
def _lpips_fwd_kernel(
    columns,  # Pointers
    layers,  # Layers
    out_ptr,  # (images, tiles of all launches), or SPATIAL (total,); float32
    kept_ptr,  # (4, total) float32
    total,  # pixels of all layers and images
    eps,
    inside_eps,
    tiles,  # of an image in this launch
    all_tiles,
    first_tile,  # of this launch
    SPATIAL: tl.constexpr,
    LAYERS: tl.constexpr,  # a Tile of tuples
    TABLE: tl.constexpr,
):
    COUNT: tl.constexpr = len(LAYERS.pixels)
    total = total.to(tl.int64)
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    layer = layer_of(tile, layers.starts, TABLE)
    x_ptrs = pointers(columns.x, layer, layers.starts, TABLE)
    y_ptrs = pointers(columns.y, layer, layers.starts, TABLE)
    lin_ptrs = None if columns.lin is None else lin_pointers(columns.lin, layer, layers.starts, TABLE)
    for i in tl.static_range(COUNT):
        if is_of(tile, layer, layers, i, LAYERS, TABLE):
            width, count, pixel, start, kept_start = place(tile, image, layer, layers, i, LAYERS, TABLE)
            nth: tl.constexpr = i if TABLE.dtype is None else 0
            x_ptr = x_ptrs[nth] + start
            y_ptr = y_ptrs[nth] + start
            lin_ptr = None if lin_ptrs is None else lin_ptrs[nth]
            value = fwd_tile(
                x_ptr, y_ptr, lin_ptr, width, pixel, count, kept_ptr + kept_start, total, eps, inside_eps, i, LAYERS
            )  # fmt: skip
            if SPATIAL:
                tl.store(out_ptr + kept_start + pixel, value, mask=there(pixel, count, i, LAYERS))
            else:
                tl.store(out_ptr + image * all_tiles + first_tile + tile, tl.sum(value) / count)


@triton.jit(do_not_specialize=["total", "tiles"])
def _lpips_bwd_kernel(
    columns,  # Pointers
    layers,  # Layers
    grad_ptr,  # (images,), or SPATIAL (total,); float32
    kept_ptr,  # (4, total) float32
    total,
    eps,
    tiles,
    SPATIAL: tl.constexpr,
    LAYERS: tl.constexpr,  # a Tile of tuples
    TABLE: tl.constexpr,
):
    COUNT: tl.constexpr = len(LAYERS.pixels)
    total = total.to(tl.int64)
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    layer = layer_of(tile, layers.starts, TABLE)
    x_ptrs = pointers(columns.x, layer, layers.starts, TABLE)
    y_ptrs = pointers(columns.y, layer, layers.starts, TABLE)
    lin_ptrs = None if columns.lin is None else lin_pointers(columns.lin, layer, layers.starts, TABLE)
    x_grad_ptrs = None if columns.x_grad is None else pointers(columns.x_grad, layer, layers.starts, TABLE)
    y_grad_ptrs = None if columns.y_grad is None else pointers(columns.y_grad, layer, layers.starts, TABLE)
    for i in tl.static_range(COUNT):
        if is_of(tile, layer, layers, i, LAYERS, TABLE):
            width, count, pixel, start, kept_start = place(tile, image, layer, layers, i, LAYERS, TABLE)
            nth: tl.constexpr = i if TABLE.dtype is None else 0
            inside = there(pixel, count, i, LAYERS)
            if SPATIAL:
                g = 2.0 * tl.load(grad_ptr + kept_start + pixel, mask=inside, other=0.0)
            else:
                g = 2.0 * tl.load(grad_ptr + image) / count
            kept = kept_ptr + kept_start
            of_x = factors(kept, kept + 2 * total, pixel, inside, g, eps)
            of_y = factors(kept + total, kept + 3 * total, pixel, inside, g, eps)
            x_ptr = x_ptrs[nth] + start
            y_ptr = y_ptrs[nth] + start
            lin_ptr = None if lin_ptrs is None else lin_ptrs[nth]
            x_grad = None if x_grad_ptrs is None else x_grad_ptrs[nth] + start
            y_grad = None if y_grad_ptrs is None else y_grad_ptrs[nth] + start
            bwd_tile(x_ptr, y_ptr, lin_ptr, x_grad, y_grad, width, pixel, count, of_x, of_y, i, LAYERS)


def _in_rows(t: Tensor) -> bool:
    """Channels last, dense."""
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _describe(x: Tensor, rows: bool, backward: bool) -> Tile:
    """A layer's tile. A backward takes the channels in two halves: it holds more of each. What is `whole` is decided
    for all layers of a launch at once, so that there are two sorts of kernels and not one for each size of images."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    block = min(triton.next_power_of_2(max(channels, 1)), MOST_CHANNELS)
    tile = min(
        TILE // block, triton.next_power_of_2(max(pixels, PIXELS))
    )  # triton 3.6 fails at some columns of one pixel
    wide = (channels + block) * (pixels + tile) >= 2**31
    block = max(block // 2, 1) if backward else block
    ragged, more = channels % block != 0 or channels == 0, channels > block
    even = pixels % PIXELS == 0
    return Tile(block, tile, rows, wide, even, pixels % tile == 0, ragged, more, channels, PIXELS)


def _shared(xs: Sequence[Tensor], rows: Sequence[bool], backward: bool) -> tuple[list[Tile], list[int]]:
    """The tiles of a list with a table, each for all layers that have it, and which of them each layer has."""
    keys = [(max(SHARED_CHANNELS, min(triton.next_power_of_2(x.shape[1]), MOST_CHANNELS)), row)
            for x, row in zip(xs, rows, strict=True)]  # fmt: skip
    wide = any((x.shape[1] + MOST_CHANNELS) * (x.shape[2] * x.shape[3] + TILE) >= 2**31 for x in xs)
    kinds, tiles = sorted(set(keys)), []
    for key in kinds:
        own = [(x.shape[1], x.shape[2] * x.shape[3]) for x, k in zip(xs, keys, strict=True) if k == key]
        block, row = key
        part = block // 2 if backward else block
        more, channels = any(c > part for c, _ in own), all(c % 16 == 0 for c, _ in own)
        even = all(p % PIXELS == 0 for _, p in own)
        tiles.append(Tile(part, TILE // block, row, wide, even, False, True, more, channels, PIXELS))
    return tiles, [kinds.index(key) for key in keys]


class _Group(NamedTuple):
    """Up to MOST layers, those of one launch."""

    part: slice  # of the list
    tiles: Tile  # of tuples
    kinds: list[int]  # which of these each layer has
    starts: list[int]  # the first tile of each layer
    tile_count: int  # of an image
    first_tile: int  # among those of all launches


class _Launch(NamedTuple):
    programs: int
    columns: Pointers
    layers: Layers
    tiles: Tile  # of tuples
    tile_count: int
    first_tile: int
    table: Table


class _Launches:
    """The layers, laid out, in groups of up to MOST."""

    def __init__(self, x: Inputs, backward: bool) -> None:
        self.rows = [_in_rows(f) and _in_rows(t) for f, t in zip(x.features, x.targets, strict=True)]
        self.xs = [f if row else f.contiguous() for f, row in zip(x.features, self.rows, strict=True)]
        self.ys = [t if row else t.contiguous() for t, row in zip(x.targets, self.rows, strict=True)]
        self.lins = [lin.contiguous() for lin in x.lin_weights] or None
        self.images = x.features[0].shape[0]
        self.pixels = [f.shape[2] * f.shape[3] for f in x.features]
        self.total = self.images * sum(self.pixels)
        self.first_pixels = [self.images * n for n in itertools.accumulate(self.pixels[:-1], initial=0)]
        self.groups: list[_Group] = []
        self.tiles = 0
        for low in range(0, len(x.features), MOST):
            part = slice(low, low + MOST)
            xs, rows = self.xs[part], self.rows[part]
            if len(xs) > DIRECT:
                tiles, kinds = _shared(xs, rows, backward)
            else:
                tiles = [_describe(*one, backward) for one in zip(xs, rows, strict=True)]
                whole = all(tile.whole for tile in tiles)
                tiles = [tile._replace(whole=whole) for tile in tiles]
                kinds = list(range(len(tiles)))
            counts = [triton.cdiv(n, tiles[kind].pixels) for n, kind in zip(self.pixels[part], kinds, strict=True)]
            *starts, count = itertools.accumulate(counts, initial=0)
            by_field = Tile(*zip(*tiles, strict=True))  # type: ignore[arg-type]
            self.groups.append(_Group(part, by_field, kinds, starts, count, self.tiles))
            self.tiles += count

    def launches(
        self, x_grads: Sequence[Tensor] | None = None, y_grads: Sequence[Tensor] | None = None
    ) -> Iterator[_Launch]:
        for group in self.groups if self.images else ():
            part, channels, kinds = group.part, None, None
            if len(group.kinds) > DIRECT:
                channels, kinds = [x.shape[1] for x in self.xs[part]], group.kinds
            numbers = Layers(group.starts, self.pixels[part], self.first_pixels[part], channels, kinds)
            sides = (self.xs, self.ys, self.lins, x_grads, y_grads)
            chosen = Pointers(*(None if side is None else side[part] for side in sides))
            layers, columns, _, table = columns_of(numbers, chosen)
            programs = self.images * group.tile_count
            yield _Launch(programs, columns, layers, group.tiles, group.tile_count, group.first_tile, table)


def lpips_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    plan, model = _Launches(x, False), x.features[0]
    out = model.new_empty((plan.total,) if x.spatial else (plan.images, plan.tiles), dtype=torch.float32)
    kept = model.new_empty((4, plan.total), dtype=torch.float32)
    options = OPTIONS | (registers(128) if x.spatial else {})  # four programs a multiprocessor, as 112 are
    with on_device(model):
        for launch in plan.launches():
            _lpips_fwd_kernel[(launch.programs,)](
                launch.columns, launch.layers, out, kept, plan.total, x.eps, x.inside_eps, launch.tile_count,
                plan.tiles, launch.first_tile, x.spatial, launch.tiles, launch.table, **options,
            )  # fmt: skip
    return out if x.spatial else out.sum(1), Saved(kept)


def lpips_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> list[Tensor]:
    plan = _Launches(x, True)
    like = (plan.xs if needs.features else []) + (plan.ys if needs.targets else [])
    grads = [torch.empty_like(t) for t in (x.features if needs.features else []) + (x.targets if needs.targets else [])]
    written = [g if g.stride() == t.stride() else torch.empty_like(t) for g, t in zip(grads, like, strict=True)]
    count = len(x.features)
    x_grads = written[:count] if needs.features else None
    y_grads = written[-count:] if needs.targets else None
    grad = grad.contiguous()
    with on_device(x.features[0]):
        for launch in plan.launches(x_grads, y_grads):
            _lpips_bwd_kernel[(launch.programs,)](
                launch.columns, launch.layers, grad, saved.statistics, plan.total, x.eps, launch.tile_count, x.spatial,
                launch.tiles, launch.table, **OPTIONS,
            )  # fmt: skip
    return [g if g is w else g.copy_(w) for g, w in zip(grads, written, strict=True)]


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
    for rows in (False, True):
        yield from _aot_calls(vgg * 8, torch.float32, rows, True, False)
        yield from _aot_calls(vgg * 2, torch.bfloat16, rows, rows, not rows)
    yield from _aot_calls([*odd, *[(2, 8, 4, 4)] * 9], torch.float32, False, True, False, vector=False)


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
    vector = vector and rows  # of planes a thread reads PIXELS side by side
    forward, backward = (("_lpips_fwd_kernel",), ("_lpips_bwd_kernel",)) if vector else ((), ())
    x = Inputs(features, features, lins, 1e-10, 0.0, spatial)
    yield AotCase(f"forward {label}", lpips_fwd, (x,), forward)
    for needs in ((True, False), (True, True)):
        args = (grad, Saved(kept), x, Needs(*needs))
        yield AotCase(f"backward {label}{' both' if all(needs) else ''}", lpips_bwd, args, backward)
