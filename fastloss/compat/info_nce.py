"""info_nce's InfoNCE and info_nce (info-nce-pytorch 0.1), by :func:`fastloss.info_nce`.

Where info-nce-pytorch is installed InfoNCE is a subclass of its class; else it stands alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import contrastive
from ._common import NotServed, as_theirs, check_plain, hands_on, library

_theirs = library("info_nce")
_NEGATIVE_RANKS = {"unpaired": 2, "paired": 3}


@hands_on("info_nce.info_nce", None if _theirs is None else _theirs.info_nce)
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: Any = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """info_nce's function: cosine similarities over `temperature`, cross entropy of the positive's.

    `negative_keys` [K, D] (``"unpaired"``) or [M, K, D] (``"paired"``) are the only negatives; without them the other
    rows of `positive_key` are. Its result has the dtype of the embeddings.
    """
    embeddings = [t for t in (query, positive_key, negative_keys) if t is not None]
    check_plain(*embeddings)
    if query.shape[:1] != positive_key.shape[:1]:
        raise NotServed(f"queries {tuple(query.shape)}, positive keys {tuple(positive_key.shape)}")
    if negative_keys is not None and negative_keys.ndim != _NEGATIVE_RANKS.get(negative_mode):
        raise NotServed(f"negative_mode {negative_mode!r} with negative keys of {negative_keys.ndim} dimensions")
    loss = contrastive.info_nce(query, positive_key, negative_keys, temperature=temperature, reduction=reduction)
    return as_theirs(loss, *embeddings)


class _InfoNCEAlone(nn.Module):
    def __init__(self, temperature: Any = 0.1, reduction: str = "mean", negative_mode: str = "unpaired") -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode


_Base: Any = _InfoNCEAlone if _theirs is None else _theirs.InfoNCE


class InfoNCE(_Base):
    """info_nce's module, see :func:`info_nce`."""

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        return info_nce(query, positive_key, negative_keys, self.temperature, self.reduction, self.negative_mode)


SWAPS = {"info_nce.InfoNCE": InfoNCE, "info_nce.info_nce": info_nce}
LEFT: dict[str, str] = {}
