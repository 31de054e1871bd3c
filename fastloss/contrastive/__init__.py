"""Contrastive losses of embeddings: each query is to pick its own key out of many.

info_nce.py          InfoNCE, all options, and the ContrastiveLoss of text-to-image training
clip.py              CLIP's symmetric softmax loss
siglip.py            SigLIP's sigmoid loss, with its op
supcon.py            SupCon: the positives are the rows of the same label
nt_xent.py           NT-Xent: two views of each sample
loss_and_grads.py    a loss and its gradients without the caller's graph, for gradient caching
options.py           NegativeSampling, ContrastiveOutput, and the options of the softmax losses
checks.py            checks of arguments, and the last step of every loss here
embeddings.py        embeddings as the losses take them: dtype, norms, scales
pairs.py             lists of pairs that are no negatives, or the only ones; similar_pairs makes one from a guide
several_positives.py  InfoNCE with several positives a query: the loss of one, corrected for the others
query_key_losses.py  the softmax losses of queries against keys (CLIP, InfoNCE): which op, and the loss from its results
groups.py            groups of images and texts, which are positives; clip_groups.py: CLIP's loss of them
blocks.py            statistics of both directions of any block of logits, each similarity made once
row_losses.py        the definition: losses of rows from the statistics of their negatives, e.g. log-sum-exps
save_plan.py         what a forward saves for its backward, decided from what needs a gradient and the sizes
ops/                 the ops of the softmax losses
kernels/             their Triton kernels; the C++ ones: csrc/contrastive, an op's file has the op's name
"""

from .clip import ClipLoss, clip_loss
from .info_nce import ContrastiveLoss, InfoNCELoss, info_nce
from .loss_and_grads import LossAndGrads, loss_and_grads
from .nt_xent import NTXentLoss, nt_xent_loss
from .options import ContrastiveOutput, NegativeSampling
from .pairs import similar_pairs
from .siglip import SigLipLoss, siglip_loss
from .supcon import SupConLoss, supcon_loss

__all__ = [
    "ClipLoss",
    "ContrastiveLoss",
    "ContrastiveOutput",
    "InfoNCELoss",
    "LossAndGrads",
    "NTXentLoss",
    "NegativeSampling",
    "SigLipLoss",
    "SupConLoss",
    "clip_loss",
    "info_nce",
    "loss_and_grads",
    "nt_xent_loss",
    "siglip_loss",
    "similar_pairs",
    "supcon_loss",
]
