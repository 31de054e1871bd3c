"""One of two ranks of an image-text pre-training: `python -m tests.recipes.clip_ranks FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

STEPS = 50


def options_of(folder: Path, **changes: Any) -> Any:
    """A batch that two ranks share unevenly."""
    from fastloss.recipes.clip.config import Config

    options = {"data": "digits", "steps": STEPS, "batch_size": 25, "dim": 16, "width": 32, "size": 8, "device": "cpu"}
    return Config(**(options | {"val_every": STEPS, "log_every": 10, "out": str(folder)} | changes))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    from fastloss.recipes.clip.train import Trainer
    from fastloss.recipes.training.world import World

    world = World.join("cpu")
    found = {}
    for name, changes in (("clip", {}), ("siglip", {"loss": "siglip"}), ("pieces", {"chunk": 5})):
        trainer = Trainer(options_of(folder / name, **changes), quiet=True, world=world)
        trainer.run()
        found[name] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.save(found, folder / f"{world.rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
