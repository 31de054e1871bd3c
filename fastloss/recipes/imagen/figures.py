"""What each figure of a model means, from how many images it is, and how far it can be trusted."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .config import DIGITS, Config


class Figure(NamedTuple):
    """`share`: it is a share of n, so that it has an interval."""

    meaning: str
    better: str = "higher"
    share: bool = False


FIGURES = {
    "score": Figure("what the best checkpoint, early stopping and tuning go by"),
    "mae": Figure(
        "mean abs(x - x̂) of real images rebuilt from caption and mean of q(z given x), range 0 to 1", "lower"
    ),
    "retrieval": Figure("generated images whose embedding is nearest, among all captions, to their own's", share=True),
    "accuracy": Figure("images of the split's captions, two each, in which a judge reads the right digit", share=True),
    "grid_accuracy": Figure("the same over the 90 captions there are, three images each", share=True),
    "worst_digit_accuracy": Figure("the same of the digit that does worst", share=True),
    "z_diversity": Figure("mean abs difference of two images of one caption, range 0 to 1", "nearer to real"),
    "weight_effect": Figure('stroke width for "bold" less that for "thin", share of the side', "nearer to real"),
    "slant_effect": Figure(
        'slant for "leaning right" less that for "leaning left", width per height', "nearer to real"
    ),
    "ssim": Figure("mean SSIM of real images and their rebuilt ones, 11 x 11 Gaussian window, 1 is equal"),
    "frechet": Figure("Fréchet distance of real and generated images, features of the default backbone", "lower"),
}
DIGIT_FIGURES = ("accuracy", "grid_accuracy", "worst_digit_accuracy", "z_diversity", "weight_effect", "slant_effect")
SCORE_OF_DIGITS = (
    "the mean of accuracy, grid_accuracy and z_diversity, weight_effect and slant_effect (each as a share of the real "
    "one, at most 1), less mae"
)
SCORE = "retrieval less mae"
CONFIDENCE = 0.95
Z = 1.96  # standard errors in half of that interval


def score_meaning(config: Config) -> str:
    return SCORE_OF_DIGITS if config.data == DIGITS else SCORE


def validated(config: Config) -> list[str]:
    """Names of the figures of a validation."""
    return ["score", "mae", "retrieval", *(DIGIT_FIGURES if config.data == DIGITS else ())]


def count_of(name: str, figures: dict[str, float]) -> int:
    """From how many images (pairs of images for `z_diversity`) a figure is; 0 where that is not known."""
    return int(figures.get(f"n_{name}", figures.get("n", 0)))


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in n independent images, by scipy.

    Example:
        >>> low, high = interval(0.5, 10)
        >>> round(low, 3), round(high, 3)
        (0.237, 0.763)
    """
    from scipy.stats import binomtest

    found = binomtest(round(share * n), n).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def shown(name: str, figures: dict[str, float]) -> str:
    """A figure as text with its count, and its interval where it is a share: "50.0% (24 to 76%, n 10)"."""
    value, n = figures[name], count_of(name, figures)
    if not n:
        return f"{value:.4f}"
    if not FIGURES[name].share:
        return f"{value:.4f} (n {n})"
    low, high = interval(value, n)
    return f"{value:.1%} ({100 * low:.0f} to {100 * high:.0f}%, n {n})"


def score_error(figures: dict[str, float]) -> float:
    """The standard error of the score from its shares, each half of Wilson's interval over 1.96. What mae and the other
    parts add is small beside them and left out, so that it is a lower bound; NaN without counts."""
    names, parts = (("accuracy", "grid_accuracy"), 5) if "accuracy" in figures else (("retrieval",), 1)
    if not all(name in figures and count_of(name, figures) for name in names):
        return math.nan
    bounds = [interval(figures[name], count_of(name, figures)) for name in names]
    return math.hypot(*((high - low) / 2 / Z / parts for low, high in bounds))


def rows(figures: dict[str, float], config: Config) -> list[tuple[Any, ...]]:
    """For a table: name, value, interval, the value of real images, n, direction and meaning."""
    out = []
    for name, figure in FIGURES.items():
        if name not in figures:
            continue
        n = count_of(name, figures)
        low, high = interval(figures[name], n) if figure.share and n else (None, None)
        bounds = "" if low is None else f"{low:.3f} to {high:.3f}"
        real = figures.get(f"{name}_real")
        meaning = score_meaning(config) if name == "score" else figure.meaning
        out.append((name, f"{figures[name]:.4f}", bounds, "" if real is None else f"{real:.4f}", n or "", figure.better,
                    meaning))  # fmt: skip
    return out
