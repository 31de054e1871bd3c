"""The options of a call by parameter name, or by (function, parameter) where a name means two things.

An option that is in neither table and has a bool default is a flag; a test says which new option lacks a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from tests.fuzz.drawer import Drawer
from tests.fuzz.values import Made

Kind = Callable[[Drawer], Any]


def one_of(*choices: Any) -> Kind:
    return lambda d: d.pick(*choices)


def between(low: float, high: float, *known: float) -> Kind:
    return lambda d: d.number(low, high, *known)


def scalar(low: float, high: float, *known: float) -> Kind:
    return lambda d: d.scalar(low, high, *known)


def bias(d: Drawer) -> Any:
    columns = d.sizes["columns"]
    if d.sizes.get("per_sample") or d.chance(0.4):
        return d.scalar(-5, 5, 0)
    return d.tensor(columns)


def ids(count: str) -> Kind:
    def draw(d: Drawer) -> Any:
        length = d.sizes[count]
        return d.integers(d.pick(1, 2, 5, 100), length, low=0)

    return draw


def key_ids(d: Drawer) -> Any:
    return d.integers(d.pick(1, 2, 5, 100), d.pick(d.sizes["keys"], d.sizes["columns"]))


def targets(d: Drawer) -> Any:
    return d.integers(max(d.sizes["keys"], 1), d.sizes["rows"])


def sampling(d: Drawer) -> Any:
    options: dict[str, Any] = {}
    if d.chance(0.4):
        options["tau_plus"] = d.number(0, 0.5, 0, 0.1)
    if d.chance(0.5):
        options["hardness"] = d.number(0.01, 10, 0, 1, 1000, 100)
    if d.chance(0.4):
        options["margin"] = d.number(-1, 1, 0, 0.1)
    return Made("fastloss.NegativeSampling", options)


def row_weights(d: Drawer) -> Any:
    return d.row_weights(d.sizes["rows"])


def layer_weights(d: Drawer) -> Any:
    return d.sequence([d.number(-2, 3, 0, 1, spelled=False) for _ in range(d.sizes["layers"])])


def map_weights(d: Drawer) -> Any:
    return d.maps(d.sizes["shape"])


def guide(d: Drawer) -> Any:
    images, _, *sides = d.sizes["shape"]
    return d.tensor(images, d.pick(1, 3), *sides, grad=None)


def mask(d: Drawer) -> Any:
    return d.maps(d.sizes["shape"]) if d.chance(0.0) else _bool(d)


def _bool(d: Drawer) -> Any:
    from tests.fuzz.values import T

    shape = tuple(1 if d.chance(0.3) else n for n in d.sizes["shape"])
    if d.sizes.get("lists"):
        shape = (1,) * len(shape)
    return T(shape, "bool", d.pick(0.5, 0.9, 0.0), d.seed(), layout=d.layout())


def data_range(d: Drawer) -> Any:
    if d.chance(0.2):
        return d.sequence(
            [-1, 1] if d.chance(0.5) else [d.number(-3, 0, spelled=False), d.number(0.1, 4, spelled=False)]
        )
    return d.number(0.1, 255, 1, 2, 255)


def levels(d: Drawer) -> Any:
    return d.sequence([d.number(0, 1, 0, 1, spelled=False) for _ in range(d.pick(1, 2, 3, 5))])


def part(*distances: Any) -> Kind:
    return lambda d: (
        None if d.chance(0.15) else d.sequence([d.pick(*distances), d.number(0, 3, 0, 1, spelled=False)], numbers=False)
    )


def nested(function: str, *names: str) -> Kind:
    def draw(d: Drawer) -> Any:
        return {name: kind_of(function, name)(d) for name in names if d.chance(0.4)}

    return draw


def size(d: Drawer) -> Any:
    return d.sequence([d.size(1, 40), d.size(1, 40)])


def execution(d: Drawer) -> Any:
    options: dict[str, Any] = {}
    if d.chance(0.6):
        options["chunk"] = d.pick(1, 2, 3)
    if d.chance(0.3):
        options["checkpoint"] = True
    if d.chance(0.3):
        options["channels_last"] = True
    return Made("fastloss.Execution", options)


def normalisation(d: Drawer) -> Any:
    if d.chance(0.6):
        return d.pick(True, False)
    return d.sequence([d.sequence([0.5, 0.4, 0.3]), d.sequence([0.2, 0.3, 1.0])])


def input_range(d: Drawer) -> Any:
    return d.sequence([d.number(-2, 0, 0, -1, spelled=False), d.number(0.5, 255, 1, spelled=False)])


def names_and_weights(d: Drawer) -> Any:
    return {name: d.number(0, 3, 0, 1) for name in d.sizes["names"]}


CRITERIA = one_of("l1", "l2", "charbonnier", "smooth_l1")
OPTIONS: dict[Any, Kind] = {
    "reduction": one_of("mean", "sum", "none"),
    "temperature": scalar(0.02, 5, 0.1, 0.07, 1),
    "temp": scalar(0.02, 5, 0.1, 0.07, 1),
    "label_smoothing": between(0, 1, 0, 0.1, 1),
    "bias": bias,
    "query_ids": ids("rows"), "key_ids": key_ids, "ids": ids("rows"), "image_ids": ids("rows"),
    "text_ids": lambda d: ids("texts")(d), "image_groups": ids("rows"), "text_groups": lambda d: ids("texts")(d),
    "weights": row_weights,
    "in_batch": one_of(None, True, False),
    "workspace_mib": between(1e-3, 512, 1, 256),
    "targets": targets,
    "sampling": sampling,
    "logit_scale": scalar(0.1, 100, 1, 10, 100),
    "logit_bias": lambda d: None if d.chance(0.2) else d.scalar(-10, 10, 0, -10),
    "eps": between(1e-10, 1, 1e-6),
    "beta": between(1e-3, 10, 1), "delta": between(1e-3, 10, 1),
    "criterion": CRITERIA,
    "normalization": one_of("chw", "hw", "none"),
    "c1": between(1e-9, 1, 1e-6), "c2": between(1e-9, 1, 1e-6),
    "weight": map_weights, "guide": guide,
    "order": one_of(1, 2),
    "convention": one_of("fastloss", "basicsr", "kornia", "torchmetrics", "piq"),
    "window": lambda d: d.integer(1, 3, 5, 7, 11, 11, 13, 31),
    "sigma": between(0.1, 20, 1.5),
    "data_range": data_range,
    "padding": one_of("same", "valid"),
    "k1": between(1e-4, 1, 0.01), "k2": between(1e-4, 1, 0.03),
    "level_weights": levels,
    "ssim": lambda d: None if d.chance(0.3) else d.number(0, 2, 0, 1),
    "mask": mask,
    "metric": one_of("l1", "l2", "cosine"),
    "mode": one_of("nearest", "softmin", "mean"),
    "size": size,
    "execution": execution,
    "normalize": lambda d: d.pick(True, False),
    ("feature_distance", "weights"): layer_weights, ("style_distance", "weights"): layer_weights,
    ("tap", "weight"): between(-2, 3, 0, 1),
    ("pixel_loss", "p"): lambda d: d.pick("charbonnier", "huber") if d.chance(0.4) else d.number(1, 4, 1, 2, 3),
    ("smoothness_loss", "p"): one_of(1, 2, "isotropic", "norm"),
    ("ssim_loss", "padding"): one_of("same", "valid", "reflect"),
    ("ssim_loss", "reduction"): one_of("none", "mean", "sum", "map"),
    "odd_sides": one_of("zeros", "repeat", "drop"),
    ("image_loss", "pixel"): part(1, 2, 1.5, "charbonnier", "huber"),
    ("image_loss", "smoothness"): part(1, 2, "isotropic", "norm"),
    ("image_loss", "pixel_options"): nested("pixel_loss", "weight", "eps", "delta"),
    ("image_loss", "smoothness_options"): nested("smoothness_loss", "order", "guide", "weight"),
    ("image_loss", "ssim_options"): nested(
        "ssim_loss", "window", "sigma", "data_range", "padding", "k1", "k2", "weight"),
    ("diversity_loss", "margin"): between(0.01, 5, 1),
    ("diversity_loss", "temperature"): between(1e-4, 10, 0.01),
    ("diversity_loss", "bank_scale"): between(-2, 2, 1),
    ("diversity_loss", "bank_shift"): between(-1, 1, 0),
    ("diversity_loss", "workspace_mib"): lambda d: d.integer(1, 2, 256),
    ("mode_seeking_loss", "form"): one_of("msgan", "dsgan"),
    ("mode_seeking_loss", "margin"): between(0.01, 5, 1),
    ("normalized_diversity_loss", "alpha"): between(0.01, 2, 0.8),
    ("normalized_diversity_loss", "metric"): one_of("l2", "l1"),
    ("attention_consistency_loss", "metric"): one_of("js", "kl", "sym_kl", "mse", "l1", "cosine"),
    ("attention_consistency_loss", "inputs"): one_of("probs", "logits", "scores"),
    ("attention_consistency_loss", "temperature"): between(0.1, 10, 1, 2),
    ("attention_consistency_loss", "stop_gradient"): one_of(None, "a", "b"),
    ("attention_consistency_loss", "layer_weights"): lambda d: d.sequence(
        [d.number(0, 3, 0, 1, spelled=False) for _ in range(d.sizes["layers"])]),
    ("attention_consistency_from_qk", "metric"): one_of("kl", "sym_kl", "js"),
    ("attention_consistency_from_qk", "scale"): lambda d: None if d.chance(0.2) else d.number(-2, 4, 0, 1),
    ("attention_consistency_from_qk", "temperature"): between(0.1, 10, 1),
    ("attention_consistency_from_qk", "stop_gradient"): one_of(None, "a", "b"),
    ("loss_and_grads", "loss_fn"): lambda d: d.sizes["loss_fn"],
    ("PerceptualLoss", "criterion"): one_of("l1", "l2", "charbonnier", "smooth_l1", "lpips", "dists", "style"),
    ("PerceptualLoss", "layer_weights"): lambda d: d.sequence([d.number(0, 2, 1, spelled=False) for _ in range(3)]),
    ("PerceptualLoss", "backbone_weights"): lambda d: d.sequence([d.number(0, 2, 1, spelled=False)]),
    ("PerceptualLoss", "normalize"): normalisation,
    ("PerceptualLoss", "input_range"): input_range,
    ("CompositeLoss", "weights"): names_and_weights,
    ("CompositeLoss", "weighting"): one_of("fixed", "uncertainty", "dwa", "relobralo", "vqgan"),
    ("CompositeLoss", "temperature"): between(0.1, 10, 2), ("CompositeLoss", "period"): lambda d: d.integer(1, 2, 3),
    ("CompositeLoss", "alpha"): between(0, 1, 0.95), ("CompositeLoss", "beta"): between(0, 1, 0.99),
    ("CompositeLoss", "tau"): between(0.1, 10, 1), ("CompositeLoss", "seed"): lambda d: d.integer(0, 1, 7),
    ("CompositeLoss", "log_variance"): between(-2, 2, 0),
    ("CompositeLoss", "reference"): lambda d: d.pick(*d.sizes["names"]),
    ("CompositeLoss", "max_ratio"): between(0.1, 1e4, 1e4),
}  # fmt: skip


# Options that came after seeds had been written down: they are drawn last, by numbers of their own (draw.draw_later),
# so that a seed keeps its call.
LATER = (
    "negatives_mask", "positives", "criterion_options", "cu_seqlens_q", "cu_seqlens_k", "excluded_pairs",
    "negative_pairs", "keys", "key_labels",
)  # fmt: skip


def kind_of(function: str, parameter: str, default: Any = inspect.Parameter.empty) -> Kind:
    """How an option is drawn."""
    found = OPTIONS.get((function, parameter)) or OPTIONS.get(parameter)
    if found is None and isinstance(default, bool):
        return one_of(True, False)
    if found is None:
        raise KeyError(f"{function}: the option {parameter!r} needs a row in OPTIONS of tests/fuzz/options.py")
    return found
