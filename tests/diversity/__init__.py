"""The losses against repetition.

test_diversity.py  banks, metrics, mode seeking
"""
