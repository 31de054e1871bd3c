"""The scale of gradients inside networks that run in float16, where those of a mean would underflow.

    image, token = ScaleBack.apply(image)           before the networks
    loss = ScaleUp.apply(distance, token, base)     after them

Upwards the gradient g of the loss becomes g s, with s the power of two that brings the largest |g| to [base, 2 base);
downwards the image's gradient is divided by s again, in float32 and exactly. So what flows through the networks does
not depend on the scale of the gradient that arrives: a loss scaler's 2^16 takes no room from float16, and nothing
underflows without one. s never leaves the device: it goes from one to the other as the gradient of `token`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = 2.0**120  # of s, so that s, 1 / s and what they multiply stay normal float32 numbers


class ScaleBack(torch.autograd.Function):
    """The image, and a token whose gradient is 1 / s."""

    @staticmethod
    def forward(image: Tensor) -> tuple[Tensor, Tensor]:
        return image.view_as(image), image.new_empty((), dtype=torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, inverse: Tensor | None) -> Tensor | None:
        return grad if grad is None or inverse is None else grad * inverse


class ScaleUp(torch.autograd.Function):
    """The loss, whose gradient is multiplied by s."""

    @staticmethod
    def forward(loss: Tensor, token: Tensor, base: float) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.base = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = (ctx.base / power_below(grad.detach())).clamp(1 / LARGEST, LARGEST)
        return grad * scale, 1 / scale, None


def power_below(values: Tensor) -> Tensor:
    """The power of two not above the largest magnitude; 1 where that is 0 or not finite. float32, on the device."""
    if values.numel() == 0:
        return values.new_ones((), dtype=torch.float32)
    largest = values.abs().amax().float()
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)  # without the mantissa
    return torch.where((power > 0) & largest.isfinite(), power, 1.0)


def base_of(counts: Sequence[float], weights: Sequence[float]) -> float:
    """What a gradient of 1 is scaled to so that the largest of the layers' gradients, weight over count each, is about
    1, in the middle of what float16 holds (2^-24 to 2^16)."""
    largest = max((abs(w) / c for c, w in zip(counts, weights, strict=True) if w != 0 and c > 0), default=0.0)
    exponent = -math.frexp(largest)[1] if largest else 0
    return 2.0 ** min(max(exponent, -120), 120)
