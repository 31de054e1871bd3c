"""Triton kernels of attention maps.

divergence.py      the divergences and their slopes, element by element
attention_maps.py  of lists of maps: one launch forward and one backward for layers of one shape
"""
