"""One row per loss: what the conformance tests (test_every_loss.py) check and the benchmarks time.

Every list of rows in a file of this folder is taken: a new loss needs no line here.
"""

from __future__ import annotations

import importlib
import pkgutil

from tests.conformance.case import IMAGES, Bench, Case, Draw, image_pair, with_argument, with_options

__all__ = ["CASES", "IMAGES", "Bench", "Case", "Draw", "image_pair", "with_argument", "with_options"]

CASES = [
    case
    for module in pkgutil.iter_modules(__path__, f"{__name__}.")
    for rows in vars(importlib.import_module(module.name)).values()
    if isinstance(rows, list)
    for case in rows
    if isinstance(case, Case)
]
