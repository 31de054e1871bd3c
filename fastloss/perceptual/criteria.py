"""What `PerceptualLoss` compares features with: by name, with the layers' weights and the LPIPS weights' files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import reduce
from ..core.checks import as_plain, check_no_graph, check_same_length, is_sequence
from ..core.entry import unknown_option
from ..core.traced import filled
from .backbones import read_weights
from .dists import dists_distance
from .feature_distance import CRITERIA as ELEMENTWISE
from .feature_distance import feature_distance
from .lpips import lpips_distance
from .style import style_distance

CRITERIA = (*ELEMENTWISE, "lpips", "dists", "style")
OPTIONS = {
    "lpips": ("eps", "inside_root"),
    "dists": ("c1", "c2"),
    "style": ("criterion", "normalization", "eps", "beta"),
}
LPIPS_FILES = {"alexnet": "alex", "squeezenet1_1": "squeeze", "vgg16": "vgg"}


class Criterion(NamedTuple):
    name: str
    options: Mapping[str, Any]  # of its function


def checked_options(criterion: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a criterion's function, whose values it looks at itself."""
    known = OPTIONS.get(criterion, ("eps", "beta"))
    if not isinstance(options, (Mapping, type(None))):
        raise TypeError(f"criterion_options: expected a dict, got {type(options).__name__}")
    for name in options or {}:
        if name not in known:
            raise unknown_option("criterion_options", name, known, of=f" of {criterion!r}")
    return dict(options or {})


class LpipsWeights(nn.Module):
    """The LPIPS weights of one network, one vector a layer: buffers, so that they move and save with the networks."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.count = len(weights)
        for i, weight in enumerate(weights):
            self.register_buffer(f"lin{i}", weight.detach().flatten().clone())

    def forward(self) -> list[Tensor]:
        return [getattr(self, f"lin{i}") for i in range(self.count)]


def gradient_counts(criterion: Criterion, features: Sequence[Tensor], reduction: str) -> list[int]:
    """Of each layer what the criterion divides the gradient of a feature by, about."""
    counts, (name, options) = [], criterion
    for f in features:
        samples, each = (int(n) for n in (f.shape[0], f.numel() // max(f.shape[0], 1)))
        if name in ("lpips", "dists", "style"):
            channels = int(f.shape[1]) if f.ndim > 1 else 1
            each //= max(channels, 1)  # a mean over the pixels, also for a sum over the samples
            if name == "style" and reduction != "sum":  # the mean over the Gram matrix
                divisor = {"chw": each * channels, "hw": each, "none": 1}
                each = divisor[options.get("normalization", "chw")] * channels
            if name == "dists":
                each *= 2 * sum(int(other.shape[1]) for other in features)
        elif reduction == "sum":
            each = 1
        counts.append(each * (samples if reduction == "mean" else 1))
    return counts


def load_lins(given: Any, name: str | None) -> list[Tensor] | None:
    """The weights for a network: of a file (None: that of the installed lpips package), as given, or None for ones."""
    if as_plain(given) is False:
        return None
    if given is None:
        given = _package_file(name)
    if isinstance(given, (str, os.PathLike)):
        state = read_weights(os.fspath(given), "lin_weights")
        found: dict[int, Tensor] = {}
        for key, value in state.items():  # lpips' own names: lin0.model.1.weight
            index = key.split(".")[0].removeprefix("lin")
            if key.startswith("lin") and index.isdigit() and key.endswith("weight"):
                found[int(index)] = value
        if sorted(found) != list(range(len(found))) or not found:
            there = ", ".join(state)
            raise ValueError(f"lin_weights: {os.fspath(given)!r} has no lin0.model.1.weight and so on, but {there}")
        return [found[i] for i in range(len(found))]
    if not is_sequence(given) or not all(isinstance(w, Tensor) for w in given):
        raise TypeError(
            "lin_weights: expected None (the lpips package's file), False (ones), a path or a list of tensors, "
            f"got {type(given).__name__}"
        )
    return list(given)


def _package_file(name: str | None) -> str:
    if name not in LPIPS_FILES:
        raise ValueError(
            f"lin_weights: lpips has weights for {', '.join(LPIPS_FILES)}, not for {name or 'a callable'}; "
            "pass a path, a list of tensors (one a layer), or False for ones"
        )
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "lin_weights: the weights are files of the lpips package, which is not installed: `pip install lpips`, "
            "or pass the path of such a file, a list of tensors, or False for ones"
        )
    return os.path.join(spec.submodule_search_locations[0], "weights", "v0.1", f"{LPIPS_FILES[name]}.pth")


def make_lins(criterion: str, given: Any, backbones: list, several: bool) -> list[nn.Module]:
    """One module of LPIPS weights for each network, an empty one where there are none."""
    if criterion != "lpips":
        if given is not None:
            raise ValueError(f"lin_weights: only criterion='lpips' has them, got them with {criterion!r}")
        return [nn.Identity() for _ in backbones]
    check_no_graph("PerceptualLoss", "lin_weights", given)
    spread = list(given) if several and is_sequence(given) else [given] * len(backbones)
    check_same_length("backbones", backbones, "lin_weights", spread)
    found = [load_lins(one, getattr(backbone, "name", None)) for one, backbone in zip(spread, backbones, strict=True)]
    return [nn.Identity() if one is None else LpipsWeights(one) for one in found]


def criterion_distance(
    criterion: Criterion,
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[float] | None,
    lins: list[Tensor] | None,
    reduction: str,
) -> Tensor:
    """The distance of two lists of features; `weights` one number a layer."""
    name, options = criterion
    if weights is not None:
        check_same_length("features", features, "weights", weights)
    if name == "lpips":
        factor = 1.0
        if weights is not None:
            factor = 2.0**64 if max(abs(w) for w in weights) > 2.0**64 else 1.0  # times a lin, 3e38 would be infinite
            ones = lins or [f.new_ones(f.shape[1], dtype=torch.float32) for f in features]
            lins = [w / factor * lin for w, lin in zip(weights, ones, strict=True)]
        distance = reduce(lpips_distance(features, targets, lins, **options), reduction)
        return distance if factor == 1 else factor * distance
    if name == "dists":
        each = None
        if weights is not None:
            each = [filled((f.shape[1],), w, torch.float32, f.device) for f, w in zip(features, weights, strict=True)]
        return reduce(dists_distance(features, targets, each, each, **options), reduction)
    if name == "style":
        return style_distance(features, targets, weights=weights, reduction=reduction, **options)
    return feature_distance(features, targets, weights=weights, criterion=name, reduction=reduction, **options)
