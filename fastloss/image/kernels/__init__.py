"""Triton kernels of the losses of images.

pixel.py                 differences of two images, streamed in the order of memory
smoothness.py            differences of neighbours: launchers and kernels
smoothness_arguments.py  what these are given
smoothness_terms.py      their terms, for any walk over an image
ssim.py                  SSIM: launchers and kernels
ssim_lanes.py            the lanes of a sweep: columns of a plane, how they are read and written
ssim_sweep.py            what all sweeps with windows share
image_loss.py            several losses in one launch, without SSIM; all launchers of image_loss
image_loss_ssim.py       several losses in SSIM's sweeps
"""
