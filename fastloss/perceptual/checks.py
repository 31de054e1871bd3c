"""Checks that the losses over lists of deep features share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.checks import (
    check_numbers,
    check_same_device,
    check_same_length,
    check_same_shape,
    check_sequence,
    check_tensor,
    is_sequence,
)

Targets = list[list[Tensor]]  # for each backbone the list of its features


def check_weights(features: Sequence[Tensor], weights: Sequence[float]) -> list[float]:
    checked = check_numbers("weights", weights, of="numbers, one a layer")
    check_same_length("features", features, "weights", checked)
    return checked


def check_layers(features: Any, targets: Any, ndim: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of as many tensors, layer by layer of one shape, all on one device."""
    features = check_sequence("features", features, "tensors, one a layer")
    targets = check_sequence("targets", targets, "tensors, one a layer")
    check_same_length("features", features, "targets", targets)
    if len(features) == 0:
        raise ValueError("features: expected at least one layer, got an empty list")
    for i, (feature, target) in enumerate(zip(features, targets, strict=True)):
        check_tensor(f"features[{i}]", feature, ndim)
        check_tensor(f"targets[{i}]", target, ndim)
        check_same_device("features[0]", features[0], f"features[{i}]", feature)
        check_same_shape(f"features[{i}]", feature, f"targets[{i}]", target)
    return features, targets


def check_samples(features: Sequence[Tensor]) -> None:
    """Every layer has the samples in its first dimension."""
    for i, feature in enumerate(features):
        if feature.ndim == 0:
            raise ValueError(f"features[{i}]: expected samples in the first dimension, got a 0-D tensor")
        if feature.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"features[{i}]: expected as many samples as features[0], {features[0].shape[0]}, "
                f"got {feature.shape[0]} (shape {tuple(feature.shape)})"
            )


def check_encoded(targets: Any, backbones: int) -> Targets:
    """What PerceptualLoss.encode() gives, in the place of an image."""
    if not is_sequence(targets) or not all(is_sequence(t) for t in targets):
        raise TypeError(f"image: expected a tensor or what encode() returned, got {type(targets).__name__}")
    if len(targets) != backbones:
        raise ValueError(f"image: expected the features of {backbones} backbones, as encode() does, got {len(targets)}")
    return [list(features) for features in targets]
