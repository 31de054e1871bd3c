"""Whether all ranks call a loss alike: compared in one small collective before anything large is sent.

Ranks that disagree about a shape or an option would wait for one another until the timeout, or compute nonsense. Each
sends a few numbers: a hash of what must be the same, one of the options that are floats, its numbers of rows. As all
ranks see all of these, all raise the same error.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

MOST_SIZES = 3  # queries, keys, negatives
REFUSED = "error="


@contextlib.contextmanager
def named(operation: str, group: Any) -> Iterator[None]:
    """Errors of the communication with the rank and the operation, which its library leaves out."""
    try:
        yield
    except RuntimeError as error:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        raise RuntimeError(f"fastloss: {operation} failed on rank {rank} of {size}: {error}") from error


class Call(NamedTuple):
    """What the ranks compare."""

    fields: str  # "name=value" with "; " between them, which must be the same on all ranks
    numbers: str  # the same of the options that are floats; empty in a compiled graph, where they may be tensors
    size_names: str  # what each size counts, with "," between them
    sizes: list[int]  # this rank's numbers of rows
    rows: str  # "equal", "uneven", or the lists that were given: "," between ranks, ";" between sizes, "" without one


NO_CALL = Call("", "", "", [], "")  # nothing to compare


class _Comparisons(threading.local):
    count = 0  # of this thread


_comparisons = _Comparisons()


def comparisons() -> int:
    """How often this thread has compared calls: one that raises at its arguments has not come to it."""
    return _comparisons.count


def refuse(error: Exception, group: Any) -> None:
    """Take part in the comparison with an error in the place of a call: the other ranks raise it as a ValueError."""
    text = f"{type(error).__name__}: {error}".replace("; ", ", ").replace("|", "/")
    with contextlib.suppress(ValueError, RuntimeError):  # what is raised here is the error itself
        agree(Call(f"{REFUSED}{text}", "", "", [], "uneven"), group)


def agree(call: Call, group: Any) -> list[list[int]]:
    """The sizes of each rank, once it is certain that all ranks call alike.

    Raises:
        ValueError: on all ranks, naming two that differ.
    """
    _comparisons.count += 1
    same = call.fields + "|" + call.size_names + "|" + call.rows
    mine = [_hash(same), _hash(call.numbers), *call.sizes, *[0] * (MOST_SIZES - len(call.sizes))]
    with named("the comparison of the ranks' arguments", group):
        everyone = _gathered(mine, group)
    texts = {text for text, *_ in everyone}
    numbers = {number for _, number, *_ in everyone if number}
    if len(texts) > 1 or len(numbers) > 1:
        raise ValueError(_difference(same + "; " + call.numbers, group))
    sizes = [numbers[2 : 2 + len(call.sizes)] for numbers in everyone]
    _check_rows(call, sizes)
    return sizes


def _hash(text: str) -> int:
    """63 bits that do not depend on the process; 0 for nothing."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1 if text else 0


def _gathered(numbers: list[int], group: Any) -> list[list[int]]:
    """The numbers of each rank, on the CPU where the group can: a device would have to be waited for."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_cpu else torch.device(torch.accelerator.current_accelerator() or "cpu")
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    everyone = mine.new_empty(dist.get_world_size(group) * len(numbers))
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name since torch 2.14
    all_gather(everyone, mine, group=group)
    return everyone.view(-1, len(numbers)).tolist()


def _difference(text: str, group: Any) -> str:
    """What the first rank and the first that differs from it have, in words."""
    texts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    first = texts[0]
    other = next((rank for rank, theirs in enumerate(texts) if theirs != first), 0)
    one, two = ([part for part in t.replace("|", "; ").split("; ") if part] for t in (first, texts[other]))
    one, two = [part for part in one if part not in two], [part for part in two if part not in one]
    if one and one[0].startswith(("loss=", REFUSED)):  # all else differs too
        one, two = one[:1], two[:1]
    said = [", ".join(parts) or "nothing of that kind" for parts in (one, two)]
    return f"group: expected the same call on all ranks, got {said[0]} on rank 0 and {said[1]} on rank {other}"


def _check_rows(call: Call, sizes: list[list[int]]) -> None:
    names = call.size_names.split(",")
    if call.rows == "uneven":
        return
    if call.rows == "equal":
        for rank, theirs in enumerate(sizes):
            for name, ours, other in zip(names, sizes[0], theirs, strict=True):
                if ours != other:
                    raise ValueError(
                        f"{name}: expected as many rows on all ranks, got {ours} on rank 0 and {other} on rank {rank}; "
                        f"where they differ, pass exchange=Exchange(rows='uneven')"
                    )
        return
    for kind, (name, of_ranks) in enumerate(zip(names, call.rows.split(";"), strict=True)):
        first = sizes[0][kind]
        given = [int(count) for count in of_ranks.split(",")] if of_ranks else [first] * len(sizes)
        for rank, theirs in enumerate(sizes):
            if theirs[kind] != given[rank]:
                by = f" by Exchange(rows={given})" if of_ranks else ""
                also = f" and {first} on rank 0" if rank else ""
                raise ValueError(f"{name}: expected {given[rank]} rows on rank {rank}{by}, got {theirs[kind]}{also}")
