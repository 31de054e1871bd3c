"""The losses of attention maps.

test_consistency.py     maps, logits, queries and keys
test_attention_maps.py  the kernels of maps
"""
