"""Losses of a batch whose rows lie on several ranks, on torch.distributed.

exchange.py     Exchange: how the ranks exchange their rows
ranks.py        the ranks of a group, the rows that each of them has, and what a loss exchanges with them
agreement.py    whether all ranks call alike, before anything large is sent
collectives.py  the exchange as ops: their autograd, and torch.compile's view of them
losses.py       the contrastive losses across ranks, behind their argument `group`

Families import this folder only where a group is given.
"""

from .exchange import Exchange

__all__ = ["Exchange"]
