"""How the ranks of a group exchange the rows of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from ..core.checks import check_choice, check_integer, check_sequence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = ProcessGroup | DeviceMesh | None

STRATEGIES = ("auto", "gather")
ROWS = ("equal", "uneven")
GRADIENTS = ("mean", "sum")
NEGATIVES = ("sharded", "replicated")


@dataclass(frozen=True)
class Exchange:
    """How the losses exchange rows where they are given a `group`; the defaults are right for DDP and FSDP.

    Args:
        strategy: ``"gather"``: each rank gathers all columns once and computes its own rows against them; in the
            backward the gradients of the columns are summed and each rank gets its own. ``"auto"``: the best there is,
            today ``"gather"``.
        rows: how many rows each rank has. ``"equal"``: all as many, else a ValueError. ``"uneven"``: the ranks tell
            each other; not under ``torch.compile(fullgraph=True)``. A list of whole numbers, one per rank: known
            beforehand (of NT-Xent samples, of the others rows); shared negatives are then as many on all ranks.
        wire: dtype in which embeddings travel, None for their own or ``torch.bfloat16``, half of float32's bytes: a
            rank's own rows stay as they are, those of the others arrive rounded. Gradients travel in float32 (float64).
        gradients: what will be done with the gradients of the parameters. ``"mean"``: averaged over the ranks, as DDP
            and FSDP do. ``"sum"``: summed; all gradients of the loss are then 1 / (number of ranks) of the former.
        negatives: of [K, D] negatives of :func:`fastloss.info_nce`, ``"sharded"``: each rank has others, which are
            gathered; ``"replicated"``: all ranks have the same (a memory bank), nothing of them travels.

    Raises:
        TypeError, ValueError: an option of another type or value.

    Example:
        >>> Exchange(rows="uneven").strategy
        'auto'
    """

    strategy: str = "auto"
    rows: str | Sequence[int] = "equal"
    wire: torch.dtype | None = None
    gradients: str = "mean"
    negatives: str = "sharded"

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("gradients", self.gradients, GRADIENTS)
        check_choice("negatives", self.negatives, NEGATIVES)
        if self.wire not in (None, torch.bfloat16):
            raise ValueError(f"wire: expected None or torch.bfloat16, got {self.wire!r}")
        if isinstance(self.rows, str):
            check_choice("rows", self.rows, ROWS)
            return
        given = check_sequence("rows", self.rows, "whole numbers, or 'equal' or 'uneven'")
        rows = tuple(check_integer(f"rows[{i}]", count, 0) for i, count in enumerate(given))
        object.__setattr__(self, "rows", rows)  # of a frozen dataclass
