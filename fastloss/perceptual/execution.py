"""How `PerceptualLoss` runs its networks: dtype, memory format, compilation, pieces of the batch, recomputation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:  # torch.compiler.disable, but torch._dynamo is imported at the first call only: it takes seconds
    from torch._compile import _disable_dynamo as uncompiled
except ImportError:
    uncompiled = torch.compiler.disable

from ..core import check_not_empty, result_dtype
from ..core.checks import as_plain, check_flag, check_integer


@dataclass(frozen=True)
class Execution:
    """How :class:`PerceptualLoss` runs its networks. The defaults run them as they are, on the whole batch.

    Args:
        dtype: dtype of the networks' weights and activations, e.g. ``torch.bfloat16``; None leaves them as they are.
            The distance is computed in float32 all the same. In float16 the gradient goes through the networks
            multiplied by a power of two that brings it to the middle of float16's range, whatever arrives from above,
            and is divided by it again in float32: a loss scaler outside neither adds to it nor is needed for it.
        channels_last: weights and activations in ``torch.channels_last``, which tensor cores want.
        compile: True, or the name of a backend: each network goes through ``torch.compile``.
        chunk: images that go through the networks at a time, None: all. The gradient of each piece is made in the
            forward, right after its loss, so that no more than one piece's activations are ever alive, and kept in
            float32; the backward multiplies it by what comes from above. Not differentiable twice.
        checkpoint: between forward and backward keep the activations at the taps alone, and run the networks again
            from tap to tap in the backward.
    """

    dtype: torch.dtype | None = None
    channels_last: bool = False
    compile: bool | str = False
    chunk: int | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"execution: expected a floating-point dtype or None, got dtype={self.dtype!r}")
        plain: dict[str, Any] = {"compile": as_plain(self.compile)}
        if not isinstance(plain["compile"], (bool, str)):
            raise TypeError(f"execution: expected compile to be True, False or a backend's name, got {self.compile!r}")
        for name in ("channels_last", "checkpoint"):
            plain[name] = check_flag(f"execution: {name}", getattr(self, name))
        if self.chunk is not None:
            wanted = "chunk to be a number of images or None"
            plain["chunk"] = check_integer("execution", self.chunk, -(2**31), wanted=wanted)
            if plain["chunk"] < 1:
                raise ValueError(f"execution: expected chunk >= 1, got {self.chunk}")
        for name, value in plain.items():  # of a frozen dataclass
            object.__setattr__(self, name, value)

    def prepare(self, networks: torch.nn.ModuleList) -> None:
        """Casts and lays out the weights; `compiled` follows, and again after unpickling."""
        if self.dtype is not None:
            networks.to(self.dtype)
        if self.channels_last:
            networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.compiled(networks)

    def compiled(self, networks: torch.nn.ModuleList) -> None:
        if self.compile:
            for network in networks:
                network.compile(**({"backend": self.compile} if isinstance(self.compile, str) else {}))


class _Pieces(torch.autograd.Function):
    """Loss and gradient of one piece of the batch after the other."""

    @staticmethod
    def forward(
        ctx: Any, image_pred: Tensor, loss: Callable[[slice, Tensor], Tensor], chunk: int, reduction: str
    ) -> Tensor:
        count, needs = image_pred.shape[0], ctx.needs_input_grad[0] and not torch.is_inference_mode_enabled()
        wide = result_dtype(image_pred)  # what comes from above, a loss scale, arrives in the backward only
        gradient = torch.empty_like(image_pred, dtype=wide) if needs else None
        values = []
        for low in range(0, count, chunk):
            part = slice(low, min(low + chunk, count))
            piece = image_pred[part].detach().to(wide)
            with torch.set_grad_enabled(needs):
                value = loss(part, piece.requires_grad_(needs))
                if reduction == "mean":
                    value = value * ((part.stop - low) / count)
                if gradient is not None:
                    gradient[part] = torch.autograd.grad(value.sum(), piece)[0]
            values.append(value.detach())
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.dtype = image_pred.dtype
        return torch.cat(values) if reduction == "none" else torch.stack(values).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (gradient,) = ctx.saved_tensors
        each = grad.reshape(-1, *[1] * (gradient.ndim - 1)) if grad.ndim else grad
        return (gradient * each).to(ctx.dtype), None, None, None


@uncompiled
def in_pieces(image_pred: Tensor, loss: Callable[[slice, Tensor], Tensor], chunk: int, reduction: str) -> Tensor:
    """`loss(part, image_pred[part])` of every piece of the batch, put together as `reduction` says. The pieces are
    float32 at least."""
    if reduction == "mean":
        check_not_empty(math.prod(image_pred.shape))
    if image_pred.shape[0] <= chunk:
        return loss(slice(0, image_pred.shape[0]), image_pred)
    return _Pieces.apply(image_pred, loss, chunk, reduction)
