"""fastloss: fused losses for contrastive and generative training in PyTorch."""

from ._version import __version__
from .losses.pixel import PixelLoss, pixel_loss

__all__ = [
    "PixelLoss",
    "__version__",
    "pixel_loss",
]
