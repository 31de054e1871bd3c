"""Losses of attention maps.

consistency.py  divergence of two attention maps: given as maps, as logits, or as queries and keys
"""

from .consistency import (
    AttentionConsistencyFromQK,
    AttentionConsistencyLoss,
    attention_consistency_from_qk,
    attention_consistency_loss,
)

__all__ = [
    "AttentionConsistencyFromQK",
    "AttentionConsistencyLoss",
    "attention_consistency_from_qk",
    "attention_consistency_loss",
]
