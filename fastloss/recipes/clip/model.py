"""Two encoders with embeddings of one width, and what the loss learns beside them: a scale, and SigLIP's bias.

logits_ij = e^log_scale <f(image_i), g(text_j)> (+ bias)         f, g: (B, E), of length 1
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.tokenizer import WordTokenizer
from ..imagen.model import TextEncoder
from .config import Config

FIRST_SCALE = {"clip": 1 / 0.07, "siglip": 10.0}  # Radford et al., 2021; Zhai et al., 2023
FIRST_BIAS = -10.0  # Zhai et al., 2023
TRANSFORMER_BLOCKS, HEADS = 4, 4
CONV_LEAST, CONV_SIDE = 16, 4  # channels of the first layer at least; side of the last ones' maps at most


class Tokens(NamedTuple):
    """Captions for the text encoder."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) bool, True at real tokens


class TwoEncoders(nn.Module):
    """Encoders of images and of texts, and the scale and bias of their similarities."""

    def __init__(self, config: Config, tokenizer: WordTokenizer) -> None:
        super().__init__()
        of_images, of_texts = config.encoders()
        self.tokenizer, self.max_log_scale = tokenizer, math.log(config.max_scale)
        self.image = _mlp(config) if of_images == "mlp" else _conv(config)
        self.text: nn.Module = (
            WordsEncoder(tokenizer, config.dim) if of_texts == "words" else TransformerEncoder(tokenizer, config.dim)
        )
        self.log_scale = nn.Parameter(torch.tensor(min(math.log(FIRST_SCALE[config.loss]), self.max_log_scale)))
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS)) if config.loss == "siglip" else None

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, C, S, S) in [0, 1] to (B, E) of length 1."""
        return F.normalize(self.image(images).float(), dim=1)

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        return F.normalize(self.text(tokens.ids, tokens.mask).float(), dim=1)

    def tokens(self, captions: list[str]) -> Tokens:
        """On the device of the model."""
        ids, mask = self.tokenizer.encode(captions)
        return Tokens(ids.to(self.log_scale.device), mask.to(self.log_scale.device))

    def scale(self) -> Tensor:
        return self.log_scale.exp()

    @torch.no_grad()
    def bound_scale(self) -> None:
        """To be called after each step: without a bound the scale of a model that knows its data grows for ever."""
        self.log_scale.clamp_(max=self.max_log_scale)


class WordsEncoder(nn.Module):
    """The sum of the words' vectors, each weighted by its place, through two layers. Fast, and enough for names."""

    def __init__(self, tokenizer: WordTokenizer, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(tokenizer.vocab_size, dim, padding_idx=0)
        self.places = nn.Parameter(1 + 0.02 * torch.randn(tokenizer.max_length, dim))
        self.layers = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.layers((self.words(ids) * self.places * mask[..., None]).sum(1))


class TransformerEncoder(nn.Module):
    """The text encoder of the text-to-image system, without dropout."""

    def __init__(self, tokenizer: WordTokenizer, dim: int) -> None:
        super().__init__()
        self.encoder = TextEncoder(tokenizer, dim, dim, TRANSFORMER_BLOCKS, HEADS, dropout=0.0)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder((ids, mask)).emb


def _mlp(config: Config) -> nn.Module:
    """Two hidden layers on the pixels: on small images few large products, which a CPU does fast."""
    pixels, width = config.image_channels() * config.size**2, config.width
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, width),
        nn.GELU(),
        nn.LayerNorm(width),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, config.dim),
    )


def _conv(config: Config) -> nn.Module:
    """Convolutions of stride 2 to maps of CONV_SIDE or less; the last ones have `width` channels, each before them half
    of the next, a mean over the map at the end."""
    halvings = max(1, math.ceil(math.log2(config.size / CONV_SIDE)))
    widths = [max(CONV_LEAST, config.width >> (halvings - 1 - i)) // 8 * 8 for i in range(halvings)]
    layers: list[nn.Module] = []
    for before, width in zip([config.image_channels(), *widths[:-1]], widths, strict=True):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.GELU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], config.dim))
