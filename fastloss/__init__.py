"""fastloss: fused losses for contrastive and generative training in PyTorch."""

from ._version import __version__
from .losses.attention import (
    AttentionConsistencyFromQK,
    AttentionConsistencyLoss,
    attention_consistency_from_qk,
    attention_consistency_loss,
)
from .losses.composite import CompositeLoss
from .losses.contrastive import (
    ClipLoss,
    ContrastiveLoss,
    InfoNCELoss,
    LossAndGrads,
    clip_loss,
    info_nce,
    loss_and_grads,
)
from .losses.contrastive_batch import NTXentLoss, SupConLoss, nt_xent_loss, supcon_loss
from .losses.contrastive_reference import ContrastiveOutput, NegativeSampling
from .losses.contrastive_siglip import SigLipLoss, siglip_loss
from .losses.diversity import DiversityLoss, ModeSeekingLoss, diversity_loss, mode_seeking_loss
from .losses.image import ImageLoss, ImageLosses, image_loss
from .losses.perceptual import FeatureDistance, LPIPSDistance, feature_distance, lpips_distance
from .losses.perceptual_network import PerceptualLoss
from .losses.pixel import PixelLoss, pixel_loss
from .losses.smoothness import SmoothnessLoss, smoothness_loss
from .losses.ssim import MSSSIMLoss, SSIMLoss, ms_ssim_loss, ssim_loss

__all__ = [
    "AttentionConsistencyFromQK",
    "AttentionConsistencyLoss",
    "ClipLoss",
    "CompositeLoss",
    "ContrastiveLoss",
    "ContrastiveOutput",
    "DiversityLoss",
    "FeatureDistance",
    "ImageLoss",
    "ImageLosses",
    "InfoNCELoss",
    "LPIPSDistance",
    "LossAndGrads",
    "MSSSIMLoss",
    "ModeSeekingLoss",
    "NTXentLoss",
    "NegativeSampling",
    "PerceptualLoss",
    "PixelLoss",
    "SSIMLoss",
    "SigLipLoss",
    "SmoothnessLoss",
    "SupConLoss",
    "__version__",
    "attention_consistency_from_qk",
    "attention_consistency_loss",
    "clip_loss",
    "diversity_loss",
    "feature_distance",
    "image_loss",
    "info_nce",
    "loss_and_grads",
    "lpips_distance",
    "mode_seeking_loss",
    "ms_ssim_loss",
    "nt_xent_loss",
    "pixel_loss",
    "siglip_loss",
    "smoothness_loss",
    "ssim_loss",
    "supcon_loss",
]
