"""Large batches: losses of a batch whose rows lie on several ranks, on torch.distributed, and gradient caching.

exchange.py     Exchange: how the ranks exchange their rows
ranks.py        the ranks of a group, the rows that each of them has, and what a loss exchanges with them
agreement.py    whether all ranks call alike, before anything large is sent
collectives.py  the exchange as ops: their autograd, and torch.compile's view of them
cached_step.py  a step whose gradients are those of a batch too large for one graph
memory_bank.py  embeddings of earlier batches as further negatives, the same on all ranks
losses.py       the contrastive losses across ranks, behind their argument `group`

Families import its losses only where a group is given.
"""

from .cached_step import cached_step
from .exchange import Exchange
from .memory_bank import MemoryBank

__all__ = ["Exchange", "MemoryBank", "cached_step"]
