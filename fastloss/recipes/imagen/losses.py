"""The losses of a training step: the article's six, the prior of z, and their fusion.

Each caption gives two images: A from a z of its real image's posterior, compared with that image, and B from a z of
N(0, I), as in generation, judged by what must hold for any good image of the caption. The two are also the two
stochastic views whose attention should agree.

    contrastive    f(t) against g(x) of the real image and of image B; equal captions are no negatives of each other
    perceptual     features of the real image and of A
    pixel          the real image and A
    smoothness     differences of neighbouring pixels of A and B
    diversity      image B nearer to an image of the training batch than the margin
    mode_seeking   A and B differ less than their z do
    attention      the decoder's attention to the words, in A against B
    prior          KL(q(z | x) || N(0, I)): keeps A's z where B's is drawn
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import (
    CompositeLoss,
    MemoryBank,
    PerceptualLoss,
    attention_consistency_from_qk,
    core,
    diversity_loss,
    info_nce,
    mode_seeking_loss,
    pixel_loss,
    smoothness_loss,
)
from ..training.noise import RowNoise
from ..training.shared_batch import SharedBatch
from .config import WEIGHTS, check_weights
from .model import Z_A, Z_B, ImageFeatures, Imagen, QueryKey, TextFeatures

DIVERSITY_MARGIN = 0.15  # mean |difference|, in units of the image: about that of two real digits of one caption


class Views(NamedTuple):
    """What the model makes of a batch: see the two images above."""

    text: TextFeatures
    real: ImageFeatures
    image_a: Tensor
    image_b: Tensor
    z_a: Tensor
    z_b: Tensor
    emb_b: Tensor  # g of image B, through frozen weights of g: only the image can improve
    attention_a: QueryKey
    attention_b: QueryKey


def make_views(model: Imagen, image: Tensor, text: tuple[Tensor, Tensor], noise: RowNoise | None = None) -> Views:
    """One pass of every encoder, and one of the decoder for both images at once. `noise` is for z and for dropout;
    None: torch's generators."""
    encoder = model.image_encoder
    if encoder is None:
        raise ValueError("model: training needs an image encoder")
    features = model.text_encoder(text, noise)
    real = encoder(image)

    def normal(stream: int) -> Tensor:
        return torch.randn_like(real.mu) if noise is None else noise.normal(stream, real.mu.shape[1]).to(real.mu)

    z_a = real.mu + torch.exp(0.5 * real.log_var) * normal(Z_A)
    z_b = normal(Z_B).to(z_a)
    twice = TextFeatures(*(torch.cat([t, t]) for t in features))
    images, attention = model.image_decoder(twice, torch.cat([z_a, z_b]))
    image_a, image_b = images.chunk(2)
    frozen = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
    emb_b = torch.func.functional_call(encoder, frozen, (image_b,)).emb
    halves = [QueryKey(*pair) for pair in zip(attention.q.chunk(2), attention.k.chunk(2), strict=True)]
    return Views(features, real, image_a, image_b, z_a, z_b, emb_b, *halves)


class ImagenLosses(nn.Module):
    """All the losses of a step. A loss of weight 0 is not computed.

    Args:
        weights: weight by name; names left out have the weight of `WEIGHTS`.
        perceptual: the loss of that name, `loss(image, image_pred)`; needed where its weight is not 0.
        temperature: of the contrastive loss.
        bank: images in the memory bank of negatives, 0 for none.
        weighting: of `CompositeLoss`.
        reference: compute everything with the eager references instead of the fast kernels.
        shared: the batch, where ranks share it; None: this process has all of it.
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        *,
        perceptual: nn.Module | None = None,
        temperature: float = 0.1,
        bank: int = 0,
        emb_dim: int = 64,
        weighting: str = "fixed",
        reference: bool = False,
        shared: SharedBatch | None = None,
    ) -> None:
        super().__init__()
        chosen = WEIGHTS | check_weights(weights or {})
        self.weights = {name: weight for name, weight in chosen.items() if weight > 0}
        if not self.weights:
            raise ValueError("weights: all losses have weight 0, there is nothing to train on")
        self.fuse = CompositeLoss(self.weights, weighting=weighting)
        if "perceptual" in self.weights and perceptual is None:
            raise ValueError("perceptual: its weight is not 0, so it needs a PerceptualLoss")
        self.perceptual = perceptual
        self.shared = shared
        self.group = None if shared is None else shared.world.group
        self.bank = MemoryBank(bank, emb_dim, self.group) if bank and "contrastive" in self.weights else None
        self.temperature, self.reference = temperature, reference

    def forward(self, views: Views, image: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The fused loss and its detached parts; `ids` (B,) are equal for equal captions."""
        with core.use_backend("reference") if self.reference else contextlib.nullcontext():
            parts = {name: getattr(self, f"_{name}")(views, image, ids) for name in self.weights}
            if self.shared is not None:
                parts = self._of_all_ranks(parts, self.shared)
            total, detached = self.fuse(parts)
        if self.bank is not None:
            self.bank.push(views.real.emb, ids)
        return total, detached

    def _of_all_ranks(self, parts: dict[str, Tensor], shared: SharedBatch) -> dict[str, Tensor]:
        """The losses of the whole batch from those of this rank's rows, in one sum over the ranks. The contrastive one
        is of the whole batch already; mode seeking divides means, so its means come here."""
        own = {name: part for name, part in parts.items() if name != "contrastive"}
        if not own:
            return parts
        values = shared.means(torch.cat([part.float().reshape(-1) for part in own.values()]))
        means = dict(zip(own, values.split([part.numel() for part in own.values()]), strict=True))
        if "mode_seeking" in means:
            image, z = means["mode_seeking"].split(1)
            means["mode_seeking"] = mode_seeking_loss(image, torch.zeros_like(image), z, torch.zeros_like(z))
        return {name: means[name].reshape(()) if name in means else part for name, part in parts.items()}

    def _contrastive(self, views: Views, image: Tensor, ids: Tensor) -> Tensor:
        real = self._info_nce(views.text.emb, views.real.emb, ids)
        return 0.5 * (real + self._info_nce(views.text.emb, views.emb_b, ids))

    def _info_nce(self, text: Tensor, image: Tensor, ids: Tensor) -> Any:
        negatives, key_ids = None, ids
        if self.bank is not None and self.bank.pushed:
            negatives, bank_ids = self.bank.stored()
            key_ids = torch.cat([ids, bank_ids])
        return info_nce(
            text,
            image,
            negatives,
            temperature=self.temperature,
            symmetric=True,
            in_batch=True,
            query_ids=ids,
            key_ids=key_ids,
            group=self.group,
            exchange=None if self.shared is None else self.shared.exchange,
        )

    def _perceptual(self, views: Views, image: Tensor, ids: Tensor) -> Tensor:
        assert self.perceptual is not None
        return self.perceptual(image, views.image_a)

    def _pixel(self, views: Views, image: Tensor, ids: Tensor) -> Tensor:
        return pixel_loss(image, views.image_a)

    def _smoothness(self, views: Views, image: Tensor, ids: Tensor) -> Tensor:
        return 0.5 * (smoothness_loss(views.image_a) + smoothness_loss(views.image_b))

    def _diversity(self, views: Views, image: Tensor, ids: Tensor) -> Tensor:
        everyone = image if self.shared is None else self.shared.everyone(image)
        return diversity_loss(views.image_b, everyone, margin=DIVERSITY_MARGIN)

    def _mode_seeking(self, views: Views, image: Tensor, ids: Tensor) -> Tensor:
        if self.shared is not None:  # the two means of which it is made
            pairs = ((views.image_a, views.image_b), (views.z_a, views.z_b))
            return torch.stack([(a.float() - b.float()).abs().mean() for a, b in pairs])
        return mode_seeking_loss(views.image_a, views.image_b, views.z_a, views.z_b)

    def _attention(self, views: Views, image: Tensor, ids: Tensor) -> Tensor:
        mask = views.text.mask[:, None, None, :]
        return attention_consistency_from_qk(*views.attention_a, *views.attention_b, metric="sym_kl", mask=mask)

    def _prior(self, views: Views, image: Tensor, ids: Tensor) -> Tensor:
        mu, log_var = views.real.mu.float(), views.real.log_var.float()
        return 0.5 * (mu * mu + log_var.exp() - 1 - log_var).sum(1).mean()


def perceptual_loss(names: Sequence[str], weights: str = "") -> nn.Module:
    """`PerceptualLoss` on the networks of :meth:`Config.backbone_names`: "digits" alone is the digits' own small one,
    which needs no download; others are torchvision's. `weights` is a local file for each, with commas, so that nothing
    is downloaded, or "random".

    Raises:
        ValueError: the weights of a network are not to be had; it says what works without them.
    """
    if list(names) == ["digits"]:
        from .digits_backbone import digits_backbone

        return _Grey(PerceptualLoss(digits_backbone(), normalize=False))
    files: list[Any] = [False if file == "random" else file for file in weights.split(",")] if weights else []
    try:
        return _ThreeChannels(PerceptualLoss(list(names), pretrained=files or True))
    except RuntimeError as error:
        url = re.search(r"https?://\S+", str(error))
        where = f" from {url.group()}" if url else ""
        raise ValueError(
            f"backbone_weights: the weights of {', '.join(names)} could not be downloaded{where} "
            f"({_reason(error)}). Without a network: --backbone-weights PATH of that file fetched elsewhere (.pth or "
            ".safetensors), --backbones digits (small, in the package, sees grey), --backbone-weights random, or "
            "--weights perceptual=0 (no perceptual loss)"
        ) from None


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split()).strip("<>") or type(cause).__name__


class _Grey(nn.Module):
    """The digits' network takes one channel: images of three are given to it as their mean over the colours."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, image: Tensor, image_pred: Tensor) -> Tensor:
        return self.loss(self._grey(image), self._grey(image_pred))

    def encode(self, image: Tensor) -> Any:
        return self.loss.encode(self._grey(image))  # type: ignore[operator]

    @staticmethod
    def _grey(image: Tensor) -> Tensor:
        return image if image.shape[1] == 1 else image.mean(1, keepdim=True)


class _ThreeChannels(nn.Module):
    """The named networks take RGB: grey images are given to them three times."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, image: Tensor, image_pred: Tensor) -> Tensor:
        return self.loss(image.expand(-1, 3, -1, -1), image_pred.expand(-1, 3, -1, -1))

    def encode(self, image: Tensor) -> Any:
        return self.loss.encode(image.expand(-1, 3, -1, -1))  # type: ignore[operator]
