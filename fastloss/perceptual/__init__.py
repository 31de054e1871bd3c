"""Perceptual losses: distances of the deep features of two images.

feature_distance.py  the distance of two lists of features, with its two ops
tap.py               the same inside a network, which lets a feature through
lpips.py             LPIPS: distances of unit features, weighted by channel
dists.py             DISTS: similarity of texture and structure
style.py             Gram matrices and their distance
perceptual_loss.py   PerceptualLoss: networks and a criterion in one module
criteria.py          what PerceptualLoss compares features with
backbones.py         torchvision's networks, cut at the last tap
vision_features.py   timm's and transformers' vision models, by block
normalisation.py     the range, mean and standard deviation that networks want of images
frozen.py            networks that no model counts among its own
execution.py         how the networks run: dtype, compilation, pieces of the batch
scale.py             the scale of gradients inside networks in float16
layer_layout.py      how a list of layers lies in memory, in plain numbers
checks.py            checks of lists of features
kernels/             the Triton kernels
"""

from .dists import DISTSDistance, dists_distance
from .execution import Execution
from .feature_distance import FeatureDistance, feature_distance
from .lpips import LPIPSDistance, lpips_distance
from .perceptual_loss import PerceptualLoss
from .style import StyleDistance, gram_matrix, style_distance
from .tap import tap
from .vision_features import VisionFeatures

__all__ = [
    "DISTSDistance",
    "Execution",
    "FeatureDistance",
    "LPIPSDistance",
    "PerceptualLoss",
    "StyleDistance",
    "VisionFeatures",
    "dists_distance",
    "feature_distance",
    "gram_matrix",
    "lpips_distance",
    "style_distance",
    "tap",
]
