"""Whole training steps, by name: the reference system's, and one of two small encoders with a contrastive loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.workloads.items import shape_of
from benchmarks.workloads.providers import providers
from tests.conformance.cases import CASES

WIDTH = 512
CLIP_OPTIONS = {"logit_scale": 14.3, "normalize": True}
Step = Callable[[], Tensor]


class Towers(nn.Module):
    """Two encoders, of 3 x 32 x 32 images and of 16 tokens, and the logarithm of the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(2048, WIDTH))
        self.words = nn.EmbeddingBag(8192, WIDTH)
        self.text = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(images), self.text(self.words(tokens))


def clip_step(shape: str, dtype: str, device: str, provider: str) -> Step:
    """One step; its loss. With bfloat16 the encoders run under autocast and the parameters stay float32."""
    case = next(c for c in CASES if c.name == "clip_loss")
    function = providers(case, CLIP_OPTIONS, device, [provider])[provider]
    if isinstance(function, str):
        raise ImportError(function)
    torch.manual_seed(0)
    exact = torch.float64 if dtype == "float64" else torch.float32
    rows = shape_of(shape)[0]
    model, images = Towers().to(device, exact), torch.randn(rows, 3, 32, 32).to(device, exact)
    tokens = torch.randint(8192, (rows, 16)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            pair = model(images, tokens)
            loss = function(*pair, **CLIP_OPTIONS | {"logit_scale": model.log_scale.exp()})
        loss.backward()
        optimizer.step()
        return loss.detach()

    step.model = model  # type: ignore[attr-defined]
    return step


def imagen_step(shape: str, dtype: str, device: str, provider: str) -> Step:
    """A step of `fastloss train --data digits`, of its default size, on random images and captions."""
    from fastloss import PerceptualLoss
    from fastloss.recipes.data.samples import caption_ids
    from fastloss.recipes.imagen.build import make_model, make_tokenizer
    from fastloss.recipes.imagen.config import Config
    from fastloss.recipes.imagen.digits_backbone import DigitsBackbone, DigitsClassifier
    from fastloss.recipes.imagen.losses import ImagenLosses, make_views

    torch.manual_seed(0)
    config = Config(losses="fast" if provider == "fastloss" else "reference")
    numbers = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    rows = shape_of(shape)[0]
    captions = [f"a handwritten {numbers[i % 10]} {'bold' if i % 3 else 'thin'}" for i in range(rows)]
    model = make_model(config, make_tokenizer(config, captions))
    losses = ImagenLosses(
        perceptual=PerceptualLoss(DigitsBackbone(DigitsClassifier()), normalize=False),
        emb_dim=config.dim, reference=config.losses == "reference",
    )  # fmt: skip
    images = torch.rand(rows, 1, config.size, config.size)
    model, losses, images = model.to(device), losses.to(device), images.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, foreach=True)
    ids = caption_ids(captions).to(device)
    text = model.text_encoder.encode(captions)  # type: ignore[operator]

    def step() -> Tensor:
        torch.manual_seed(1)  # the noise of z: the same for every provider
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, _ = losses(make_views(model, images, text), images, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        return loss.detach()

    step.model = model  # type: ignore[attr-defined]
    return step


STEPS: dict[str, Callable[[str, str, str, str], Step]] = {"imagen_step": imagen_step, "clip_step": clip_step}
