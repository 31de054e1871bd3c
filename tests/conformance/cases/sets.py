"""Rows of the losses that compare sets: diversity against a bank, mode seeking, NDiv."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import fastloss
from tests.conformance.case import Bench, Case, Draw, with_argument, with_options

BANK_SHAPES = (((3, 2, 4, 5), 4), ((1, 1), 1), ((5, 7), 9), ((2, 3, 9, 9), 6), ((2, 3, 1, 4), 3), ((2, 3, 4, 1), 3))


def generated_and_bank(draw: Draw, shape: tuple) -> tuple:
    images, rows = shape
    return draw.uniform(*images), draw.uniform(rows, *images[1:])


def eager_diversity(generated, bank, mode="nearest", margin=None, metric="l1", temperature=0.01, reduction="mean",
                    bank_scale=1.0, bank_shift=0.0, **_):  # fmt: skip
    g, t = generated.flatten(1)[:, None], bank.flatten(1)[None] * bank_scale + bank_shift
    if metric == "cosine":
        d = 1 - F.cosine_similarity(g, t, dim=-1)
    else:
        d = (g - t).abs().mean(-1) if metric == "l1" else ((g - t) ** 2).mean(-1)
    if mode == "nearest":
        d = d.min(1).values
    elif mode == "mean":
        d = d.mean(1)
    else:
        d = -temperature * torch.log(torch.exp(-d / temperature).mean(1))
    loss = -d if margin is None else F.relu(margin - d)
    return loss if reduction == "none" else getattr(loss, reduction)()


def images_and_bank(draw: Draw, shape: tuple) -> tuple:
    count, rows, *image = shape
    return draw.uniform(count, *image), draw.uniform(rows, *image)


def bank_bytes(shape: tuple, size: int, mode: str, options: dict) -> int:
    """The bank and the images read once; backward images read, their gradient written, and their winners read, or where
    all rows have a gradient the bank once more."""
    count, rows, *image = shape
    elements = math.prod(image) * size
    whole = options.get("mode") == "softmin" or options == {"mode": "mean"}
    forward, backward = (count + rows) * elements, (2 * count + (rows if whole else count)) * elements
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def pair_bytes(shape: tuple, size: int, mode: str) -> int:
    """Two images read, and in the backward once more with two gradients written."""
    elements = math.prod(shape) * size
    return {"forward": 2, "backward": 4, "both": 6}[mode] * elements


def batch_bytes(shape: tuple, size: int, mode: str) -> int:
    """The images read, and in the backward once more with a gradient written."""
    elements = math.prod(shape) * size
    return {"forward": 1, "backward": 2, "both": 3}[mode] * elements


def eager_mode_seeking(images_a, images_b, z_a, z_b, eps=1e-5, form="msgan", margin=None):
    if form == "msgan":
        return 1 / (F.l1_loss(images_a, images_b) / F.l1_loss(z_a, z_b) + eps)
    image, z = (F.l1_loss(a, b, reduction="none").flatten(1).mean(1) for a, b in ((images_a, images_b), (z_a, z_b)))
    ratio = image / (z + eps)
    return -(ratio if margin is None else ratio.clamp(max=margin)).mean()


def two_images_and_noises(draw: Draw, shape: tuple) -> tuple:
    image = draw.uniform(*shape)
    return image, draw.near(image) + 0.01, draw.normal(shape[0], 5), draw.normal(shape[0], 5)


def images_and_noises(draw: Draw, shape: tuple) -> tuple:
    return draw.uniform(*shape), draw.normal(shape[0], 5)


def eager_normalized_diversity(images, z, alpha=0.8, metric="l2", detach_sums=True):
    count, shares = len(z), []
    for x in (images.flatten(1), z):
        d = (x[:, None] - x).norm(p=2 if metric == "l2" else 1, dim=-1)
        total = d.sum(1, keepdim=True).clamp(min=1e-30)
        shares.append(d / (total.detach() if detach_sums else total))
    return F.relu(alpha * shares[1] - shares[0]).sum() / max(count * (count - 1), 1)


SET_CASES = [
    Case(
        "diversity_loss",
        fastloss.diversity_loss,
        generated_and_bank,
        eager_diversity,
        shapes=BANK_SHAPES,
        options=[
            {},
            {"metric": "l2"},
            {"metric": "cosine"},
            {"mode": "mean"},
            {"mode": "mean", "metric": "l2"},
            {"mode": "softmin"},
            {"mode": "softmin", "metric": "cosine", "temperature": 0.1},
            {"margin": 0.3},
            {"metric": "l2", "bank_scale": 0.5, "bank_shift": 0.125},  # powers of two: exact in every dtype
            {"mode": "softmin", "metric": "l2", "margin": 0.15, "workspace_mib": 1},
        ],
        grads=(0,),
        bad=[
            ("rank", with_argument(1, lambda t: t[0]), ValueError, "bank: expected [M, ...] with the trailing shape"),
            ("size", with_argument(1, lambda t: t[..., :-1]), ValueError, "bank: expected [M, ...] with the trailing"),
            ("empty bank", with_argument(1, lambda t: t[:0]), ValueError, "bank: expected at least one image"),
            ("gradient", with_argument(1, lambda t: t.requires_grad_()), ValueError, "bank: no gradient is provided"),
            ("bytes", with_argument(1, lambda t: t.byte()), ValueError, "bank_scale: expected the number that makes a"),
            ("scale", with_options(bank_scale=0), ValueError, "bank_scale: expected a number other than 0"),
            ("shift", with_options(bank_shift="1"), TypeError, "bank_shift: expected a number, got str"),
            ("row", with_options(mode="mean", return_nearest=True), ValueError, "return_nearest: expected False with"),
            ("integer", with_argument(0, lambda t: t.byte()), TypeError, "generated: expected a float16"),
            ("empty", with_argument(0, lambda t: t[:0]), ValueError, "mean of an empty batch"),
            ("mode", with_options(mode="min"), ValueError, "mode: expected one of"),
            ("metric", with_options(metric="l3"), ValueError, "metric: expected one of"),
            ("margin", with_options(margin=0.0), ValueError, "margin: expected a finite number > 0, got 0.0"),
            ("temperature", with_options(temperature=-1), ValueError, "temperature: expected a finite number > 0"),
            ("workspace", with_options(workspace_mib=0), ValueError, "workspace_mib: expected a finite number >= 1"),
            ("reduction", with_options(reduction="avg"), ValueError, "reduction: expected one of"),
        ],
        bench=Bench(
            shapes=[(64, 1024, 3, 32, 32)],  # eager broadcast holds 800 MB for each of its steps
            cost=bank_bytes,
            make=images_and_bank,
            options=[
                {},
                {"metric": "l2"},
                {"metric": "cosine"},
                *({"mode": "softmin", "metric": metric} for metric in ("l1", "l2", "cosine")),
                {"mode": "mean"},
                *({"mode": "mean", "metric": metric} for metric in ("l2", "cosine")),
            ],
            headline=3,
        ),
        module=fastloss.DiversityLoss,
    ),
    Case(
        "mode_seeking_loss",
        fastloss.mode_seeking_loss,
        two_images_and_noises,
        eager_mode_seeking,
        shapes=((2, 3, 4, 4), (1, 1), (3, 2, 7, 13), (2, 3, 1, 4), (2, 3, 4, 1)),
        options=[{}, {"eps": 0.1}, {"form": "dsgan"}, {"form": "dsgan", "margin": 0.25}],
        grads=(0, 1, 2, 3),
        reductions=(),
        extra={"bounded": True},  # infinitely far noises with finite images are the bound, 1 / eps
        bad=[
            ("images", with_argument(1, lambda t: t[..., :-1]), ValueError, "images_b: expected the shape of images_a"),
            ("noises", with_argument(3, lambda t: t[..., :-1]), ValueError, "z_b: expected the shape of z_a"),
            ("list", with_argument(2, lambda t: [1.0]), TypeError, "z_a: expected a tensor, got list"),
            ("eps", with_options(eps=0.0), ValueError, "eps: expected a finite number > 0, got 0.0"),
            ("form", with_options(form="gan"), ValueError, "form: expected one of"),
            ("margin", with_options(form="dsgan", margin=0), ValueError, "margin: expected a finite number > 0"),
            ("bounded", with_options(form="msgan", margin=1), ValueError, "margin: expected None with form="),
        ],
        bench=Bench(
            shapes=[(32, 3, 128, 128)],
            cuda_shapes=[(64, 3, 256, 256)],
            cost=pair_bytes,
            options=[{}, {"form": "dsgan"}],
            all_grads=True,
        ),
        module=fastloss.ModeSeekingLoss,
    ),
    Case(
        "normalized_diversity_loss",
        fastloss.normalized_diversity_loss,
        images_and_noises,
        eager_normalized_diversity,
        shapes=((5, 3, 4, 4), (1, 1), (4, 2, 1, 4)),
        options=[{}, {"metric": "l1", "alpha": 1.5, "detach_sums": False}],
        grads=(0, 1),
        reductions=(),
        extra={"gradcheck": {"detach_sums": False}},
        bad=[
            ("noises", with_argument(1, lambda t: t[:-1]), ValueError, "z: expected one noise for each of the images"),
            ("alpha", with_options(alpha=0.0), ValueError, "alpha: expected a finite number > 0, got 0.0"),
            ("metric", with_options(metric="cosine"), ValueError, "metric: expected one of"),
            ("empty", with_argument(0, lambda t: t[..., :0]), ValueError, "mean of an empty batch"),
        ],
        bench=Bench(shapes=[(64, 3, 32, 32)], cost=batch_bytes, options=[{}, {"metric": "l1"}], all_grads=True),
        module=fastloss.NormalizedDiversityLoss,
    ),
]
