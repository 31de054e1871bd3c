"""What the programs of per_query_forward.py leave of a row, merged: its statistics and weighted sums of negatives."""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.kernels.device_math import number_in
from .per_query_forward import LOWEST, PARTIALS, below_one


@triton.jit
def per_query_merge_kernel(
    partials,  # Partials
    stats_ptr,  # (statistics, rows) float32
    weighted_keys_ptr,  # (POWERS + MOMENTS, rows, D) float32, if they are made
    sizes,  # PerQuerySizes
    hardness,
    FORM: tl.constexpr,  # PerQueryForm
    SPLITS: tl.constexpr,  # a power of two, at least those of sizes
    PARTS: tl.constexpr,  # splits whose vectors are read at a time
    BLOCK: tl.constexpr,  # columns of a program
):
    MOMENTS: tl.constexpr = FORM.moments
    POWERS: tl.constexpr = FORM.powers
    WEIGHTED_KEYS: tl.constexpr = FORM.weighted_keys
    rows, dim, splits = number_in(sizes.rows), sizes.dim, number_in(sizes.splits)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    exists = split < splits
    sums_ptr = partials.sums + row * splits * PARTIALS
    split_max = tl.load(sums_ptr + split * PARTIALS, mask=exists, other=LOWEST)
    s_max = tl.max(split_max)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    vectors_ptr = partials.weighted_keys + row * splits * (POWERS + MOMENTS) * dim
    if tl.program_id(1) == 0:
        tl.store(stats_ptr + rows + row, tl.where(s_max == LOWEST, float("-inf"), s_max))
        if MOMENTS:
            logit_sum = tl.sum(tl.load(sums_ptr + split * PARTIALS + 1, mask=exists, other=0.0))
            tl.store(stats_ptr + 2 * rows + row, logit_sum)
            number = tl.sum(tl.load(sums_ptr + split * PARTIALS + 2, mask=exists, other=0.0))
            tl.store(stats_ptr + 3 * rows + row, number)
    for a in tl.static_range(POWERS + MOMENTS):
        power = 1.0 if a == 0 else 1.0 + hardness if a == 1 else hardness
        sum_exp = 1.0
        if a < POWERS:
            of_splits = tl.load(sums_ptr + split * PARTIALS + 3 + a, mask=exists, other=0.0)
            sum_exp = tl.sum(below_one(power * (split_max - s_max)) * of_splits)
            if tl.program_id(1) == 0:
                above = s_max if a == 0 else 0.0
                lse = tl.where(s_max == float("inf"), s_max, above + tl.log(sum_exp))
                line = 0 if a == 0 else 1 + 2 * MOMENTS + a
                tl.store(stats_ptr + line * rows + row, lse)
        if WEIGHTED_KEYS:
            vector = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, splits, PARTS):
                p = start + tl.arange(0, PARTS)
                mask = (p < splits)[:, None] & inside
                ptr = vectors_ptr + (p * (POWERS + MOMENTS) + a)[:, None] * dim + columns
                part = tl.load(ptr, mask=mask, other=0.0)
                if a < POWERS:
                    part_max = tl.load(sums_ptr + p * PARTIALS, mask=p < splits, other=LOWEST)
                    part *= below_one(power * (part_max - s_max))[:, None]
                vector += tl.sum(part, 0)
            vector = tl.where(sum_exp == 0.0, 0.0, vector / sum_exp)
            tl.store(weighted_keys_ptr + (a * rows + row) * dim + columns, vector, mask=inside)
