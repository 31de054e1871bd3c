"""A training step's forward and backward: the whole batch in one graph, or in pieces with the same gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import Exchange, cached_step, clip_loss, siglip_loss
from ..training.noise import RowNoise
from ..training.world import World, across_ranks
from .config import Config
from .model import Tokens, TwoEncoders


class Step(nn.Module):
    """The loss of a batch, and it beside what it learned in one tensor that stays on the device."""

    def __init__(self, model: TwoEncoders, config: Config, world: World) -> None:
        super().__init__()
        self.model, self.group = model, world.group
        self.exchange = Exchange(rows=world.counts(config.batch_size)) if world.size > 1 else None

    def forward(self, images: Tensor, tokens: Tokens, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(self.model.embed_images(images), self.model.embed_tokens(tokens), ids)

    def loss(self, image: Tensor, text: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of this rank's rows; with several ranks that of the whole batch, on each of them."""
        scale, bias = self.model.scale(), self.model.bias
        shared = {"image_ids": ids, "text_ids": ids, "group": self.group, "exchange": self.exchange}
        if bias is None:
            loss, learned = clip_loss(image, text, logit_scale=scale, **shared), [scale]
        else:
            loss, learned = siglip_loss(image, text, logit_scale=scale, logit_bias=bias, **shared), [scale, bias]
        return loss, torch.stack([loss.detach(), *(number.detach() for number in learned)]).float()


class Backward:
    """Adds the gradients of a batch to those of the parameters, averaged over the ranks, and returns the numbers of
    :meth:`Step.loss`. With `chunk` rows at a time the gradients are the same within rounding."""

    def __init__(self, step: Step, config: Config, world: World, device: torch.device) -> None:
        self.step, self.chunk, self.amp, self.device = step, config.chunk, config.amp, device
        self.compute: nn.Module = step if world.size == 1 else across_ranks(step, world, device)

    def __call__(self, images: Tensor, tokens: Tokens, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            if self.chunk:
                return self._in_pieces(images, tokens, ids)
            loss, values = self.compute(images, tokens, ids)
        loss.backward()
        return values

    def _in_pieces(self, images: Tensor, tokens: Tokens, ids: Tensor) -> Tensor:
        found: list[Tensor] = []

        def loss_fn(image: Tensor, text: Tensor) -> Tensor:
            loss, values = self.step.loss(image, text, ids)
            found.append(values)
            return loss

        cached_step(
            (self.compute, self.compute),
            (images, tuple(tokens)),
            loss_fn,
            chunk=self.chunk,
            embed=(lambda step, x: step.model.embed_images(x), lambda step, x: step.model.embed_tokens(Tokens(*x))),
        )
        return found[0]


def learned_numbers(config: Config) -> list[str]:
    """Names of the numbers of :meth:`Step.loss` after the loss."""
    return ["scale", "bias"] if config.loss == "siglip" else ["scale"]


def shifted(images: Tensor, most: int, noise: RowNoise) -> Tensor:
    """Each image (C, S, S) moved by -`most` to `most` pixels both ways; the border repeats."""
    if most == 0:
        return images
    size = images.shape[-1]
    moves = (noise.uniform(0, 2) * (2 * most + 1)).long() - most  # (B, 2), equally likely
    places = torch.arange(size, device=images.device)
    down, right = ((places + moves[:, i, None]).clamp(0, size - 1) for i in (0, 1))  # (B, S)
    rows = images.gather(2, down[:, None, :, None].expand_as(images))
    return rows.gather(3, right[:, None, None, :].expand_as(images))
