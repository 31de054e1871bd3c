"""How the ranks of a group exchange the rows of a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..core.checks import check_choice, check_integer, check_number, check_sequence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = ProcessGroup | DeviceMesh | None

STRATEGIES = ("auto", "gather", "chunked", "ring")
ROWS = ("equal", "uneven")
GRADIENTS = ("mean", "sum")
NEGATIVES = ("sharded", "replicated")


@dataclass(frozen=True)
class Exchange:
    """How the losses exchange rows where they are given a `group`; the defaults are right for DDP and FSDP.

    Args:
        strategy: how the columns come to a rank, which computes its own rows against them.
            ``"gather"``: all at once; they stay for the backward, after which the sum of their gradients goes to their
            ranks at once too. ``"chunked"``: so many rows of every rank at a time, the next ones on their way while
            these are computed, once more in the backward; without double backward. ``"ring"``: a rank's columns at a
            time, handed on around the ranks, in the backward with their gradient; without double backward. ``"auto"``:
            a gather while it keeps within `mib`, else a ring where all ranks are of one machine (by torchrun's
            variables), have 4,096 rows or more and two blocks keep within `mib`, else chunks.
        mib: bound in MiB, > 0, of what ``"chunked"`` holds of other ranks' columns and their gradients, and what
            ``"auto"`` goes by. One row of each rank is the least.
        rows: how many rows each rank has. ``"equal"``: all as many, else a ValueError. ``"uneven"``: the ranks tell
            each other; not under ``torch.compile(fullgraph=True)``. A list of whole numbers, one per rank: known
            beforehand (of NT-Xent samples, of the others rows); shared negatives are then as many on all ranks. A
            mapping of such lists, where there are different numbers of images and texts, or of negatives:
            ``{"image": [2, 3], "text": [4, 6]}``, by the names of the loss's arguments.
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
    rows: str | Sequence[int] | Mapping[str, Sequence[int]] = "equal"
    wire: torch.dtype | None = None
    gradients: str = "mean"
    negatives: str = "sharded"
    mib: float = 1024

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("gradients", self.gradients, GRADIENTS)
        check_choice("negatives", self.negatives, NEGATIVES)
        object.__setattr__(self, "mib", check_number("mib", self.mib, 0, open_low=True))  # of a frozen dataclass
        if self.wire not in (None, torch.bfloat16):
            raise ValueError(f"wire: expected None or torch.bfloat16, got {self.wire!r}")
        if isinstance(self.rows, str):
            check_choice("rows", self.rows, ROWS)
            return
        wanted = "whole numbers, a mapping of such lists, or 'equal' or 'uneven'"
        if isinstance(self.rows, Mapping):
            rows: Any = {name: _counts(f"rows[{name!r}]", of_one, wanted) for name, of_one in self.rows.items()}
        else:
            rows = _counts("rows", self.rows, wanted)
        object.__setattr__(self, "rows", rows)  # of a frozen dataclass


def _counts(name: str, given: Any, wanted: str) -> tuple[int, ...]:
    return tuple([check_integer(f"{name}[{i}]", n, 0) for i, n in enumerate(check_sequence(name, given, wanted))])
