"""Statistics over the columns of all ranks, each similarity made once: of gathered columns, or of pieces of them.

A rank has rows q [m, D]; of columns k [n, D], its own or another rank's, it makes a block of the logits
(:mod:`fastloss.contrastive.blocks`) and finds the statistics of its rows and those of its columns:

    rows      of the blocks of this rank, merged: of each own query over all keys
    columns   go to the rank that owns them, which merges one part from each rank: of each own key over all queries

They are merged in float64, of which there is one number a row. Rows that are compared with one another (NT-Xent,
SupCon) need half of the blocks, see :func:`pieces.shares`.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ..contrastive.blocks import Statistics, of_block, sides_of
from ..contrastive.ops.softmax_stats import Inputs, softmax_statistics
from .collectives import rows_to_owners
from .pieces import Groups, shares, statistics_of_pieces
from .ranks import Meeting

NO_GROUPS = Groups(None, None)


def statistics_of_gathered(x: Inputs, meeting: Meeting, name: str, groups: Groups = NO_GROUPS) -> list[Tensor]:
    """The statistics [S, m] of own queries over the keys [B, D] of all ranks, own ones first, and with `x.symmetric`
    [S, n] of own keys over all queries. `name`: what the keys are called among the sizes.

    With `groups`, of own queries and of all keys, the last statistic is the sum of a row's logits over its group.
    """
    half = x.self_similarity
    if not (half or x.symmetric):
        return list(softmax_statistics(x).unbind())
    how, around = Statistics(x.moments, x.hardness, groups.row_groups is not None), meeting.around(name)
    queries, keys = sides_of(x)
    queries, keys = queries._replace(groups=groups.row_groups), keys._replace(groups=groups.column_groups)
    x = x._replace(workspace_mib=x.workspace_mib / len(around))  # each block saves a part of it
    rows, columns = [], []
    for hop, block in enumerate(keys.split(around)):
        share = shares(hop, queries.rows, around, half, meeting.is_lower(hop))
        part = how.of_nothing(x.row_scale, block.rows)
        if share is not None:
            both = not half or hop > 0
            mine = queries.part(*share.rows), block.part(*share.columns)
            of_rows, of_columns = of_block(x, *mine, both, hop == 0, how)
            rows.append(how.placed(of_rows, share.rows, queries.rows))
            if of_columns is not None:
                part = how.placed(of_columns, share.columns, block.rows)
        columns.append(part)
    return _brought_home(x, reduce(how.union, [t.double() for t in rows]), torch.cat(columns, 1), meeting, name, how)


def statistics_in_pieces(
    x: Inputs, meeting: Meeting, name: str, wire: torch.dtype, groups: Groups = NO_GROUPS
) -> list[Tensor]:
    """The same of this rank's own keys, which travel in the dtype `wire`, as those of the other ranks do. SupCon's
    rows, which are compared with one another, have themselves in the sum over the group too."""
    own = {"scale": x.column_scale, "bias": x.bias, "ids": x.column_ids}
    all_ranks = meeting.gather({f"{name} {what}": t for what, t in own.items()})
    scale, bias, ids = (all_ranks.get(f"{name} {what}") for what in own)
    route, comparison = meeting.route(name, x.key, wire), meeting.comparison()
    x = x._replace(column_scale=scale, bias=bias, column_ids=ids)
    rows, parts = statistics_of_pieces(*x, *groups, *route, *comparison)
    how = Statistics(x.moments, x.hardness, groups.row_groups is not None)
    if x.symmetric or x.self_similarity:
        return _brought_home(x, rows.double(), parts, meeting, name, how)
    return [rows]


def _brought_home(x: Inputs, rows: Tensor, parts: Tensor, meeting: Meeting, name: str, how: Statistics) -> list[Tensor]:
    """`rows` [S, m] and what the ranks made of each other's keys, `parts` [S, B], those of this rank's keys merged."""
    made = parts.T.contiguous()
    for t in (x.query, x.key, x.row_scale, x.column_scale, x.bias):  # also on a rank without rows, or others would wait
        made = made if t is None else made + t[:0].sum(dtype=made.dtype)
    of_ranks = meeting.counts_of(name)
    sent = rows_to_owners(made, of_ranks[meeting.rank], of_ranks, meeting.ranks.name)
    from_ranks = [part.T.double() for part in sent.unbind()]
    sides = [reduce(how.union, [rows, *from_ranks])] if x.self_similarity else [rows, reduce(how.union, from_ranks)]
    return [side.to(parts.dtype) for side in sides]
