"""What the configurations of runs are made of: fields that the command line has as options, and their checks."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # the help of the command line is made from configurations and needs no torch
    import torch

Config = TypeVar("Config", bound=Any)


def option(group: str, default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A field of a dataclass with its help; `group` is the heading it stands under."""
    return dataclasses.field(default=default, metadata={"help": text, "group": group, "choices": choices})


def at_least(name: str, value: float, low: int) -> None:
    if not value >= low:
        raise ValueError(f"{name}: expected at least {low}, got {value!r}")


def multiple_of(name: str, value: int, of: int) -> None:
    if value % of:
        raise ValueError(f"{name}: expected a multiple of {of}, got {value}")


def one_of(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def shares_left(val_percent: int, test_percent: int) -> None:
    """Something is left to train on."""
    total = val_percent + test_percent
    if total > 90:
        raise ValueError(f"val_percent: expected at most 90 with --test-percent, got {total} in all")


def torch_device(name: str) -> torch.device:
    """The device; of "auto" the GPU where there is one.

    Raises:
        ValueError: it cannot be used here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here ({reason})") from error
    return device


def fitted(config: Config, images: int, ranks: int = 1) -> tuple[Config, list[str]]:
    """The configuration for a training set of so many images and a run of so many steps, and a notice for each change:
    the batch is at most the data, the warm-up at most a tenth of the steps.

    Raises:
        ValueError: a batch has less than one image for each rank.
    """
    if images < ranks:
        raise ValueError(
            f"data: expected a training image for each of the {ranks} ranks, got {images} in {config.data}"
        )
    if config.batch_size < ranks:
        raise ValueError(f"batch_size: expected an image for each of the {ranks} ranks, got {config.batch_size}")
    notices, changes = [], dict[str, int]()
    if images < config.batch_size:
        changes["batch_size"] = images
        notices.append(f"--batch-size: {images} in place of {config.batch_size}, as many as there are training images")
    if config.steps // 10 < config.warmup:
        changes["warmup"] = config.steps // 10
        notices.append(f"--warmup: {changes['warmup']} in place of {config.warmup}, a tenth of {config.steps} steps")
    return dataclasses.replace(config, **changes), notices  # type: ignore[arg-type]
