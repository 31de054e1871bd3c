"""Triton kernels of attention maps.

divergence.py              the divergences and their slopes, element by element
maps_tile.py               a tile of given maps
attention_maps.py          of lists of maps: one launch forward and one backward for layers of one shape
attention_qk.py            launchers of attention consistency from queries and keys, and its forward
attention_qk_gradients.py  its backward
attention_qk_tile.py       a tile of both maps: logits, what is left out, divergences, gradients
attention_qk_configs.py    the sizes of tiles, a line per kind of GPU
"""
