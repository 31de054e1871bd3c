"""What the kernel files share: sizes and options of launches, and the cases the compile checks run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

# 2048 elements on 128 threads: two (16 bit) or four (32 bit) 128-bit loads per tensor in flight in every thread.
STREAM_BLOCK = 2048
STREAM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # the default of enable_fp_fusion changes in triton 3.10
# Programs of a reduction: eight per multiprocessor of a 132-SM device. Fixed, so that a sum has the same order on all.
REDUCE_PROGRAMS = 1056


ODD = 2**62 + 3  # added to twice an address that goes to a kernel as a number


@dataclass
class AotCase:
    """One launcher call that the ahead-of-time check makes, with tensors on the meta device.

    `vector` and `matrix` name the kernels that must have 128-bit global accesses, or matrix instructions; `spills` are
    bytes of stack that a device was measured to be faster with.
    """

    label: str
    launch: Callable[..., Any]
    args: tuple
    vector: tuple[str, ...] = ()
    matrix: tuple[str, ...] = ()
    spills: int = 0


def stream_grid(count: int, reduce: bool) -> tuple[int]:
    """Programs for `count` elements: one per block, or a bounded number that strides over the blocks."""
    blocks = triton.cdiv(count, STREAM_BLOCK)
    return (min(blocks, REDUCE_PROGRAMS) if reduce else blocks,)


def total(partials: Tensor) -> Tensor:
    """The second stage of a sum: fixed order, hence deterministic."""
    return partials.sum() if partials.numel() > 1 else partials.reshape(())


def odd_address(address: int) -> int:
    """An address among the numbers of a launch: odd and 64 bits wide, as for both Triton compiles kernels apart."""
    return ODD + 2 * address


def address_in(number: int) -> int | None:
    """The address that :func:`odd_address` made a number of; None: it made none."""
    return (number - ODD) >> 1 if number >= ODD and number % 2 else None


def odd_number(number: int) -> int:
    """A size among the numbers of a named tuple: not 1 and no multiple of 16, for which Triton compiles kernels apart
    (of arguments by themselves it can be told not to). In the kernel: device_math.number_in. Of 0 it is 1."""
    return 2 * number + 1


def registers(most: int) -> dict[str, int]:
    """The option that lets ptxas use this many: by itself it may spill a little at round numbers of its own choice."""
    if triton.knobs.runtime.interpret or driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": most}


def warp_size() -> int:
    """Lanes of a warp of the current device; of the interpreter as many as NVIDIA's."""
    return 32 if triton.knobs.runtime.interpret else driver.active.get_current_target().warp_size


def vector_block(element_size: int) -> int:
    """Elements that give each lane of a program with STREAM_OPTIONS 16 bytes."""
    return 16 // element_size * STREAM_OPTIONS["num_warps"] * warp_size()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make that the tensor's, where it is another."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
