"""How near generated images are to real ones: SSIM of rebuilt images, and a Fréchet distance of features."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ... import ssim_loss
from ..data.batches import batches
from .build import generate
from .config import Config
from .model import Imagen
from .validation import IMAGES

LOWEST = 2  # images that a covariance needs


@torch.no_grad()
def image_figures(model: Imagen, config: Config, dataset: Any, network: nn.Module | None) -> dict[str, float]:
    """``ssim`` of real images and those rebuilt from caption and the mean of q(z | x), and ``frechet``, where there is
    a network, of the real images and those generated from their captions; ``n_ssim`` and ``n_frechet`` images.

    `dataset` is a split, of which at most about 512 images count; `network` has ``encode(images)``, a list of features
    or lists of them, whose last is averaged over its pixels.
    """
    device = model.image_decoder.position.device
    similar: list[float] = []
    features: dict[str, list[Tensor]] = {"real": [], "generated": []}
    count = max(1, IMAGES // config.batch_size)
    for i, batch in enumerate(islice(batches(dataset, config.batch_size, 0, 0, device), count)):
        image = batch["image"]
        assert model.image_encoder is not None
        rebuilt, _ = model.image_decoder(model.text_encoder(batch["caption"]), model.image_encoder(image).mu)
        similar += (1 - ssim_loss(image, rebuilt, reduction="none")).flatten().tolist()
        if network is not None:
            features["real"].append(_pooled(network, image))
            features["generated"].append(_pooled(network, generate(model, batch["caption"], seed=i)))
    found: dict[str, float] = {"ssim": sum(similar) / len(similar), "n_ssim": len(similar)}
    real, generated = (torch.cat(some) if some else torch.empty(0, 1) for some in features.values())
    if len(real) >= LOWEST:
        found |= {"frechet": frechet_distance(real, generated), "n_frechet": len(real)}
    return found


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    r"""Squared Fréchet distance of two Gaussians fitted to features (N, D) and (M, D), in float64:
    :math:`|\mu_1 - \mu_2|^2 + tr(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})`.

    Few samples make it too large (their covariances differ by chance), so compare values of the same n only.

    Raises:
        ValueError: fewer than two samples, or features of another length.

    Example:
        >>> x = torch.randn(50, 3)
        >>> round(frechet_distance(x, x + 2), 4)
        12.0
    """
    if min(len(real), len(generated)) < LOWEST or real.shape[1:] != generated.shape[1:] or real.ndim != 2:
        raise ValueError(
            f"generated: expected (N, D) and (M, D), N and M >= 2, got {tuple(real.shape)} and {tuple(generated.shape)}"
        )
    real, generated = real.double(), generated.double()
    mean = (real.mean(0) - generated.mean(0)).square().sum()
    first, second = (torch.atleast_2d(torch.cov(x.T)) for x in (real, generated))
    roots = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return max(0.0, (mean + first.trace() + second.trace() - 2 * roots).item())


def _pooled(network: Any, images: Tensor) -> Tensor:
    features = network.encode(images)
    while not isinstance(features, Tensor):
        features = features[-1]
    return features.float().mean((2, 3)).cpu()
