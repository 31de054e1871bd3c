"""fastloss: fused losses for contrastive and generative training in PyTorch."""

from ._version import __version__
from .losses.contrastive import (
    ClipLoss,
    ContrastiveLoss,
    InfoNCELoss,
    LossAndGrads,
    clip_loss,
    info_nce,
    loss_and_grads,
)
from .losses.contrastive_batch import NTXentLoss, SigLipLoss, SupConLoss, nt_xent_loss, siglip_loss, supcon_loss
from .losses.contrastive_reference import ContrastiveOutput, NegativeSampling
from .losses.pixel import PixelLoss, pixel_loss

__all__ = [
    "ClipLoss",
    "ContrastiveLoss",
    "ContrastiveOutput",
    "InfoNCELoss",
    "LossAndGrads",
    "NTXentLoss",
    "NegativeSampling",
    "PixelLoss",
    "SigLipLoss",
    "SupConLoss",
    "__version__",
    "clip_loss",
    "info_nce",
    "loss_and_grads",
    "nt_xent_loss",
    "pixel_loss",
    "siglip_loss",
    "supcon_loss",
]
