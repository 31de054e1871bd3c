"""Rows of the contrastive losses: InfoNCE with all kinds of negatives, CLIP, SigLIP, SupCon, NT-Xent."""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F

import fastloss
from fastloss import NegativeSampling
from tests.conformance.case import Bench, Case, with_argument, with_options
from tests.conformance.eager_contrastive import eager_clip, eager_info_nce, eager_nt_xent, eager_siglip, eager_supcon


def pair(draw, shape):
    query = draw.normal(*shape)
    return query, query + draw.normal(*shape)


def unit_pair(draw, shape):
    """As encoders give them to CLIP's loss; `pair` saturates the softmax at its scale."""
    return tuple(F.normalize(t, dim=1) for t in pair(draw, shape))


def with_negatives(draw, shape):
    rows, keys, width = shape
    return *pair(draw, (rows, width)), draw.normal(keys, width)


def library_info_nce(query, key, negatives, temperature):
    from info_nce import info_nce

    return info_nce(query, key, negatives, temperature=temperature, negative_mode="paired")


def library_siglip(image, text, logit_scale, logit_bias, normalize):
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), logit_scale, logit_bias)


def rivals(**functions):
    """Those whose library, the key, is installed."""
    return {"rivals": {name: fn for name, fn in functions.items() if importlib.util.find_spec(name)}}


def with_labels(draw, shape):
    return draw.normal(*shape), torch.arange(shape[0]).to(draw.device) % max(shape[0] // 3, 1)


IDS, WEIGHTS = torch.tensor([3, 1, 3, 7, 1, -2]), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25])
BAD_TEMPERATURES = [
    ("temperature 0", with_options(temperature=0), ValueError, "temperature: expected a finite number > 0, got 0"),
    ("temperature -1", with_options(temperature=-1.0), ValueError, "temperature: expected a finite number > 0"),
    ("temperature nan", with_options(temperature=math.nan), ValueError, "temperature: expected a finite number > 0"),
    ("temperature str", with_options(temperature="0.1"), TypeError, "temperature: expected a number, got str"),
    ("temperatures", with_options(temperature=torch.ones(2)), ValueError, "a tensor with one element, got shape (2,)"),
]
BAD_OPTIONS = [
    ("workspace", with_options(workspace_mib=0), ValueError, "workspace_mib: expected a finite number > 0"),
    ("weights", with_options(weights=torch.ones(3, 2)), ValueError, "weights: expected one per row"),
    ("weights grad", with_options(weights=torch.ones(6).requires_grad_()), ValueError, "weights: "),
    ("reduction", with_options(reduction="avg"), ValueError, "reduction: expected one of"),
    ("normalize", with_options(normalize="cosine"), TypeError, "normalize: expected True or False, got str"),
]
BAD_PAIR = [
    ("width", with_argument(1, lambda t: t[:, :-1]), ValueError, "'s width, D=7, got D=6"),
    ("1-D", with_argument(0, lambda t: t[0]), ValueError, "expected a 2-D tensor, got shape (7,)"),
    ("3-D", with_argument(1, lambda t: t[None]), ValueError, "expected a 2-D tensor, got shape (1, "),
    ("integer", with_argument(0, lambda t: t.long()), TypeError, "expected a float16"),
    ("list", with_argument(1, lambda t: [t]), TypeError, "expected a tensor, got list"),
    ("D = 0", with_argument(0, lambda t: t[:, :0]), ValueError, "with D >= 1"),
]
BAD_INFO_NCE = [
    *BAD_PAIR,
    *BAD_TEMPERATURES,
    *BAD_OPTIONS,
    ("rows", with_argument(1, lambda t: t[:-1]), ValueError, "key: expected at least query's 6 rows"),
    ("smoothing", with_options(label_smoothing=1.5), ValueError, "label_smoothing: expected a finite number >= 0"),
    ("bias", with_options(bias=torch.zeros(4)), ValueError, "bias: expected a number or a tensor of one"),
    ("ids", with_options(query_ids=IDS[:5]), ValueError, "query_ids: expected shape [6], got (5,)"),
    ("float ids", with_options(key_ids=WEIGHTS), TypeError, "key_ids: expected an integer tensor, got torch.float32"),
    ("in_batch", with_options(in_batch=False), ValueError, "in_batch: False leaves no negatives"),
    ("targets", with_options(targets=torch.tensor([0, 1, 2, 3, 4, 6])), ValueError, "0 to 5, got 0 to 6"),
    ("targets < 0", with_options(targets=torch.tensor([0, 1, 2, 3, 4, -1])), ValueError, "0 to 5, got -1 to 4"),
    ("sampling", with_options(sampling=0.1), TypeError, "sampling: expected a NegativeSampling, got float"),
    ("tau_plus", with_options(sampling=NegativeSampling(tau_plus=0.1), normalize=False), ValueError, "normalize=True"),
    ("symmetric", with_options(symmetric=True, targets=torch.arange(6)), ValueError, "symmetric: expected as many"),
]
BAD_NEGATIVES = [
    ("1-D", with_argument(2, torch.flatten), ValueError, "negatives: expected [K, D], shared, or [M, K, D]"),
    ("width", with_argument(2, lambda t: t[..., 1:]), ValueError, "negatives: expected embeddings of query's width"),
    ("symmetric", with_options(symmetric=True), ValueError, "symmetric: the keys' direction has in-batch negatives"),
]


def pairs_flops(times):
    """`times` 2 M N D in all: one for the similarities, two for the gradients, one more where logits are made again."""

    def cost(shape, size, mode):
        rows, width = shape
        return {"forward": 1, "backward": times - 1, "both": times}[mode] * 2 * rows * rows * width

    return cost


def clip_flops(shape, size, mode):
    """The first 64 MiB of the logits are not made again."""
    return pairs_flops(4 - min(1, 2**24 / shape[0] ** 2))(shape, size, mode)


def triangle_flops(views):
    """All rows of all views against each other: each pair once, made again in the backward, two for the gradients."""
    return lambda shape, size, mode: {"forward": 1, "backward": 3}.get(mode, 4) * (views * shape[0]) ** 2 * shape[1]


def frozen_flops(shape, size, mode):
    """Without a gradient of the keys, one product makes that of the queries."""
    rows, keys, width = shape
    return {"forward": 1, "backward": 1, "both": 2}[mode] * 2 * rows * keys * width


CONTRASTIVE = [
    Case(
        "info_nce",
        fastloss.info_nce,
        pair,
        eager_info_nce,
        empty=((0, 7), (1, 7)),
        shapes=((6, 7), (4, 16), (9, 33)),
        options=[
            {},
            {"temperature": torch.tensor(0.3)},
            {"include_positive": False},
            {"symmetric": True},
            {"normalize": False, "temperature": 9.0, "bias": -1.5},
            {"label_smoothing": 0.2, "symmetric": True, "include_positive": False},
            {"sampling": NegativeSampling(tau_plus=0.1, hardness=0.5), "temperature": 1.0},
            {"sampling": NegativeSampling(margin=0.4), "symmetric": True},
        ],
        bad=BAD_INFO_NCE,
        module=fastloss.InfoNCELoss,
        bench=Bench(
            shapes=[(256, 512), (2048, 512)],
            cost=pairs_flops(3),
            unit="flops",
            options=[{}, {"symmetric": True}],
            all_grads=True,
            cuda_shapes=[(8192, 768), (32768, 768)],
        ),
    ),
    Case(
        "info_nce masked",
        fastloss.info_nce,
        pair,
        eager_info_nce,
        shapes=((6, 7), (6, 2)),
        options=[
            {"query_ids": IDS, "key_ids": IDS},
            {"weights": WEIGHTS, "symmetric": True},
            {"targets": torch.tensor([5, 5, 0, 1, 2, 3]), "include_positive": False},
            {"bias": torch.linspace(-1, 1, 6), "label_smoothing": 0.1},
            {"query_ids": IDS, "key_ids": IDS, "sampling": NegativeSampling(hardness=1.0), "temperature": 1.0},
            {"targets": torch.arange(6) // 2, "sampling": NegativeSampling(tau_plus=0.1), "temperature": 1.0},
            {"query_ids": IDS, "key_ids": IDS, "include_positive": False, "bias": torch.linspace(-1, 1, 6)},
            {
                "bias": torch.linspace(-1, 1, 6),
                "include_positive": False,
                "sampling": NegativeSampling(margin=0.3),
                "normalize": False,
                "temperature": 2.0,
            },
        ],
    ),
    Case(
        "info_nce shared negatives",
        fastloss.info_nce,
        with_negatives,
        eager_info_nce,
        shapes=((6, 4, 7), (5, 9, 3)),
        empty=((6, 0, 7), (0, 4, 7), (0, 0, 7), (1, 0, 7)),
        options=[
            {},
            {"in_batch": True, "label_smoothing": 0.1},
            {"include_positive": False, "temperature": 1.0},
            {"in_batch": True, "symmetric": True, "temperature": 0.25},
            {"in_batch": True, "sampling": NegativeSampling(tau_plus=0.1, hardness=0.5), "temperature": 1.0},
            {"normalize": False, "temperature": torch.tensor(4.0), "sampling": NegativeSampling(margin=0.5)},
        ],
        grads=(0, 1, 2),
        bad=BAD_NEGATIVES,
        module=fastloss.InfoNCELoss,
    ),
    Case(
        "info_nce bank",
        fastloss.info_nce,
        with_negatives,
        eager_info_nce,
        empty=((3, 0, 4), (0, 5, 4)),
        shapes=((3, 5, 4), (4, 40, 6)),
        grads=(0, 1),
        options=[
            {},
            {"label_smoothing": 0.1, "normalize": False, "temperature": 3.0},
            {"sampling": NegativeSampling(tau_plus=0.1, hardness=0.5), "temperature": 1.0},
            {"sampling": NegativeSampling(margin=0.4, hardness=1.0), "temperature": 1.0, "include_positive": False},
        ],
        bench=Bench(shapes=[(256, 65536, 512)], cost=frozen_flops, unit="flops", all_grads=True),
    ),
    Case(
        "info_nce frozen keys",
        fastloss.info_nce,
        pair,
        eager_info_nce,
        empty=((0, 7), (1, 7)),
        shapes=((6, 7), (6, 2)),
        grads=(0,),
        options=[
            {},
            {"include_positive": False, "normalize": False, "temperature": torch.tensor(6.0)},
            {"targets": torch.tensor([5, 5, 0, 1, 2, 3]), "weights": WEIGHTS},
            {"query_ids": IDS, "key_ids": IDS, "label_smoothing": 0.2, "bias": torch.linspace(-1, 1, 6)},
            {"sampling": NegativeSampling(hardness=0.5, margin=0.4), "temperature": 1.0},
        ],
    ),
    Case(
        "clip_loss",
        fastloss.clip_loss,
        pair,
        eager_clip,
        empty=((0, 7), (1, 7)),
        shapes=((8, 7), (1, 3), (11, 33)),
        options=[
            {"logit_scale": 0.5},
            {"logit_scale": torch.tensor(4.0), "normalize": True, "logit_bias": -0.5},
            {"logit_scale": 14.3, "normalize": True, "label_smoothing": 0.1},
        ],
        bad=[
            *BAD_PAIR,
            *BAD_OPTIONS,
            ("rows", with_argument(1, lambda t: t[1:]), ValueError, "text: expected as many rows as image"),
            ("scale", with_options(logit_scale=-1.0), ValueError, "logit_scale: expected a finite number > 0"),
            ("bias", with_options(logit_bias=math.inf), ValueError, "logit_bias: expected a finite number"),
            ("ids", with_options(text_ids=[1]), TypeError, "text_ids: expected an integer tensor, got list"),
        ],
        module=fastloss.ClipLoss,
        bench=Bench(
            shapes=[(4096, 512), (256, 512)],
            cost=clip_flops,
            unit="flops",
            options=[{"logit_scale": 14.3}],
            all_grads=True,
            cuda_shapes=[(n, 768) for n in (1024, 8192, 32768, 65536, 131072)],
            make=unit_pair,
        ),
    ),
    Case(
        "siglip_loss",
        fastloss.siglip_loss,
        pair,
        eager_siglip,
        empty=((0, 7), (1, 7)),
        shapes=((6, 7), (6, 3)),
        options=[
            {"logit_scale": 1.0, "logit_bias": None},
            {"logit_scale": 1.0, "logit_bias": 0.0, "negative_only": True},
            {"logit_scale": 1.0, "logit_bias": 0.5, "image_ids": IDS, "text_ids": IDS, "weights": WEIGHTS},
            {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0), "normalize": True},
            {"logit_scale": 1.0, "logit_bias": 0.5, "image_groups": IDS, "text_groups": IDS.roll(1)},
        ],
        bad=[
            *BAD_PAIR,
            *BAD_OPTIONS,
            ("rows", with_argument(1, lambda t: t[1:]), ValueError, "text: expected as many rows as image"),
            ("scale", with_options(logit_scale=0.0), ValueError, "logit_scale: expected a finite number > 0"),
        ],
        module=fastloss.SigLipLoss,
        bench=Bench(
            shapes=[(4096, 512)],
            unit="flops",
            all_grads=True,
            cost=lambda shape, size, mode: (mode != "backward") * pairs_flops(3)(shape, size, "both"),
            options=[{"logit_scale": 10.0, "logit_bias": -10.0, "normalize": True}],
            cuda_shapes=[(n, 768) for n in (1024, 8192, 32768, 65536, 131072)],
        ),
        extra=rivals(open_clip=library_siglip),
    ),
    Case(
        "supcon_loss",
        fastloss.supcon_loss,
        with_labels,
        eager_supcon,
        empty=((0, 7), (1, 7)),
        shapes=((6, 7), (9, 3)),
        grads=(0,),
        options=[
            {},
            {"temperature": 0.5, "include_positive": False},
            {"temperature": torch.tensor(2.0), "normalize": False},
        ],
        bad=[
            *BAD_TEMPERATURES,
            *BAD_OPTIONS,
            ("labels", with_argument(1, lambda t: t[1:]), ValueError, "labels: expected shape [6], got (5,)"),
            ("float", with_argument(1, lambda t: t.float()), TypeError, "labels: expected an integer tensor"),
        ],
        module=fastloss.SupConLoss,
        bench=Bench(shapes=[(2048, 512)], cost=triangle_flops(1), unit="flops", cuda_shapes=[(4096, 512)]),
    ),
    Case(
        "nt_xent_loss",
        fastloss.nt_xent_loss,
        pair,
        eager_nt_xent,
        empty=((0, 7), (1, 7)),
        shapes=((6, 7), (6, 2)),
        options=[
            {},
            {"include_positive": False, "temperature": 0.5},
            {"label_smoothing": 0.1, "weights": WEIGHTS},
            {"ids": IDS, "temperature": torch.tensor(0.5)},
            {"normalize": False, "temperature": 3.0},
            {"sampling": NegativeSampling(tau_plus=0.1), "temperature": 0.5},
        ],
        bad=[
            *BAD_PAIR,
            *BAD_TEMPERATURES,
            *BAD_OPTIONS,
            ("rows", with_argument(1, lambda t: t[1:]), ValueError, "view_b: expected as many rows as view_a"),
            ("ids", with_options(ids=IDS.float()), TypeError, "ids: expected an integer tensor"),
        ],
        module=fastloss.NTXentLoss,
        bench=Bench(shapes=[(2048, 512)], cost=triangle_flops(2), unit="flops", all_grads=True),
    ),
]
