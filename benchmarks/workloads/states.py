"""Inputs as training has them, for the errors of `benchmarks.accuracy`.

A state says where training stands. Embeddings, [M, D], with pairs at cosine c to each other:
fresh        pairs and strangers alike at cosine 0
late         pairs at 0.99, strangers at 0
scale 100    pairs at 0.3, strangers at 0, the logits times 100 (CLIP's largest)
anisotropic  pairs at 0.99, strangers at 0.9, for all share a mean
long rows    fresh, with four times as many candidates in a row
Images in [0, 1], features after a ReLU, attention maps:
fresh        the prediction has nothing of the target
near-equal   they differ by 1/500 (images), 1 % (features) or 0.01 (logits)
a mean       0.9 plus noise of 0.02 (images), 5 plus noise of 0.5 (features), near-equal
long rows    attention to 2048 keys
Everything is drawn in float32 and then cast: the float64 reference gets what the others get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads.items import options_text, shape_text
from tests.conformance.cases import CASES, Case, Draw

Make = Callable[[Draw, Any], tuple]
LATE, CLIP_LIKE, COMMON = 0.99, 0.3, 0.9  # cosines
IMAGE_NOISE, FEATURE_NOISE, LOGIT_NOISE = 0.002, 0.01, 0.01


@dataclass(frozen=True, eq=False)
class State:
    """A loss with options, a shape and a maker of inputs."""

    case: Case
    name: str
    options: dict
    shape: Any
    make: Make

    def columns(self) -> dict[str, str]:
        """Those that name it in the result files."""
        options, shape = options_text(self.options), shape_text(self.shape)
        return {"loss": self.case.name, "options": options, "shape": shape, "inputs": self.name}

    def inputs(self, device: str = "cpu") -> tuple:
        return self.make(Draw(device=device), self.shape)


def at_cosine(draw: Draw, to: Tensor, cosine: float) -> Tensor:
    """Unit vectors at this cosine to those of `to`, otherwise random."""
    noise = draw.normal(*to.shape)
    across = F.normalize(noise - (noise * to).sum(-1, keepdim=True) * to, dim=-1)
    return cosine * to + (1 - cosine**2) ** 0.5 * across


def with_common(draw: Draw, to: Tensor, common: Tensor) -> Tensor:
    """Unit vectors at cosine COMMON to each other, for all have a share of the vector `common`."""
    across = F.normalize(to - (to * common).sum(-1, keepdim=True) * common, dim=-1)
    return COMMON**0.5 * common + (1 - COMMON) ** 0.5 * across


def embeddings(draw: Draw, shape: tuple, state: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors: (queries, their keys, one vector that strangers too have a share of)."""
    rows, width = shape[0], shape[-1]
    query, common = F.normalize(draw.normal(rows, width), dim=-1), F.normalize(draw.normal(1, width), dim=-1)
    inner = (LATE - COMMON) / (1 - COMMON)  # at which the pairs come to LATE in all
    cosine = {"late": LATE, "scale 100": CLIP_LIKE, "anisotropic": inner}.get(state, 0.0)
    key = at_cosine(draw, query, cosine)
    if state == "anisotropic":
        query, key = (with_common(draw, t, common) for t in (query, key))
    return query, key, common


def lengths(draw: Draw, t: Tensor) -> Tensor:
    """Rows of the lengths that a linear layer gives them, for a loss that normalises."""
    return t * t.shape[-1] ** 0.5 * (1 + 0.1 * draw.normal(*t.shape[:-1], 1))


def pairs(state: str, unit: bool = False) -> Make:
    def make(draw: Draw, shape: tuple) -> tuple:
        query, key, _ = embeddings(draw, shape, state)
        return (query, key) if unit else (lengths(draw, query), lengths(draw, key))

    return make


def with_negatives(state: str, own: bool) -> Make:
    """Shared negatives [K, D] or each row's own [M, K, D]."""

    def make(draw: Draw, shape: tuple) -> tuple:
        rows, keys, width = shape
        query, key, common = embeddings(draw, shape, state)
        negatives = F.normalize(draw.normal(*((rows, keys, width) if own else (keys, width))), dim=-1)
        if state == "anisotropic":
            negatives = with_common(draw, negatives, common)
        return tuple(lengths(draw, t) for t in (query, key, negatives))

    return make


def labelled(state: str) -> Make:
    """Four of each class; as near to their class's centre as brings two of them to the cosine of a pair."""

    def make(draw: Draw, shape: tuple) -> tuple:
        labels = draw.integers(max(1, shape[0] // 4), shape[0])
        centres, _, common = embeddings(draw, shape, "fresh")
        inner = (LATE - COMMON) / (1 - COMMON)
        cosine = {"late": LATE, "scale 100": CLIP_LIKE, "anisotropic": inner}.get(state, 0.0)
        features = at_cosine(draw, centres[labels], cosine**0.5)
        if state == "anisotropic":
            features = with_common(draw, features, common)
        return lengths(draw, features), labels

    return make


def captioned(state: str) -> Make:
    """Images with two captions each, and the groups of both."""

    def make(draw: Draw, shape: tuple) -> tuple:
        rows, texts, width = shape
        of_images, of_texts = (torch.arange(n, device=draw.device) % rows for n in (rows, texts))
        own, _, common = embeddings(draw, (rows, width), "fresh")
        inner = (LATE - COMMON) / (1 - COMMON)
        cosine = {"late": LATE, "scale 100": CLIP_LIKE, "anisotropic": inner}.get(state, 0.0)
        image, text = own, at_cosine(draw, own[of_texts], cosine)
        if state == "anisotropic":
            image, text = (with_common(draw, t, common) for t in (image, text))
        return image, text, of_images, of_texts

    return make


def images(state: str, count: int = 2) -> Make:
    """The target and the prediction, or the prediction alone."""

    def make(draw: Draw, shape: tuple) -> tuple:
        image = draw.uniform(*shape)
        if state == "a mean":
            image = (0.9 + 0.02 * draw.normal(*shape)).clamp(0, 1)
        near = image + IMAGE_NOISE * draw.normal(*shape)
        pred = draw.uniform(*shape) if state == "fresh" else near.clamp(0, 1)
        return (image, pred)[2 - count :]

    return make


def plane(state: str, guided: bool = False) -> Make:
    """The image to smooth: its neighbours differ as noise does, or by next to nothing."""

    def make(draw: Draw, shape: tuple) -> tuple:
        base = {"fresh": draw.uniform(*shape), "near-equal": draw.uniform(*shape[:2], 1, 1).expand(shape)}
        image = base["fresh"] if state == "fresh" else base["near-equal"] + IMAGE_NOISE * draw.normal(*shape)
        image = 0.9 + 0.02 * draw.normal(*shape) if state == "a mean" else image
        guide = (draw.uniform(shape[0], 3, *shape[2:]), draw.uniform(shape[0], 1, *shape[2:]))
        return (image, *guide) if guided else (image,)

    return make


def features(state: str, weights: int = 0) -> Make:
    """Two lists of features and so many lists of weights of channels."""

    def make(draw: Draw, shapes: tuple) -> tuple:
        if state == "a mean":
            own = [5 + 0.5 * draw.normal(*s) for s in shapes]
        else:
            own = [draw.normal(*s).relu() for s in shapes]
        if state == "fresh":
            other = [draw.normal(*s).relu() for s in shapes]
        else:
            other = [f * (1 + FEATURE_NOISE * draw.normal(*f.shape)) for f in own]
        return own, other, *([draw.uniform(s[1]) for s in shapes] for _ in range(weights))

    return make


def generated(state: str) -> Make:
    """Images and a bank of images; near-equal: each has its like there."""

    def make(draw: Draw, shape: tuple) -> tuple:
        images, (rows,) = shape
        bank = draw.uniform(rows, *images[1:])
        near = bank[: images[0]] + IMAGE_NOISE * draw.normal(*images)
        return (draw.uniform(*images) if state == "fresh" else near), bank

    return make


def modes(state: str) -> Make:
    """Two images and their noises."""

    def make(draw: Draw, shape: tuple) -> tuple:
        pair = images("near-equal" if state == "near-equal" else "fresh")(draw, shape)
        return *pair, draw.normal(shape[0], 64), draw.normal(shape[0], 64)

    return make


def noised(state: str) -> Make:
    """Images and their noises."""

    def make(draw: Draw, shape: tuple) -> tuple:
        images_a, _, noises, _ = modes(state)(draw, shape)
        return images_a, noises

    return make


def attention(state: str, inputs: str) -> Make:
    """Two sets of maps, or of the queries and keys they come from."""

    def make(draw: Draw, shape: tuple) -> tuple:
        near = lambda t: t + LOGIT_NOISE * draw.normal(*t.shape)  # noqa: E731
        if inputs == "qk":
            b, h, q, k, d = shape
            own = draw.normal(b, h, q, d), draw.normal(b, h, k, d)
            other = (draw.normal(b, h, q, d), draw.normal(b, h, k, d))
            return *own, *(tuple(map(near, own)) if state == "near-equal" else other)
        a = 2 * draw.normal(*shape)
        b = near(a) if state == "near-equal" else 2 * draw.normal(*shape)
        return (a, b) if inputs == "logits" else (a.softmax(-1), b.softmax(-1))

    return make


ROWS, LONG, WIDTH = 512, 2048, 128
BANK, OWN = (64, 8192, WIDTH), (16, 1024, WIDTH)
PLANE, WINDOWED, LEVELS = (1, 3, 512, 512), (1, 3, 96, 96), (1, 3, 176, 176)
FEATURES = ((1, 64, 128, 128), (1, 128, 64, 64), (1, 256, 32, 32))
TEMPERATURE = {"temperature": 0.1}, {"temperature": 0.01}
CLIP = {"logit_scale": 14.3}, {"logit_scale": 100.0}
SIGLIP = tuple({"logit_scale": s, "logit_bias": -10.0, "normalize": True} for s in (10.0, 100.0))
UNIT_SIGLIP = tuple({"logit_scale": s, "logit_bias": -10.0} for s in (10.0, 100.0))
EMBEDDING_STATES, OTHER_STATES = ("fresh", "late", "anisotropic"), ("fresh", "near-equal", "a mean")


def contrastive(make: Callable[[str], Make], options: tuple, shape: tuple, long: tuple = ()) -> list[tuple]:
    """(state, options, shape, maker) of each; those of one shape and options beside one another."""
    found = [(s, options[0], shape, make(s)) for s in EMBEDDING_STATES]
    found += [("scale 100", options[1], shape, make("scale 100"))] if len(options) > 1 else []
    return found + ([("long rows", options[0], long, make("long rows"))] if long else [])


def planes(make: Callable[[str], Make], shape: tuple, *options: dict, states: tuple = OTHER_STATES) -> list[tuple]:
    return [(state, o, shape, make(state)) for o in options or ({},) for state in states]


def maps(make: Callable[[str], Make], shape: tuple, long: tuple) -> list[tuple]:
    found = planes(make, shape, states=("fresh", "near-equal"))
    return found + [("long rows", {}, long, make("long rows"))]


TABLE: dict[str, list[tuple]] = {
    "info_nce": contrastive(pairs, TEMPERATURE, (ROWS, WIDTH), (LONG, WIDTH)),
    "info_nce bank": contrastive(lambda s: with_negatives(s, own=False), TEMPERATURE, BANK),
    "info_nce own negatives": contrastive(lambda s: with_negatives(s, own=True), TEMPERATURE[:1], OWN),
    "info_nce frozen negatives": contrastive(lambda s: with_negatives(s, own=True), TEMPERATURE[:1], OWN),
    "clip_loss": contrastive(lambda s: pairs(s, unit=True), CLIP, (ROWS, WIDTH), (LONG, WIDTH)),
    "siglip_loss": contrastive(pairs, SIGLIP, (ROWS, WIDTH), (LONG, WIDTH)),
    "siglip_loss with groups": contrastive(captioned, UNIT_SIGLIP, (ROWS // 2, ROWS, WIDTH)),
    "clip_loss with groups": contrastive(captioned, CLIP, (ROWS // 2, ROWS, WIDTH)),
    "supcon_loss": contrastive(labelled, TEMPERATURE[:1], (ROWS, WIDTH)),
    "nt_xent_loss": contrastive(pairs, TEMPERATURE[:1], (ROWS // 2, WIDTH)),
    "pixel_loss": planes(images, PLANE, {"p": 1}, {"p": 2}, {"p": "charbonnier"}),
    "smoothness_loss": planes(plane, PLANE, {"p": 1}, {"p": 2}, {"p": "isotropic"}),
    "smoothness_loss with guide and weight": planes(lambda s: plane(s, guided=True), PLANE, {"p": 1}),
    "ssim_loss": planes(images, WINDOWED, {"padding": "valid"}),
    "ssim_loss of volumes": planes(images, (1, 1, 16, 48, 48), {"padding": "valid"}),
    "ms_ssim_loss": planes(images, LEVELS, {"level_weights": (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)}),
    "image_loss": planes(images, WINDOWED, {"pixel": (1, 0.8), "smoothness": (1, 0.1), "ssim": 0.2}),
    "feature_distance": planes(features, FEATURES, {}, {"criterion": "l2"}),
    "lpips_distance": planes(lambda s: features(s, 1), FEATURES),
    "dists_distance": planes(lambda s: features(s, 2), FEATURES),
    "style_distance": planes(features, FEATURES),
    "diversity_loss": planes(generated, ((8, 3, 32, 32), (64,)), states=("fresh", "near-equal")),
    "mode_seeking_loss": planes(modes, (8, 3, 64, 64), states=("fresh", "near-equal")),
    "normalized_diversity_loss": planes(noised, (8, 3, 64, 64), states=("fresh",)),
    "attention_consistency_loss": maps(lambda s: attention(s, "probs"), (2, 4, 64, 128), (1, 1, 64, LONG)),
    "attention_consistency_loss of logits": [
        (state, {"inputs": "logits"}, *rest)
        for state, _, *rest in maps(lambda s: attention(s, "logits"), (2, 4, 64, 128), (1, 1, 64, LONG))
    ],
    "attention_consistency_from_qk": maps(lambda s: attention(s, "qk"), (2, 4, 64, 128, 64), (1, 1, 64, LONG, 64)),
}


def states(losses: list[str] | None = None, small: bool = False) -> list[State]:
    """Every state of these losses, those that share options and shape beside one another. `small`: for tests."""
    cases = {case.name: case for case in CASES}
    return [
        State(cases[loss], name, options, shrunk(shape) if small else shape, make)
        for loss, rows in TABLE.items()
        for name, options, shape, make in rows
        if losses is None or loss in losses
    ]


def shrunk(shape: Any) -> Any:
    """Every number at most 16, but those of the images that five levels of MS-SSIM halve."""
    if isinstance(shape[0], tuple):
        return tuple(shrunk(s) for s in shape)
    return shape if shape == LEVELS else tuple(min(n, 16) for n in shape)
