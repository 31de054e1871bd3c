"""Several losses as one.

composite.py  the weighted sum of named losses
rules.py      the rules of the weights: fixed, uncertainty, dwa, relobralo, vqgan
"""

from .composite import CompositeLoss

__all__ = [
    "CompositeLoss",
]
