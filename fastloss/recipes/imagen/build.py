"""Model, tokenizer and generation from a configuration or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import tokenizer as tokenizers
from ..training.checkpoint import check_recipe, load_checkpoint
from .config import Config
from .model import ImageDecoder, ImageEncoder, Imagen, PretrainedTextEncoder, TextEncoder

RECIPE = "train"
GENERATE_BATCH = 256


def make_tokenizer(config: Config, captions: Iterable[str]) -> Any:
    """The tokenizer the model is to be trained with; None where a pretrained text encoder brings its own."""
    if config.text_encoder:
        return None
    if config.word_tokens():
        return tokenizers.WordTokenizer.from_captions(captions)
    return tokenizers.ByteTokenizer(max_length=128)


def tokenizer_state(tokenizer: Any) -> dict[str, Any] | None:
    return None if tokenizer is None else tokenizer.state_dict()


def make_model(config: Config, tokenizer: Any) -> Imagen:
    dim, depth, channels = config.dim, config.depth, config.image_channels()
    text_encoder: nn.Module
    if config.text_encoder:
        text_encoder = PretrainedTextEncoder(config.text_encoder, dim=dim, emb_dim=dim)
    else:
        text_encoder = TextEncoder(tokenizer, dim=dim, emb_dim=dim, depth=depth)
    shape = {"size": config.size, "channels": channels, "dim": dim, "emb_dim": dim, "z_dim": config.z_dim}
    return Imagen(text_encoder, ImageDecoder(**shape, depth=depth), ImageEncoder(**shape))


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[Imagen, Config]:
    """The model of a checkpoint file or run folder, ready to generate."""
    content = load_checkpoint(path, device)
    check_recipe(content, RECIPE, path)
    try:
        config = Config(**content["config"])
        state = content["tokenizer"]
        model = make_model(config, None if state is None else tokenizers.from_state_dict(state))
        model.load_state_dict(content["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"checkpoint: {path} does not fit this version's model ({error})") from error
    return model.to(device).eval(), config


@torch.no_grad()
def generate(model: Imagen, captions: Sequence[str], seed: int) -> Tensor:
    """Images (N, C, S, S) of the captions. The noise depends on the seed alone, not on the device or its state."""
    noise = torch.Generator().manual_seed(seed)
    z = torch.randn(len(captions), model.image_decoder.z_dim, generator=noise)
    device = model.image_decoder.position.device
    training = model.training
    model.eval()
    starts = range(0, len(captions), GENERATE_BATCH)
    images = [model(list(captions[at : at + GENERATE_BATCH]), z[at : at + GENERATE_BATCH].to(device)) for at in starts]
    model.train(training)
    return torch.cat(images)
