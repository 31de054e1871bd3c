"""Who computes a loss: fastloss, eager PyTorch, torch.compile, and other libraries where they are installed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.cases import Case


def providers(case: Case) -> dict[str, Callable]:
    """Name -> function of the case's inputs and options. `eager` is the loss as a user of plain torch writes it."""
    return {
        "eager": case.eager,
        "torch.compile": torch.compile(case.eager),
        "fastloss": case.fn,
        **case.extra.get("rivals", {}),
    }
