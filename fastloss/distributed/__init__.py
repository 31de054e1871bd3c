"""Large batches: losses of a batch whose rows lie on several ranks, on torch.distributed, and gradient caching.

exchange.py     Exchange: how the ranks exchange their rows
ranks.py        the ranks of a group, the rows that each of them has, and what a loss exchanges with them
agreement.py    whether all ranks call alike, before anything large is sent
collectives.py  the exchange as ops: their autograd, and torch.compile's view of them
walks.py        how embeddings come to a rank piece by piece, and their gradients go back: chunks, and a ring
pieces.py       statistics over the columns of all ranks that come in pieces, as an op; siglip_pieces.py: SigLIP's loss
gathered.py     the same statistics of gathered columns or of pieces, brought home to the ranks whose rows they are of
cached_step.py  a step whose gradients are those of a batch too large for one graph
pieces_of_ranks.py   what the ranks of such a step agree on
memory_bank.py  embeddings of earlier batches as further negatives, the same on all ranks
sharded_bank.py  distances from a bank whose rows lie on several ranks
losses.py       the contrastive losses across ranks, behind their argument `group`; clip_groups.py: CLIP with groups

Families import its losses only where a group is given.
"""

from .cached_step import cached_step
from .exchange import Exchange
from .memory_bank import MemoryBank

__all__ = ["Exchange", "MemoryBank", "cached_step"]
