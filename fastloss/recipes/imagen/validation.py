"""How good the model is, in figures that no loss weight enters: what early stopping, tuning and the report go by."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from ..data.batches import batches, open_dataset
from ..data.samples import caption_ids
from .build import generate
from .config import DIGITS, Config
from .model import Imagen

IMAGES = 512  # of a validation split that are looked at


def validate(model: Imagen, config: Config, split: str = "val", dataset: Any = None) -> dict[str, float]:
    """Figures of a split and their summary `score`, higher is better.

    ``mae``: mean |x - x̂| of real images rebuilt from caption and the mean of q(z | x).
    ``retrieval``: share of generated images whose embedding g is nearest, among all captions, to that of their own.
    Digits also have the figures of :func:`fastloss.recipes.imagen.digits_quality.quality`. The score is 1 for digits
    that are read as what the caption says, differ from z to z and follow the words for weight and slant as much as real
    ones do, minus `mae`; for other data it is `retrieval` - `mae`. ``n`` is the number of images looked at, at most
    about 512, and ``n_NAME`` that of a figure from another number. `dataset` is the split where it is open already.
    """
    device = model.image_decoder.position.device
    training = model.training
    model.eval()
    with torch.no_grad():
        if dataset is None:
            dataset = open_dataset(config.data, split, config.size, config.image_channels(), config.held_out())
        figures = _agreement(model, config, dataset, device)
    if config.data == DIGITS:
        from .digits_quality import counts, quality

        figures |= quality(lambda captions, seed: generate(model, captions, seed), split, seed=0)
        figures |= {f"n_{name}": n for name, n in counts(split).items()}
        ratios = [_share(figures, name) for name in ("z_diversity", "weight_effect", "slant_effect")]
        aims = [figures["accuracy"], figures["grid_accuracy"], *ratios]
        figures["score"] = sum(aims) / len(aims) - figures["mae"]
    else:
        figures["score"] = figures["retrieval"] - figures["mae"]
    model.train(training)
    return figures


def _share(figures: dict[str, float], name: str) -> float:
    """Of what real images have, at most 1: an effect stronger than theirs is no better."""
    return min(max(figures[name] / max(figures[f"{name}_real"], 1e-9), 0.0), 1.0)


def _agreement(model: Imagen, config: Config, dataset: Any, device: torch.device) -> dict[str, float]:
    count = max(1, IMAGES // config.batch_size)
    errors: list[float] = []
    captions: list[str] = []
    embeddings: list[Any] = []
    for batch in islice(batches(dataset, config.batch_size, 0, 0, device), count):
        text = model.text_encoder(batch["caption"])
        assert model.image_encoder is not None
        rebuilt, _ = model.image_decoder(text, model.image_encoder(batch["image"]).mu)
        errors += [(rebuilt - batch["image"]).abs().mean().item()] * len(rebuilt)
        captions += batch["caption"]
        embeddings.append(torch.nn.functional.normalize(text.emb, dim=1))
    if not captions:
        raise ValueError(f"data: the {dataset.split} split of {config.data} is empty")
    seen = model.image_encoder(generate(model, captions, seed=0)).emb  # type: ignore[misc]
    nearest = (seen @ torch.cat(embeddings).T).argmax(1).cpu()
    ids = caption_ids(captions)
    retrieval = (ids[nearest] == ids).float().mean().item()
    return {"mae": sum(errors) / len(errors), "retrieval": retrieval, "n": len(ids)}
