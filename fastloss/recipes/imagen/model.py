"""The text-to-image model: a text encoder makes f(t) of a caption, an image decoder makes images of f(t) and noise z.

A regression from caption to image would blur all images of a caption into their mean and learn to ignore z. So the
image encoder, besides g(x) for the contrastive branch, gives z a meaning in training: q(z | x) = N(mu(x), sigma(x)),
the style of a real image. The decoder rebuilds x from its caption and a z drawn from q, and a KL term keeps q near the
N(0, I) that generation draws from; what the caption already says costs nothing there, so z learns only what is left.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.noise import RowDropout, RowNoise
from .config import SIZES

Z_A, Z_B, DROPOUT = 0, 1, 2  # streams of a step's noise; the dropouts of the text encoder take those from DROPOUT on

Text = Any  # captions (a sequence of str), or their token ids (B, L) and mask (B, L)


class TextFeatures(NamedTuple):
    """What the text encoder makes of B captions of at most L tokens."""

    emb: Tensor  # (B, E): the semantic vector f(t)
    tokens: Tensor  # (B, L, D): the states that the decoder attends to
    mask: Tensor  # (B, L) bool, True at real tokens


class ImageFeatures(NamedTuple):
    """What the image encoder makes of B images."""

    emb: Tensor  # (B, E): g(x)
    mu: Tensor  # (B, Z): mean of q(z | x)
    log_var: Tensor  # (B, Z): log variance of q(z | x)


class QueryKey(NamedTuple):
    """Queries and keys of one attention, for the attention consistency loss."""

    q: Tensor  # (B, heads, Lq, d)
    k: Tensor  # (B, heads, Lk, d)


class Attention(nn.Module):
    """Multi-head attention; `context` None attends to `x` itself. Returns its queries and keys beside the result."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, QueryKey]:
        q = self._split(self.to_q(x))
        k, v = (self._split(t) for t in self.to_kv(x if context is None else context).chunk(2, dim=-1))
        attend = None if mask is None else mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2)), QueryKey(q, k)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention where there is a context, feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float, cross: bool, stream: int = 0) -> None:
        super().__init__()
        self.norm_self, self.self_attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_cross = nn.LayerNorm(dim) if cross else None
        self.cross_attention = Attention(dim, heads) if cross else None
        self.norm_ff = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.dropout, self.dropout_ff = RowDropout(dropout, stream), RowDropout(dropout, stream + 1)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        noise: RowNoise | None = None,
    ) -> tuple[Tensor, QueryKey]:
        """`mask` belongs to the context, or to `x` where there is none; `noise` is the dropout's."""
        mixed, attention = self.self_attention(self.norm_self(x), None, None if self.cross_attention else mask)
        x = x + self.dropout(mixed, noise)
        if self.cross_attention is not None and self.norm_cross is not None:
            mixed, attention = self.cross_attention(self.norm_cross(x), context, mask)
            x = x + mixed
        return x + self.dropout_ff(self.ff(self.norm_ff(x)), noise), attention


class TextEncoder(nn.Module):
    """A small transformer over tokens; f(t) is the mean of the final states."""

    def __init__(
        self, tokenizer: Any, dim: int = 64, emb_dim: int = 64, depth: int = 2, heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.embed = nn.Embedding(tokenizer.vocab_size, dim)
        self.position = nn.Parameter(torch.randn(tokenizer.max_length, dim) * 0.02)
        streams = range(DROPOUT, DROPOUT + 2 * depth, 2)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, cross=False, stream=stream) for stream in streams)
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, emb_dim)

    def forward(self, text: Text, noise: RowNoise | None = None) -> TextFeatures:
        ids, mask = self.encode(text) if isinstance(text[0], str) else text
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x, _ = block(x, mask=mask, noise=noise)
        x = self.norm(x)
        kept = mask.unsqueeze(-1).to(x.dtype)
        mean = (x * kept).sum(1) / kept.sum(1).clamp(min=1)
        return TextFeatures(self.project(mean), x, mask)

    def encode(self, captions: Any) -> tuple[Tensor, Tensor]:
        ids, mask = self.tokenizer.encode(list(captions))
        return ids.to(self.position.device), mask.to(self.position.device, torch.bool)


class PretrainedTextEncoder(nn.Module):
    """A frozen encoder from `transformers`, by hub name or local folder, with learned projections behind it."""

    def __init__(self, name: str, dim: int = 64, emb_dim: int = 64, max_length: int = 64) -> None:
        super().__init__()
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ImportError("a pretrained text encoder needs transformers: pip install transformers") from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name)
        except OSError as error:
            raise ValueError(f"text encoder: {name!r} is no transformers model name or folder ({error})") from error
        if getattr(self.model.config, "is_encoder_decoder", False):
            self.model = self.model.get_encoder()
        self.model.requires_grad_(False).eval()
        self.max_length = max_length
        hidden = self.model.config.hidden_size
        self.to_tokens, self.project = nn.Linear(hidden, dim), nn.Linear(hidden, emb_dim)

    def train(self, mode: bool = True) -> PretrainedTextEncoder:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, text: Text, noise: RowNoise | None = None) -> TextFeatures:
        ids, mask = self.encode(text) if isinstance(text[0], str) else text
        with torch.no_grad():
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        kept = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * kept).sum(1) / kept.sum(1).clamp(min=1)
        return TextFeatures(self.project(mean), self.to_tokens(states), mask)

    def encode(self, captions: Any) -> tuple[Tensor, Tensor]:
        got = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        device = self.project.weight.device
        return got["input_ids"].to(device), got["attention_mask"].to(device, torch.bool)


class ImageDecoder(nn.Module):
    """f(t), text tokens and z -> image in [0, 1]: a transformer over a coarse grid, then three upsampling stages."""

    def __init__(
        self,
        size: int = 32,
        channels: int = 1,
        dim: int = 64,
        emb_dim: int = 64,
        z_dim: int = 16,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size: expected one of {SIZES}, got {size!r}")
        self.grid, self.z_dim, self.size, self.channels = size // 8, z_dim, size, channels
        self.position = nn.Parameter(torch.randn(self.grid**2, dim) * 0.5)
        self.from_text = nn.Linear(emb_dim, dim)
        self.from_z = nn.Linear(z_dim, dim * 16)
        self.blocks = nn.ModuleList(Block(dim, heads, 0.0, cross=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        widths = [dim, 3 * dim // 4, dim // 2, max(dim // 4, 8)]
        stages = []
        for wide, narrow in zip(widths, widths[1:], strict=False):
            stages += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1)]
            stages += [nn.GroupNorm(4, narrow), nn.SiLU()]
        self.up = nn.Sequential(*stages, nn.Conv2d(widths[-1], channels, 3, padding=1))

    def forward(self, text: TextFeatures, z: Tensor) -> tuple[Tensor, QueryKey]:
        """The images (B, C, S, S), and queries and keys of the last cross-attention."""
        coarse = self.from_z(z).unflatten(1, (-1, 4, 4))  # z says its part on a 4x4 grid, whatever the size
        coarse = F.interpolate(coarse, size=(self.grid, self.grid)) if self.grid != 4 else coarse
        x = self.position + coarse.flatten(2).transpose(1, 2) + self.from_text(text.emb)[:, None]
        for block in self.blocks:
            x, attention = block(x, text.tokens, text.mask)
        x = self.norm(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return torch.sigmoid(self.up(x)), attention


class ImageEncoder(nn.Module):
    """g(x) for the contrastive loss and q(z | x) for training, on one convolutional trunk."""

    def __init__(self, size: int = 32, channels: int = 1, dim: int = 64, emb_dim: int = 64, z_dim: int = 16) -> None:
        super().__init__()
        widths = [channels, max(dim // 4, 8), dim // 2] + [dim] * (int(math.log2(size)) - 4)
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(4, wide), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())  # a 4x4 grid at every size
        self.to_emb = nn.Linear(dim * 16, emb_dim)
        self.to_z = nn.Linear(dim * 16, 2 * z_dim)

    def forward(self, image: Tensor) -> ImageFeatures:
        h = self.trunk(image)
        mu, log_var = self.to_z(h).chunk(2, dim=1)
        return ImageFeatures(self.to_emb(h), mu, log_var.clamp(-8, 4))


class Imagen(nn.Module):
    """The whole model. `imagen(text)` generates, as in the reference loop; text is captions or (ids, mask).

    Example:
        >>> from fastloss.recipes.data.tokenizer import ByteTokenizer
        >>> imagen = Imagen(TextEncoder(ByteTokenizer()), ImageDecoder(size=32))
        >>> imagen(["a handwritten seven"]).shape
        torch.Size([1, 1, 32, 32])
    """

    def __init__(
        self, text_encoder: nn.Module, image_decoder: ImageDecoder, image_encoder: ImageEncoder | None = None
    ) -> None:
        super().__init__()
        self.text_encoder, self.image_decoder, self.image_encoder = text_encoder, image_decoder, image_encoder

    def forward(self, text: Text, z: Tensor | None = None) -> Tensor:
        """Images (B, C, S, S) in [0, 1]; `z` (B, Z) is drawn from N(0, I) where it is not given."""
        text_features = self.text_encoder(text)
        z = torch.randn(self.noise_shape(text_features.emb), device=text_features.emb.device) if z is None else z
        return self.image_decoder(text_features, z)[0]

    def noise_shape(self, emb: Tensor) -> tuple[int, int]:
        return len(emb), self.image_decoder.z_dim
