"""Losses of images, pixel by pixel or window by window.

pixel.py           L1, L2, Lp, Charbonnier, Huber
smoothness.py      differences of neighbouring pixels: total variation and its kin
ssim.py            structural similarity
ssim_volume.py     the op of its volumes, of windows of a side for each axis, and of maps
ms_ssim.py         the same at several scales
image_loss.py      several of these at once, in one pass
ssim_checks.py     the options of the two SSIM losses
ssim_reference.py  structural similarity in plain torch
map_weights.py     weights over the pixels
kernels/           the Triton kernels
"""

from .image_loss import ImageLoss, ImageLosses, image_loss
from .ms_ssim import MSSSIMLoss, ms_ssim_loss
from .pixel import PixelLoss, pixel_loss
from .smoothness import SmoothnessLoss, smoothness_loss
from .ssim import SSIMLoss, ssim_loss

__all__ = [
    "ImageLoss",
    "ImageLosses",
    "MSSSIMLoss",
    "PixelLoss",
    "SSIMLoss",
    "SmoothnessLoss",
    "image_loss",
    "ms_ssim_loss",
    "pixel_loss",
    "smoothness_loss",
    "ssim_loss",
]
