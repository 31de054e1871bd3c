"""Rows of InfoNCE with negatives of each query's own, masked or frozen, and with several positives a query."""

from __future__ import annotations

import math

import torch

import fastloss
from fastloss import NegativeSampling
from tests.conformance.case import Bench, Case, with_argument, with_options
from tests.conformance.cases.contrastive import BAD_NEGATIVES, IDS, WEIGHTS, library_info_nce, pair, rivals
from tests.conformance.eager_contrastive import eager_info_nce

OWN_MASK = torch.arange(24).reshape(6, 4) % 5 > 1
OWN_MASK[2], OWN_MASK[4], OWN_MASK[0, 0] = True, False, True
SEVERAL = torch.tensor([[0, 1, 3], [1, -1, -1], [-1, -1, -1], [5, 2, 5], [-1, 4, 0], [3, 2, 5]])  # 5 once


def with_own_negatives(draw, shape):
    rows, keys, width = shape
    return *pair(draw, (rows, width)), draw.normal(rows, keys, width)


OWN_NEGATIVES = [
    Case(
        "info_nce own negatives",
        fastloss.info_nce,
        with_own_negatives,
        eager_info_nce,
        shapes=((6, 4, 7), (4, 9, 6)),
        empty=((6, 0, 7), (0, 4, 7), (1, 0, 7)),
        grads=(0, 1, 2),
        options=[
            {"temperature": 0.5},
            {"in_batch": True},
            {"sampling": NegativeSampling(hardness=0.5), "include_positive": False, "temperature": 1.0},
            {"label_smoothing": 0.2, "normalize": False, "temperature": 2.0},
            {"sampling": NegativeSampling(margin=0.6, hardness=0.5), "temperature": 1.0},
            {"sampling": NegativeSampling(margin=0.2, tau_plus=0.1), "temperature": 1.0},  # a row has none left
            {"sampling": NegativeSampling(0.1, 0.5, margin=0.2), "temperature": 1.0, "in_batch": True},
            {"sampling": NegativeSampling(margin=0.2), "include_positive": False, "label_smoothing": 0.1},
        ],
        bench=Bench(
            shapes=[(64, 1024, 512)],
            options=[{"temperature": 0.1}],
            all_grads=True,
            # one read forward, one read and one write backward
            cost=lambda shape, size, mode: {"forward": 1, "backward": 2, "both": 3}[mode] * size * math.prod(shape),
        ),
        extra=rivals(info_nce=library_info_nce),
        bad=[
            *BAD_NEGATIVES,
            ("M", with_argument(2, lambda t: t[:4]), ValueError, "negatives: expected [M, K, D] with query's M=6 rows"),
            ("bias", with_options(bias=torch.zeros(6)), ValueError, "tensor of one element (per-sample"),
        ],
    ),
    Case(
        "info_nce several positives",
        fastloss.info_nce,
        pair,
        eager_info_nce,
        shapes=((6, 7),),
        options=[
            {
                "targets": SEVERAL,
                "label_smoothing": 0.2,
                "bias": torch.linspace(-1, 1, 6),
                "normalize": False,
                "temperature": 2.0,
            },
            {"targets": SEVERAL, "positives": "sum", "weights": WEIGHTS},
        ],
        bad=[
            ("no positive", with_options(targets=SEVERAL[:, :0]), ValueError, "targets: expected shape [6] or [6, P]"),
            ("range", with_options(targets=SEVERAL - 1), ValueError, "rows, 0 to 5, or -1, got -2 to 4"),
            (
                "decoupled",
                with_options(targets=SEVERAL, include_positive=False),
                ValueError,
                "targets: with several positives a query, [M, P], include_positive=False cannot be given",
            ),
            (
                "ids",
                with_options(targets=SEVERAL, query_ids=IDS, key_ids=IDS),
                ValueError,
                "query_ids and key_ids cann",
            ),
            ("positives", with_options(targets=SEVERAL, positives="each"), ValueError, "positives: expected one of"),
        ],
    ),
    Case(
        "info_nce several positives and negatives",
        fastloss.info_nce,
        with_own_negatives,
        eager_info_nce,
        shapes=((6, 4, 7),),
        grads=(0, 1, 2),
        options=[{"targets": SEVERAL, "negatives_mask": OWN_MASK, "temperature": 0.5}],
    ),
    Case(
        "info_nce masked negatives",
        fastloss.info_nce,
        with_own_negatives,
        eager_info_nce,
        shapes=((6, 4, 7),),
        grads=(0, 1, 2),
        options=[
            {"negatives_mask": OWN_MASK, "temperature": 0.5},
            {"negatives_mask": OWN_MASK, "in_batch": True, "weights": WEIGHTS},
            {
                "negatives_mask": OWN_MASK,
                "sampling": NegativeSampling(hardness=0.5, margin=0.6),
                "label_smoothing": 0.2,
            },
        ],
        bad=[
            ("integers", with_options(negatives_mask=OWN_MASK.long()), TypeError, "negatives_mask: expected a bool"),
            ("M", with_options(negatives_mask=OWN_MASK[:4]), ValueError, "[M, K] = [6, 4], got [4, 4]"),
            (
                "shared",
                lambda args, options: ((*args[:2], args[2][0]), options | {"negatives_mask": OWN_MASK}),
                ValueError,
                "negatives_mask: expected negatives [M, K, D] beside it, got shape (4, 7)",
            ),
        ],
    ),
    Case(
        "info_nce frozen negatives",
        fastloss.info_nce,
        with_own_negatives,
        eager_info_nce,
        shapes=((3, 5, 7), (1, 70, 6)),
        empty=((3, 0, 7), (0, 5, 7)),
        options=[{"temperature": 0.5}, {"label_smoothing": 0.1, "normalize": False}],
        bench=Bench(
            shapes=[(64, 1024, 512)],
            cost=lambda shape, size, mode: (mode != "backward") * size * math.prod(shape),
            options=[{"temperature": 0.1}],
            all_grads=True,
        ),
        extra=rivals(info_nce=library_info_nce),
    ),
]
