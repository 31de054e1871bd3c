"""Triton kernels over lists of layers of features.

feature_distance.py  elementwise distances, L1 with two bits kept for each element
lpips.py             LPIPS: launchers and kernels
lpips_tile.py        a tile of LPIPS: all channels of some pixels
dists.py             DISTS: moments of channels, and their gradients
"""
