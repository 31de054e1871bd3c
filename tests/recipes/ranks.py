"""One of two ranks of a training, as torchrun starts it: `python -m tests.recipes.ranks FOLDER`.

What each part of the job returns is saved to
FOLDER/RANK.pt.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import signal
import socket
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tests.processes import run_ranks

RANKS, STEPS = 2, 50
OPTIONS = ["--batch-size", "9", "--dim", "16", "--depth", "1", "--log-every", "5", "--device", "cpu"]


def launch(folder: Path, timeout: int = 400, job: str = "tests.recipes.ranks") -> list[dict[str, Any]]:
    """What the job, a module with a `main`, returned on each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return run_ranks(job, lambda rank: [str(folder)], RANKS, folder, timeout, **address)


def options_of(folder: Path, **changes: Any) -> Any:
    """The configuration of all trainings here: a bank, and a batch that two ranks share unevenly. No perceptual loss,
    which takes half of the time."""
    from fastloss.recipes.imagen.config import Config

    options = {"steps": STEPS, "batch_size": 9, "dim": 16, "depth": 1, "log_every": 5, "val_every": 100, "bank": 20}
    options["weights"] = "perceptual=0"
    return Config(**(options | {"out": str(folder), "device": "cpu"} | changes))


def next_ids(trainer: Any, count: int = 20) -> list[list[Any]]:
    return [batch["id"] for batch in islice(trainer._batches(), count)]


def curve(world: Any, folder: Path) -> dict[str, Any]:
    """50 steps; the ids of the batches after them."""
    from fastloss.recipes.imagen.train import Trainer

    trainer = Trainer(options_of(folder / "two", weighting="uncertainty"), world=world, quiet=True)
    trainer.run()
    weights = torch.cat([p.detach().flatten() for p in trainer.trained])
    bank = trainer.losses.bank
    return {"weights": weights, "bank": bank.emb, "pushed": bank.pushed, "ids": next_ids(trainer)}


def resumed_from_one(world: Any, folder: Path) -> dict[str, Any]:
    """A run of one process goes on."""
    from fastloss.recipes.imagen.train import Trainer

    trainer = Trainer.resume(folder / "one", {"steps": 6}, quiet=True, world=world)
    start = trainer.step
    trainer.run()
    return {"start": start, "ids": next_ids(trainer)}


def stopped(world: Any, folder: Path) -> dict[str, Any]:
    """Rank 1 alone gets a SIGTERM."""
    from fastloss.recipes.imagen.train import Trainer
    from fastloss.recipes.training.interrupt import Interrupted

    trainer = Trainer(options_of(folder / "stopped"), world=world, quiet=True)
    step = trainer.train_step

    def told(batch: dict[str, Any]) -> Any:
        if trainer.step == 2 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    trainer.train_step = told
    try:
        trainer.run()
    except Interrupted as error:
        return {"step": trainer.step, "said": str(error)}
    return {}


def not_finite(world: Any, folder: Path) -> str:
    """The weights of rank 1 alone are NaN."""
    from fastloss.recipes.imagen.train import Trainer

    trainer = Trainer(options_of(folder / "nan"), world=world, quiet=True)
    if world.rank == 1:
        with torch.no_grad():
            trainer.model.image_decoder.position.fill_(math.nan)
    try:
        trainer.run()
    except FloatingPointError as error:
        return str(error)
    return ""


def early(world: Any, folder: Path) -> dict[str, Any]:
    """The score is judged on rank 0 alone, whose judgement all follow; a failure of it is one of all."""
    from fastloss.recipes.imagen import train

    scores = iter([0.1, 0.5, 0.4, 0.3])
    train.validate = lambda *_: {"score": next(scores)} if world.main else 1 / 0
    trainer = train.Trainer(options_of(folder / "early", val_every=1, patience=2), world=world, quiet=True)
    trainer.run()
    train.validate = lambda *_: open(folder / "nowhere" / "x")
    try:
        trainer._validate(None)
    except OSError as error:
        said = str(error)
    return {"step": trainer.step, "best": trainer.best, "said": said}


def failures(folder: Path) -> dict[str, tuple[int, str]]:
    """Exit code and standard error of commands that cannot work, as each rank ends."""
    whole = folder / "two" / "checkpoint"
    shards = sorted(path.name for path in whole.glob("*.distcp"))
    spoilt = {
        "wrong model": lambda run: None,  # below, by rank 0, of a file
        "truncated": lambda run: (run / "checkpoint" / shards[-1]).write_bytes(b"PK" * 200),
        "no metadata": lambda run: (run / "checkpoint" / ".metadata").unlink(),
    }
    if os.environ["RANK"] == "0":
        for name, spoil in spoilt.items():
            (folder / name).mkdir()
            if name != "wrong model":
                shutil.copytree(whole, folder / name / "checkpoint")
                spoil(folder / name)
    commands = {name: ["train", "--resume", "--out", str(folder / name)] for name in spoilt}
    commands["other recipe"] = ["train", "--resume", "--out", str(folder / "other recipe")]
    commands["too few"] = ["train", "--out", str(folder / "x"), "--batch-size", "1", *OPTIONS[2:]]
    commands["bad option"] = ["train", "--out", str(folder / "x"), "--temperature", "nan"]
    if os.environ["RANK"] == "0":
        _other_models(folder)
    return {name: _ended(command) for name, command in commands.items()}


def _other_models(folder: Path) -> None:
    from fastloss.recipes.training.checkpoint import load_checkpoint, save_checkpoint

    content = load_checkpoint(folder / "two" / "checkpoint")
    (folder / "other recipe").mkdir()
    save_checkpoint(folder / "other recipe" / "checkpoint.pt", content | {"recipe": "train-clip"})
    content["model"] = {f"tower.{name}": value for name, value in content["model"].items()}
    save_checkpoint(folder / "wrong model" / "checkpoint.pt", content)


def _ended(command: list[str]) -> tuple[int, str]:
    from fastloss import cli
    from fastloss.recipes.training.world import World

    World.join("cpu").every(None)  # rank 0 has prepared the folders
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            cli.main(command)
        except SystemExit as end:
            code = end.code
    return code, said.getvalue()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    from fastloss.recipes.imagen import train
    from fastloss.recipes.training.world import World

    torch.distributed.destroy_process_group = lambda *_: None  # several commands end in this process
    train.validate = lambda *_: {"score": 0.5}
    world = World.join("cpu")
    parts = {part.__name__: part(world, folder) for part in (curve, resumed_from_one, stopped, not_finite, early)}
    torch.save(parts | {"failures": failures(folder)}, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
