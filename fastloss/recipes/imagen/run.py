"""The jobs behind the command line: a whole training run and samples; tuning is in tune.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from ..data.splits import Splits
from ..training import job
from ..training.pictures import Section, caption_rows, draw_sections, stacked
from ..training.run_folder import started
from .build import generate, load_model
from .config import Config
from .examples import real_images
from .image_quality import image_figures
from .report import Finished, write_report
from .train import Trainer
from .validation import validate


def _report(trainer: Trainer, best_step: int, notes: list[str]) -> str:
    """Judge the best model on the test split and write the report; the line with the figures."""
    config, folder, splits = trainer.config, trainer.folder, trainer.splits
    model, _ = load_model(folder, trainer.device)
    figures = validate(model, config, "test", splits["test"])
    figures |= image_figures(model, config, splits["test"], trainer.losses.perceptual)
    return write_report(Finished(folder, model, config, figures, best_step, splits, trainer.progress, notes))


train = functools.partial(job.train, Trainer, _report)


def sample(
    checkpoint: Path, captions: Sequence[str], out: Path, count: int, seed: int, device: str, real: bool = False
) -> str:
    """Write a picture with `count` images of each caption, beside a real one of that caption where `real` is set and
    the test or training data of the checkpoint's run have one."""
    if not captions:
        raise ValueError("captions: expected at least one")
    for caption in captions:
        if not caption.strip():
            raise ValueError(f"captions: expected words, got {caption!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if out.is_dir():
        raise ValueError(f"out: expected a file to write, got the folder {out}")
    where = Config(device=device).torch_device()
    model, config = load_model(checkpoint, where)
    images = stacked([generate(model, captions, seed + k) for k in range(count)])
    found = None
    if real:
        splits = Splits(config)
        test, training = (real_images(list(captions), splits[split]) for split in ("test", "train"))
        found = [first if first is not None else other for first, other in zip(test, training, strict=True)]
    columns, cells = caption_rows(captions, images, found)
    with started(out.parent):
        draw_sections([Section(f"{config.data}, seed {seed}", columns, captions, cells)], out)
    return f"{len(captions)} captions x {count} images of {config.size} x {config.size} -> {out}"
