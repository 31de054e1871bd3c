"""The losses of images; `_kernels` where a file is about the kernels alone.

test_pixel.py       the pixel loss's kernels
test_smoothness.py  smoothness, and test_smoothness_kernels.py
test_ssim.py        SSIM at one scale and several, and test_ssim_kernels.py
test_ssim_range.py  images far from 0, negative images
test_image_loss.py  several losses at once, and test_image_loss_kernels.py
"""
