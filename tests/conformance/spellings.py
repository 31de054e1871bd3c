"""Each option of each loss alone, in every spelling that the API allows; what test_options.py goes through.

A group is a list of options that mean the same. The first is judged against itself in float64, the others against it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastloss import NegativeSampling

IDS, MASK = torch.tensor([3, 1, 3, 7, 1, -2]), torch.tensor([True, True, False, True, True, False])
WEIGHTS, TARGETS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25]), torch.tensor([5, 5, 0, 1, 2, 3])
COLUMNS = torch.linspace(-1, 1, 6)
KEYS = torch.randn(6, 7, generator=torch.Generator().manual_seed(3))
PAIRS = torch.tensor([[0, 1], [1, 0], [3, 0], [5, 4], [5, 0], [4, 1]])
REPEATED = PAIRS.repeat(2, 1).flip(0)
Groups = dict[str, list[dict[str, Any]]]


def number(name: str, value: float) -> list[dict[str, Any]]:
    """A number, and tensors of one element with and without a gradient."""
    one = torch.tensor(value)
    learned = Parameter(one.clone()), Parameter(one[None].clone())
    return [{name: v} for v in (value, one, one[None], *learned, one.half())]


def integers(name: str, values: Tensor, *others: torch.dtype) -> list[dict[str, Any]]:
    return [{name: values}, *({name: values.to(dtype)} for dtype in (torch.int32, torch.int16, torch.uint8, *others))]


def ids(one: str, two: str) -> list[dict[str, Any]]:
    """Both, each alone, in dtypes that keep apart what differs, and at both ends of 64 bits."""
    high, low = IDS + (2**63 - 8), IDS - (2**63 - 3)
    alone = [group for name in (one, two) for group in integers(name, IDS, torch.int8)]
    ends = [{one: high}, {two: low}, {one: high, two: high}]
    return [{one: IDS, two: IDS}, {one: IDS.int(), two: IDS}, *alone, *ends]


def pairs(name: str) -> list[dict[str, Any]]:
    return [{name: p} for p in (PAIRS, REPEATED, PAIRS.T.contiguous().T, PAIRS.int(), PAIRS.to(torch.uint8))]


ROWS: Groups = {  # of all contrastive losses
    "weights of one": [{}, {"weights": torch.ones(6)}, {"weights": torch.ones(6).bool()}, {"weights": None}],
    "weights": [{"weights": w} for w in (WEIGHTS, WEIGHTS.double(), WEIGHTS.half(), WEIGHTS.repeat(2, 1).T[:, 0])],
    "mask": [{"weights": MASK.float()}, {"weights": MASK}, {"weights": MASK.bfloat16()}],
    "workspace_mib": [{}, *({"workspace_mib": w} for w in (1, 1e-300, 1e-5, 0.01, 1e9, 1e308))],
}
SOFTMAX: Groups = ROWS | {
    "label_smoothing of 0": [{}, {"label_smoothing": 0.0}, {"label_smoothing": 0}],
    "label_smoothing": [{"label_smoothing": 0.2}],
    "label_smoothing of 1": [{"label_smoothing": 1.0}, {"label_smoothing": 1}],
    "return_lse": [{}, {"return_lse": False}, {"return_lse": True}],
}
SAMPLING: Groups = {
    "temperature": number("temperature", 0.25),
    "whole temperature": [{"temperature": 2.0}, {"temperature": 2}],
    "include_positive": [{"include_positive": False}],
    "included positive": [{}, {"include_positive": True}],
    "sampling of nothing": [{}, {"sampling": None}, {"sampling": NegativeSampling()}],
    "tau_plus": [{"sampling": NegativeSampling(tau_plus=0.1), "temperature": 1.0}],
    "hardness": [{"sampling": NegativeSampling(hardness=h)} for h in (1.0, 1)],
    "margin": [{"sampling": NegativeSampling(margin=m)} for m in (0.0, 0)],
    "wide margin": [{}, {"sampling": NegativeSampling(margin=2.1)}],
}
NORMALIZED: Groups = {
    "normalize": [{}, {"normalize": True}], "not normalize": [{"normalize": False, "temperature": 5.0}]
}  # fmt: skip
PLAIN: Groups = SOFTMAX | SAMPLING | NORMALIZED | {"bias of all": [{}, {"bias": None}, *number("bias", 0.75)]}
MANY = ("mean", "sum")
IN_BATCH: Groups = PLAIN | {
    "column bias": [{"bias": b} for b in (COLUMNS, Parameter(COLUMNS.clone()), COLUMNS.double())],
    "symmetric": [{"symmetric": True}],
    "not symmetric": [{}, {"symmetric": False}, {"in_batch": True}, {"in_batch": None}],
    "own targets": [{}, *integers("targets", torch.arange(6), torch.int8)],
    "targets": integers("targets", TARGETS, torch.int8),
    "one of several positives": [{"targets": TARGETS}, *({"targets": TARGETS[:, None], "positives": p} for p in MANY)],
    "ids": ids("query_ids", "key_ids"),
    "excluded_pairs": pairs("excluded_pairs"),
    "negative_pairs": pairs("negative_pairs"),
    "no excluded_pairs": [{}, {"excluded_pairs": PAIRS[:0]}, {"excluded_pairs": torch.arange(6)[:, None].repeat(1, 2)}],
    "all ids equal": [
        {"query_ids": IDS * 0, "key_ids": IDS * 0},
        {"query_ids": IDS * 0},
        {"key_ids": IDS * 0},
        {"negative_pairs": PAIRS[:0]},
        {"excluded_pairs": torch.cartesian_prod(torch.arange(6), torch.arange(6))},
    ],
    "all ids different": [{}, {"query_ids": torch.arange(6)}, {"key_ids": torch.arange(6)}],
}
UNUSED_IDS = [{}, {"query_ids": IDS}, {"key_ids": IDS}, {"query_ids": IDS, "key_ids": IDS}]
OWN: Groups = PLAIN | {
    "in_batch": [{"in_batch": True}], "not in_batch": [{}, {"in_batch": False}, {"in_batch": None}],
    "own targets": [{}, *integers("targets", torch.arange(6))], "targets": integers("targets", TARGETS),
    "ids of keys that are no negatives": UNUSED_IDS,
}  # fmt: skip
BANK_IDS, BANK_BIAS = torch.cat((IDS, torch.tensor([7, 5, 1, 3]))), torch.linspace(-1, 1, 10)
SHARED: Groups = OWN | {
    "ids": [{"query_ids": IDS, "key_ids": BANK_IDS}, {"key_ids": BANK_IDS}, {"key_ids": BANK_IDS.int()}],
    "column bias": [{"bias": BANK_BIAS}, {"bias": Parameter(BANK_BIAS.clone())}],
}
PIXELS = (2, 3, 8, 8)
MAP = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
IMAGE_PARTS = {"pixel": (1, 1.0), "smoothness": (1, 0.5), "ssim": 0.2}
MS_SSIM = {"window": 3, "level_weights": (0.5, 0.5), "padding": "same"}


def part(name: str, *options: dict[str, Any]) -> list[dict[str, Any]]:
    return [{f"{name}_options": one} for one in options]


IMAGES: dict[str, tuple[dict[str, Any], Groups]] = {
    "pixel_loss": ({}, {
        "p 1": [{"p": 1}, {"p": 1.0}], "p": [{"p": 1.5}],
        "p 2": [{}, {"p": 2}, {"p": 2.0}, {"eps": 0.5}, {"delta": 0.1}, {"weight": None}],
        "charbonnier": [{"p": "charbonnier"}, {"p": "charbonnier", "eps": 1e-6, "delta": 7}],
        "eps": [{"p": "charbonnier", "eps": 0.1}], "huber": [{"p": "huber"}, {"p": "huber", "delta": 1, "eps": 7}],
        "delta": [{"p": "huber", "delta": 0.1}],
        "weight of one": [{}, *({"weight": torch.ones(s)} for s in ((), (1,), (8, 8), (2, 1, 8, 8), PIXELS))],
        "weight": [{"weight": w} for w in (MAP, MAP[0, 0], MAP.expand(PIXELS), MAP.double(), MAP.repeat(2, 3, 1, 1))],
    }),
    "smoothness_loss": ({}, {
        "p 1": [{}, {"p": 1}, {"order": 1}, {"guide": None}, {"weight": None}, {"convention": "fastloss"}],
        "p 2": [{"p": 2}], "isotropic": [{"p": "isotropic"}], "norm": [{"p": "norm"}], "order": [{"order": 2}],
        "flat guide": [{}, {"guide": torch.ones(2, 1, 8, 8)}, {"guide": torch.ones(2, 5, 8, 8)}],
        "guide": [{"guide": MAP.expand(2, c, 8, 8)} for c in (1, 3)],
        "weight of one": [{}, {"weight": torch.ones(1)}, {"weight": torch.ones(PIXELS)}],
        "weight": [{"weight": w} for w in (MAP, MAP[0, 0], MAP.expand(PIXELS).clone())],
    }),
    "ssim_loss": ({}, {
        "defaults": [{}, {"window": 11}, {"sigma": 1.5}, {"data_range": 1}, {"padding": "same"}],
        "constants": [{}, {"k1": 0.01}, {"k2": 0.03}, {"weight": None}, {"luminance": True}],
        "luminance": [{"luminance": False}],
        "window": [{"window": 3}], "sigma": [{"sigma": 0.7}], "padding": [{"padding": "valid", "window": 3}],
        "data_range": [{"data_range": 2.0}, {"data_range": 2}], "k1": [{"k1": 0.1}], "k2": [{"k2": 0.1}],
        "weight of one": [{}, {"weight": torch.ones(1)}, {"weight": torch.ones(2, 1, 1, 1)}],
        "axes": [{"window": (3, 3), "sigma": [0.7, 0.7]}, {"window": 3, "sigma": 0.7}],
        "axis": [{"window": (3, 5)}], "map": [{"reduction": "map"}, {"reduction": "map", "window": [11, 11]}],
    }),
    "ms_ssim_loss": (MS_SSIM, {
        "levels": [{}, {"level_weights": [0.5, 0.5]}],
        "one level": [{"level_weights": (1,)}, {"level_weights": (1.0,)}],
        "data_range": [{"data_range": 2.0}], "sigma": [{"sigma": 0.7}], "k1": [{"k1": 0.1}], "k2": [{"k2": 0.1}],
        "padding": [{"padding": "valid"}],
        "odd sides": [{}, {"odd_sides": "zeros"}, {"odd_sides": "drop"}, {"odd_sides": "repeat"}],
    }),
    "image_loss": (IMAGE_PARTS, {
        "parts": [{}, {"pixel": [1, 1]}, {"ssim": 0.2}, {"pixel_options": {}}, {"smoothness_options": None}],
        "pixel alone": [{"smoothness": None, "ssim": None}], "without pixel": [{"pixel": None}],
        "without ssim": [{"ssim": None}], "without smoothness": [{"smoothness": None}],
        "smoothness alone": [{"pixel": None, "ssim": None}], "ssim alone": [{"pixel": None, "smoothness": None}],
        "norm": [{"smoothness": ("norm", 0.5)}], "isotropic": [{"smoothness": ("isotropic", 0.5)}],
        "huber": [{"pixel": ("huber", 1.0)}], "eps": [{"pixel": ("charbonnier", 1.0), "pixel_options": {"eps": 0.1}}],
        "pixel weight": part("pixel", {"weight": MAP}, {"weight": MAP.expand(PIXELS)}),
        "order": part("smoothness", {"order": 2}), "guide": part("smoothness", {"guide": MAP.expand(2, 1, 8, 8)}),
        "order without ssim": [{"ssim": None, "smoothness_options": {"order": 2}}],
        "guide without ssim": [{"ssim": None, "smoothness_options": {"guide": MAP.expand(2, 3, 8, 8)}}],
        "weights without ssim": [
            {"ssim": None, "pixel_options": {"weight": MAP}, "smoothness_options": {"weight": MAP}}
        ],
        "smoothness weight": part("smoothness", {"weight": MAP}, {"weight": MAP[0, 0]}),
        "window": part("ssim", {"window": 3}), "sigma": part("ssim", {"sigma": 0.7}), "k1": part("ssim", {"k1": 0.1}),
        "data_range": part("ssim", {"data_range": 2}, {"data_range": 2.0}), "k2": part("ssim", {"k2": 0.1}),
        "padding": part("ssim", {"padding": "valid", "window": 3}), "ssim weight": part("ssim", {"weight": MAP}),
    }),
}  # fmt: skip
FEATURES: Groups = {
    "weights of one": [{}, {"weights": None}, {"weights": [1, 1, 1]}, {"weights": (1.0, 1.0, 1.0)}],
    "weights": [{"weights": [2.0, 0.0, -1.0]}, {"weights": (2, 0, -1)}],
    "l1": [{}, {"criterion": "l1"}, {"eps": 0.5}, {"beta": 0.5}], "l2": [{"criterion": "l2"}],
    "charbonnier": [{"criterion": "charbonnier"}, {"criterion": "charbonnier", "beta": 9}],
    "eps": [{"criterion": "charbonnier", "eps": 0.1}], "beta": [{"criterion": "smooth_l1", "beta": 0.1}],
    "smooth_l1": [{"criterion": "smooth_l1"}, {"criterion": "smooth_l1", "beta": 1, "eps": 9}],
}  # fmt: skip
SCALE = {"logit_scale": 4.0}
SPELLINGS: dict[str, tuple[dict[str, Any], Groups]] = {
    "info_nce": ({}, IN_BATCH),
    "info_nce frozen keys": ({}, IN_BATCH),
    "info_nce own negatives": ({"temperature": 0.5}, OWN),
    "info_nce frozen negatives": ({"temperature": 0.5}, OWN),
    "info_nce shared negatives": ({}, SHARED),
    "info_nce bank": ({}, SHARED),
    "clip_loss": (SCALE, SOFTMAX | {
        "logit_scale": number("logit_scale", 4.0), "normalize": [{"normalize": True}],
        "plain": [{}, {"normalize": False}],
        "logit_bias": [{}, {"logit_bias": None}, *number("logit_bias", 0.75)], "ids": ids("image_ids", "text_ids"),
        "groups": ids("image_groups", "text_groups"), "excluded_pairs": pairs("excluded_pairs"),
    }),
    "siglip_loss": (SCALE | {"logit_bias": -1.0}, ROWS | {
        "logit_scale": number("logit_scale", 4.0), "normalize": [{"normalize": True}],
        "plain": [{}, {"normalize": False}],
        "no bias": [{"logit_bias": 0.0}, {"logit_bias": None}, {"logit_bias": 0}],
        "logit_bias": number("logit_bias", -2.5), "ids": ids("image_ids", "text_ids"),
        "groups": ids("image_groups", "text_groups"),
        "groups, one side": [{"symmetric": False} | one for one in ids("image_groups", "text_groups")[:3]],
        "groups, soft": [{"soft_labels": True} | one for one in ids("image_groups", "text_groups")[:3]],
        "negative_only": [{"negative_only": True}], "negative_only, ids": [
            {"negative_only": True} | one for one in ids("image_ids", "text_ids")
        ],
    }),
    "supcon_loss": ({}, ROWS | NORMALIZED | {
        "temperature": number("temperature", 0.25), "include_positive": [{"include_positive": False}],
        "return_lse": [{}, {"return_lse": True}], "excluded_pairs": pairs("excluded_pairs"),
        "keys": [{"keys": k, "key_labels": i} for k in (KEYS, Parameter(KEYS.clone())) for i in (IDS, IDS.int())],
    }),
    "nt_xent_loss": ({}, SOFTMAX | SAMPLING | NORMALIZED | {
        "ids": integers("ids", IDS, torch.int8), "excluded_pairs": pairs("excluded_pairs"),
        "negative_pairs": pairs("negative_pairs"),
    }),
    "feature_distance": ({}, FEATURES),
    "style_distance": ({}, FEATURES | {
        "normalization": [{}, {"normalization": "chw"}], "hw": [{"normalization": "hw"}],
        "none": [{"normalization": "none"}],
    }),
    "lpips_distance": ({}, {
        "defaults": [{}, {"spatial": False}, {"eps": 1e-10}, {"size": None}], "eps": [{"eps": 0.1}],
        "spatial": [{"spatial": True}, {"spatial": True, "size": (5, 7)}, {"spatial": True, "size": [5, 7]}],
    }),
    "dists_distance": ({}, {"c1": [{"c1": 0.1}], "c2": [{"c2": 0.1}], "whole": [{"c1": 1.0}, {"c1": 1}]}),
    **IMAGES,
}  # fmt: skip
SHAPES: dict[str, Any] = {
    "clip_loss": (6, 7), "info_nce frozen negatives": (6, 4, 7), "info_nce bank": (6, 4, 7),
}  # fmt: skip
