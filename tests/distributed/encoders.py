"""Encoders and inputs of the tests of cached_step, for one process and for ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloss import clip_loss, info_nce

CHUNK = 6


class Encoder(nn.Module):
    """Rows, and with `scale` a dict of them and a logit_scale of one element, as open_clip's models return."""

    def __init__(self, width: int, *, dropout: float = 0.0, norm: bool = False, scale: bool = False) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.first, self.last = nn.Linear(width, 16), nn.Linear(16, 8)
        self.norm = nn.BatchNorm1d(16, momentum=None) if norm else nn.Identity()
        self.dropout = dropout
        self.log_scale = nn.Parameter(torch.tensor([1.2])) if scale else None

    def forward(self, x: Tensor) -> Any:
        y = self.last(F.dropout(self.norm(self.first(x)).relu(), self.dropout, self.training))
        return y if self.log_scale is None else {"emb": y, "logit_scale": self.log_scale.exp()}


def data_of_ranks() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(20, 12, generator=g), torch.randn(20, 10, generator=g)


def loss_of(a: Any, b: Tensor) -> Tensor:
    if isinstance(a, dict):
        return clip_loss(a["emb"], b, logit_scale=a["logit_scale"], normalize=True)
    return info_nce(a, b, temperature=0.3)


def with_graphs(encoders: tuple, inputs: tuple, loss_fn: Any = loss_of, chunk: int = CHUNK) -> Tensor:
    """What cached_step is to equal."""
    outputs = []
    for encoder, x in zip(encoders, inputs, strict=True):
        pieces = [encoder(piece) for piece in x.split(chunk)]
        if isinstance(pieces[0], dict):
            rows = torch.cat([p["emb"] for p in pieces])
            outputs.append({"emb": rows, "logit_scale": pieces[-1]["logit_scale"]})
        else:
            outputs.append(torch.cat(pieces))
    loss = loss_fn(*outputs)
    loss.backward()
    return loss.detach()
