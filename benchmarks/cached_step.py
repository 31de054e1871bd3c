"""Memory and time of one `cached_step` of two small encoders and `clip_loss`: `python -m benchmarks.cached_step`.

Grey images of 32 x 32 go through two convolutions, captions of 12 tokens through an embedding and two layers with
dropout. The peak is the kernel's own count of the resident set (VmHWM), above what the inputs, the models, and a step
of two pieces before have left.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import torch
from torch import Tensor, nn

from benchmarks.harness.measure import status
from fastloss import cached_step, clip_loss

SIDE, TOKENS, VOCABULARY = 32, 12, 512


class Images(nn.Module):
    """[M, 1, 32, 32] uint8 to [M, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(), nn.Flatten(),
            nn.Linear(64 * (SIDE // 4) ** 2, dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.float() / 255)


class Captions(nn.Module):
    """[M, 12] int64 to [M, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 64)
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.tokens(x).mean(1))


def measure(rows: int, dim: int, chunk: int, workspace_mib: int) -> dict[str, float]:
    torch.manual_seed(0)
    encoders = Images(dim), Captions(dim)
    log_scale = nn.Parameter(torch.tensor(10.0).log())
    images = torch.randint(0, 256, (rows, 1, SIDE, SIDE), dtype=torch.uint8)
    captions = torch.randint(0, VOCABULARY, (rows, TOKENS))

    def loss_fn(image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(image, text, logit_scale=log_scale.exp(), normalize=True, workspace_mib=workspace_mib)

    cached_step(encoders, (images[: 2 * chunk], captions[: 2 * chunk]), loss_fn, chunk=chunk)
    before = status("VmRSS") / 1024
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    began, processor = time.perf_counter(), time.process_time()
    loss = cached_step(encoders, (images, captions), loss_fn, chunk=chunk)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "before_mib": round(before, 1),
        "growth_mib": round(status("VmHWM") / 1024 - before, 1),
        "embeddings_and_gradients_mib": 4 * rows * dim * 4 / 2**20,
        "logits_mib": rows * rows * 4 / 2**20,
        "loss": loss.item(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of one cached_step; prints a line of JSON.")
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--workspace-mib", type=int, default=64)
    asked = parser.parse_args()
    print(json.dumps(vars(asked) | measure(asked.rows, asked.dim, asked.chunk, asked.workspace_mib)))


if __name__ == "__main__":
    main()
