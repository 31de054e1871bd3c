"""Rows of the losses with lists of pairs that are no negatives, or the only ones, and of SupCon against keys."""

from __future__ import annotations

import torch

import fastloss
from fastloss import NegativeSampling
from tests.conformance.case import Case, with_options
from tests.conformance.cases.contrastive import IDS, WEIGHTS, pair, with_labels, with_negatives
from tests.conformance.eager_contrastive import eager_clip, eager_info_nce, eager_nt_xent, eager_supcon

# One pair twice, a positive, all negatives of row 5; none of row 2.
PAIRS = torch.tensor([[0, 1], [4, 3], [0, 1], [1, 1], [3, 0], [5, 4], [5, 0], [5, 3], [5, 1], [5, 2], [0, 5], [1, 0]])
OF_BANK = torch.cat((PAIRS, torch.tensor([[0, 6], [2, 9], [1, 8], [4, 6], [5, 6], [5, 7], [5, 8], [5, 9]])))
OF_VIEWS = torch.cat((PAIRS + 6, PAIRS, torch.tensor([[0, 11], [7, 2]])))
KEYS = torch.randn(9, 7, generator=torch.Generator().manual_seed(3))
KEY_LABELS = torch.tensor([0, 1, 1, 0, 0, 4, 1, 0, 1])

LISTED_PAIRS = [
    Case(
        "info_nce listed pairs",
        fastloss.info_nce,
        pair,
        eager_info_nce,
        shapes=((6, 7), (6, 5)),
        options=[
            {"excluded_pairs": PAIRS, "label_smoothing": 0.1},
            {"negative_pairs": PAIRS, "include_positive": False},
            {"excluded_pairs": PAIRS.flip(0).T.contiguous().T, "symmetric": True, "weights": WEIGHTS},
            {"negative_pairs": PAIRS, "targets": torch.tensor([5, 5, 0, 1, 2, 3]), "temperature": torch.tensor(0.5)},
            {"excluded_pairs": PAIRS[:0], "bias": torch.linspace(-1, 1, 6), "query_ids": IDS, "key_ids": IDS},
            {"excluded_pairs": PAIRS, "normalize": False, "temperature": 4.0},
            {"excluded_pairs": PAIRS.int(), "sampling": NegativeSampling(hardness=1.0, margin=0.5), "temperature": 1.0},
            {"negative_pairs": PAIRS, "sampling": NegativeSampling(tau_plus=0.1), "temperature": 1.0},
        ],
        bad=[
            ("list", with_options(excluded_pairs=[[0, 1]]), TypeError, "excluded_pairs: expected an integer tensor"),
            (
                "float",
                with_options(excluded_pairs=None, negative_pairs=PAIRS.float()),
                TypeError,
                "[P, 2], got torch.float32",
            ),
            ("shape", with_options(excluded_pairs=PAIRS.T), ValueError, "expected shape [P, 2], a row and a column"),
            ("both", with_options(excluded_pairs=PAIRS, negative_pairs=PAIRS), ValueError, "without excluded_pairs"),
            ("row", with_options(excluded_pairs=PAIRS + 1), ValueError, "rows of 0 to 5 in [:, 0], got 1 to 6"),
            (
                "column",
                with_options(excluded_pairs=None, negative_pairs=PAIRS.fliplr() - 1),
                ValueError,
                "rows of 0 to 5 in [:, 0], got -1",
            ),
        ],
    ),
    Case(
        "info_nce listed pairs of a bank",
        fastloss.info_nce,
        with_negatives,
        eager_info_nce,
        shapes=((6, 4, 7),),
        options=[{"excluded_pairs": OF_BANK}, {"negative_pairs": OF_BANK, "in_batch": True}],
        grads=(0, 1, 2),
    ),
    Case(
        "info_nce listed pairs of frozen keys",
        fastloss.info_nce,
        pair,
        eager_info_nce,
        shapes=((6, 7),),
        grads=(0,),
        options=[{"excluded_pairs": PAIRS}, {"negative_pairs": PAIRS, "label_smoothing": 0.2}],
    ),
    Case(
        "clip_loss of listed pairs",
        fastloss.clip_loss,
        pair,
        eager_clip,
        shapes=((6, 7),),
        options=[{"logit_scale": 0.5, "excluded_pairs": PAIRS}],
    ),
    Case(
        "supcon_loss of keys",
        fastloss.supcon_loss,
        with_labels,
        eager_supcon,
        shapes=((6, 7),),
        grads=(0,),
        options=[
            {"keys": KEYS, "key_labels": KEY_LABELS},
            {"keys": KEYS, "key_labels": KEY_LABELS, "include_positive": False, "excluded_pairs": PAIRS},
            {"excluded_pairs": PAIRS, "temperature": torch.tensor(0.5), "weights": WEIGHTS},
        ],
        bad=[
            ("labels", with_options(key_labels=None), TypeError, "key_labels: expected integers beside keys"),
            ("width", with_options(keys=KEYS[:, 1:]), ValueError, "keys: expected embeddings of features's width"),
            ("alone", with_options(keys=None), ValueError, "key_labels: expected keys beside it"),
        ],
    ),
    Case(
        "nt_xent_loss of listed pairs",
        fastloss.nt_xent_loss,
        pair,
        eager_nt_xent,
        shapes=((6, 7),),
        options=[{"excluded_pairs": OF_VIEWS}, {"negative_pairs": OF_VIEWS, "include_positive": False}],
    ),
]
