"""Make digits_backbone.safetensors: `python -m fastloss.recipes.imagen.train_digits_backbone [FILE]`.

It takes under half a minute on a CPU. A classifier of the digits' training split, with random shears, turns, shifts and
scales. The test split is only looked at, for the figure printed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..data.digits import load_digits
from .digits_backbone import WEIGHTS, DigitsBackbone, DigitsClassifier

EPOCHS = 30
BATCH = 64
RATE = 3e-3


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random small affine maps, a random contrast and a little noise."""
    n = len(images)
    angle, shear, log_x, log_y, dx, dy = (torch.rand(6, n, generator=generator) * 2 - 1).unbind()
    theta = torch.stack(
        [
            torch.stack([(0.12 * log_x).exp(), 0.25 * shear + 0.15 * angle, 0.12 * dx], 1),
            torch.stack([-0.15 * angle, (0.12 * log_y).exp(), 0.12 * dy], 1),
        ],
        1,
    )
    moved = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    contrast = 0.7 + 0.6 * torch.rand(n, 1, 1, 1, generator=generator)
    noise = 0.05 * torch.randn(moved.shape, generator=generator)
    return (moved * contrast + noise).clamp(0, 1)


def train(epochs: int = EPOCHS) -> DigitsClassifier:
    """The trained classifier, the same on every run of one machine; the caller's random state is left alone."""
    data = load_digits("train")
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsClassifier()
    steps = epochs * (len(data) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            scores = model(distort(data.images[batch], generator))
            loss = F.cross_entropy(scores, data.labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def main(path: Path) -> None:
    torch.set_num_threads(1)  # sums split among threads differ in their last bits, and so would the file
    start = time.perf_counter()
    model = train()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    backbone = DigitsBackbone(model)
    for split in ("train", "val", "test"):
        data = load_digits(split)
        print(f"{split}: {(backbone.classify(data.images).argmax(1) == data.labels).float().mean():.4f}")
    print(f"{path}: {path.stat().st_size} bytes, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS)
