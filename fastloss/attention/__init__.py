"""Losses of attention maps.

divergence.py      the divergences of two distributions, row by row, and the reduction over rows
attention_maps.py  their op for maps, of which kernels/ has the Triton side
heads.py           means over heads
consistency.py     of attention maps given as probabilities, as logits or as raw scores
from_qk.py         of attention given as queries and keys
attention_qk.py    the op of that
collect_qk.py      queries and keys of the attentions in a model, gathered while it runs
attention_calls.py how a model calls attention
"""

from .collect_qk import collect_qk
from .consistency import AttentionConsistencyLoss, attention_consistency_loss
from .from_qk import AttentionConsistencyFromQK, attention_consistency_from_qk

__all__ = [
    "AttentionConsistencyFromQK",
    "AttentionConsistencyLoss",
    "attention_consistency_from_qk",
    "attention_consistency_loss",
    "collect_qk",
]
