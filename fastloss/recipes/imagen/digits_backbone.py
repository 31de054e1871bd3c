"""The digits' perceptual backbone: a small frozen classifier whose feature maps the feature losses compare.

Its weights lie beside this file; `python -m fastloss.recipes.imagen.train_digits_backbone` makes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.checks import check_tensor
from ...perceptual.backbones import read_weights

WEIGHTS = Path(__file__).with_name("digits_backbone.safetensors")
SIZE = 32
CHANNELS = (16, 32, 64)


class DigitsClassifier(nn.Module):
    """Three stages of convolution and ReLU, at 32, 16 and 8 pixels, and a linear head over ten digits."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (1, *CHANNELS[:-1])
        self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(inputs, CHANNELS, strict=True))
        self.last = nn.Conv2d(CHANNELS[-1], CHANNELS[-1], 3, padding=1)
        self.head = nn.Linear(CHANNELS[-1] * 4, 10)

    def features(self, images: Tensor) -> list[Tensor]:
        """[N,16,32,32], [N,32,16,16], [N,64,8,8] and [N,64,4,4], each after its ReLU."""
        maps: list[Tensor] = []
        x = images - 0.3  # about the mean ink
        for stage in self.stages:
            x = F.relu(stage(F.max_pool2d(x, 2) if maps else x))
            maps.append(x)
        maps.append(F.relu(self.last(F.max_pool2d(x, 2))))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [N, 10] of images [N, 1, 32, 32]."""
        return self.head(F.avg_pool2d(self.features(images)[-1], 2).flatten(1))


class DigitsBackbone(nn.Module):
    """Images [N, 1, S, S] in [0, 1] to four feature maps; images of another size are first brought to 32 x 32."""

    def __init__(self, classifier: DigitsClassifier):
        super().__init__()
        self.classifier = classifier
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> DigitsBackbone:
        """Stays in eval mode: it is frozen, whatever module holds it."""
        return super().train(False)

    def resize(self, images: Tensor) -> Tensor:
        check_tensor("images", images, ndim=4)
        if images.shape[1] != 1:
            raise ValueError(f"images: the digits' backbone takes [N, 1, S, S], got shape {tuple(images.shape)}")
        images = images.to(self.classifier.head.weight.dtype)
        height, width = images.shape[-2:]
        if (height, width) == (SIZE, SIZE):
            return images
        if height == width and height % SIZE == 0:  # its backward is deterministic on a GPU, unlike interpolation's
            return F.avg_pool2d(images, height // SIZE)
        return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.classifier.features(self.resize(images))

    def classify(self, images: Tensor) -> Tensor:
        """Class scores [N, 10]."""
        return self.classifier(self.resize(images))


def digits_backbone(weights: str | Path = WEIGHTS) -> DigitsBackbone:
    """The frozen backbone, with gradients to the images and none to itself.

    Raises:
        ValueError: the weights file is missing, unreadable or of another network. ImportError: no safetensors.

    Example:
        >>> import torch
        >>> [tuple(f.shape[1:]) for f in digits_backbone()(torch.zeros(1, 1, 64, 64))]
        [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 4, 4)]
    """
    classifier = DigitsClassifier()
    try:
        state = read_weights(os.fspath(weights), "weights")
        classifier.load_state_dict({name: value.float() for name, value in state.items()})
    except (ValueError, OSError, RuntimeError) as error:
        make = "`python -m fastloss.recipes.imagen.train_digits_backbone` makes the file"
        raise ValueError(f"digits_backbone: cannot load {weights} ({error}); {make}") from error
    return DigitsBackbone(classifier)
