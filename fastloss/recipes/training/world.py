"""The processes of a run, by torchrun or one alone: what one of them knows all get, what one of them decides all do.

Decisions and objects travel on the CPU (gloo), so that none of them waits for a device.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

# What a user's mistake raises: another rank gets it as the same kind.
_MISTAKES = {kind.__name__: kind for kind in (ValueError, TypeError, OSError, ImportError, FloatingPointError)}


@dataclass(frozen=True)
class World:
    """This process among those of its run; the default is a process alone, for which every method is trivial."""

    rank: int = 0
    size: int = 1
    group: Any = None  # of the losses and of DDP; None: no other rank
    control: Any = None  # a gloo group, for objects and decisions

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def join(device: str = "auto") -> World:
        """The ranks that torchrun has started, or this process alone where it has not or has started one. Of ranks but
        0 the log has errors only.

        Raises:
            ValueError: `device` names one of several GPUs, where each rank has its own.
        """
        size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
        if size == 1:
            return World()
        on_gpu = torch.cuda.is_available() and device != "cpu"
        if on_gpu:
            if device not in ("auto", "cuda"):
                wanted = "expected auto, cpu or cuda on several ranks, where each takes a GPU of its own"
                raise ValueError(f"device: {wanted}, got {device!r}")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        if rank > 0:
            logging.getLogger("fastloss").setLevel(logging.ERROR)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        return World(rank, size, dist.group.WORLD, dist.new_group(backend="gloo"))

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which alone writes, logs and shows progress."""
        return self.rank == 0

    def same(self, value: T) -> T:
        """The value of rank 0."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def every(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on each rank; where one of them fails, all raise its error. `work` must not communicate."""
        if self.size == 1:
            return work()
        done: Any = None
        fault: Exception | None = None
        try:
            done = work()
        except Exception as error:
            fault = error
        faults = self.every(None if fault is None else (_kind(fault), str(fault)))
        failed = [rank for rank, there in enumerate(faults) if there is not None]
        if not failed:
            return done
        kind, text = faults[failed[0]] or ("", "")
        if kind not in _MISTAKES:
            raise fault or RuntimeError(f"rank {failed[0]} of {self.size} failed: {text}")
        where = f" (on rank {failed[0]} of {self.size})" if 0 < failed[0] or 1 < len(failed) < self.size else ""
        raise of_all_ranks(_MISTAKES[kind](f"{text}{where}")) from fault

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, which alone does it; where it fails, all raise its error."""
        return self.same(self.together(lambda: work() if self.main else None))  # type: ignore[return-value]

    def own(self, rows: int) -> range:
        """Which of the rows of a global batch are this rank's: as many as others have, or one less."""
        return range(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def counts(self, rows: int) -> list[int]:
        """How many of the rows each rank has."""
        return [rows * (rank + 1) // self.size - rows * rank // self.size for rank in range(self.size)]


class StopVote:
    """Whether any rank wants to stop: asked by all ranks once a step, answered alike on all of them at the next one.

    The answer travels while the step runs, so that none waits for it. A process alone gets its answer at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __call__(self, asked: bool) -> bool:
        if self.world.size == 1:
            return asked
        answer = self.close()
        votes = torch.tensor([int(asked)])
        self._pending = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.world.control, async_op=True), votes
        return answer

    def close(self) -> bool:
        """The answer to what was asked last."""
        if self._pending is None:
            return False
        (work, votes), self._pending = self._pending, None
        work.wait()
        return bool(votes.item())


def across_ranks(module: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The module in DDP. Its forward gives the loss and whatever else; the same parameters get a gradient at each step,
    and buffers are the same on all ranks by themselves."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # the name since torch 2.14
    buffers: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(module, devices, process_group=world.group, static_graph=True, **buffers)


def _kind(error: Exception) -> str:
    return next((name for name, kind in _MISTAKES.items() if isinstance(error, kind)), type(error).__name__)


def of_all_ranks(error: T) -> T:
    """The error, marked as one that every rank raises, so that rank 0 alone need say it."""
    error.of_all_ranks = True  # type: ignore[attr-defined]
    return error


def is_said(error: BaseException) -> bool:
    """Whether this process is to say the error."""
    return not getattr(error, "of_all_ranks", False) or int(os.environ.get("RANK", "0")) == 0


def leave(error: BaseException | None = None) -> None:
    """End the communication. With an error of all ranks they wait for each other first, so that rank 0 has said it
    before torchrun, which ends all processes when one fails, sees any of them fail."""
    if not dist.is_available() or not dist.is_initialized():
        return
    if error is None or getattr(error, "of_all_ranks", False):
        dist.barrier()
    dist.destroy_process_group()
