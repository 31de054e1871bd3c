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
    clip_loss,
    info_nce,
)
from .losses.contrastive_batch import NTXentLoss, SupConLoss, nt_xent_loss, supcon_loss
from .losses.contrastive_cached import LossAndGrads, loss_and_grads
from .losses.contrastive_reference import ContrastiveOutput, NegativeSampling
from .losses.contrastive_siglip import SigLipLoss, siglip_loss
from .losses.dists import DISTSDistance, dists_distance
from .losses.diversity import DiversityLoss, ModeSeekingLoss, diversity_loss, mode_seeking_loss
from .losses.image import ImageLoss, ImageLosses, image_loss
from .losses.lpips import LPIPSDistance, lpips_distance
from .losses.perceptual_execution import Execution
from .losses.perceptual_network import PerceptualLoss
from .losses.perceptual_tap import tap
from .losses.pixel import PixelLoss, pixel_loss
from .losses.smoothness import SmoothnessLoss, smoothness_loss
from .losses.ssim import MSSSIMLoss, SSIMLoss, ms_ssim_loss, ssim_loss
from .losses.style import StyleDistance, gram_matrix, style_distance
from .perceptual.feature_distance import FeatureDistance, feature_distance

__all__ = [
    "AttentionConsistencyFromQK",
    "AttentionConsistencyLoss",
    "ClipLoss",
    "CompositeLoss",
    "ContrastiveLoss",
    "ContrastiveOutput",
    "DISTSDistance",
    "DiversityLoss",
    "Execution",
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
    "StyleDistance",
    "SupConLoss",
    "__version__",
    "attention_consistency_from_qk",
    "attention_consistency_loss",
    "clip_loss",
    "dists_distance",
    "diversity_loss",
    "feature_distance",
    "gram_matrix",
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
    "style_distance",
    "supcon_loss",
    "tap",
]
