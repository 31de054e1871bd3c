"""The losses of attention maps.

test_consistency.py  maps, logits, queries and keys
"""
