"""Losses against images that repeat the training set or one another.

diversity.py       distance from a bank of training images
nearest.py         the op that finds the nearest of them
bank_distance.py   the op of the distance from all of them, as a soft-min or a mean
distances.py       the distances in PyTorch operators
mode_seeking.py    distance of two images of one caption, as far as their noise is
normalized.py      distances within a batch, as shares of a sample's distances, like those of the noises
pair_distances.py  the op of the distances within a batch
"""

from .diversity import DiversityLoss, diversity_loss
from .mode_seeking import ModeSeekingLoss, mode_seeking_loss
from .normalized import NormalizedDiversityLoss, normalized_diversity_loss

__all__ = [
    "DiversityLoss",
    "ModeSeekingLoss",
    "NormalizedDiversityLoss",
    "diversity_loss",
    "mode_seeking_loss",
    "normalized_diversity_loss",
]
