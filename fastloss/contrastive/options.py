"""The options and by-products of the softmax contrastive losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, overload

from torch import Tensor

from ..core.checks import check_number
from ..core.entry import public_function

P = ParamSpec("P")


class Form(NamedTuple):
    """What the matrix of logits of a softmax op is like; the tuple that its kernels are compiled for."""

    diagonal: bool = False  # row i's positive is column i, which is no negative of it
    symmetric: bool = False  # the columns' statistics too: a second direction
    self_similarity: bool = False  # query and key are the same rows, the logits symmetric: what is above the diagonal
    moments: bool = False  # sum and number of the negatives' logits, for label smoothing and debiasing
    bfloat16: bool = False  # products may be made in it (CPU)
    are_negatives: bool = False  # of listed pairs: they alone are negatives; else they alone are none


@dataclass(frozen=True)
class NegativeSampling:
    r"""How the negatives of a softmax contrastive loss are chosen and weighted; the defaults change nothing.

    Args:
        tau_plus: debiasing, the probability in [0, 1) that a negative has the anchor's class. The sum over the
            negatives becomes ``N max((mean_A exp(s) - tau_plus exp(s_ip)) / (1 - tau_plus), exp(-scale))``, with the
            least exponential that a cosine gives as its floor: ``normalize=True`` and no bias.
        hardness: beta >= 0, weighs each negative by ``exp(beta s)`` (normalised to mean 1): hard ones count more.
        margin: leaves out the negatives that are more similar than the positive by more than `margin` (a difference of
            similarities, before scale and bias): likely false negatives. No gradient flows through the choice.

    Source: Chuang et al., "Debiased contrastive learning", 2020; Robinson et al., "Contrastive learning with hard
    negative samples", 2021; the margin as in Zhang et al., "Qwen3 embedding", 2025.
    """

    tau_plus: float = 0.0
    hardness: float = 0.0
    margin: float | None = None

    def __post_init__(self) -> None:
        checked = {"tau_plus": check_number("tau_plus", self.tau_plus, 0)}
        if self.tau_plus >= 1:
            raise ValueError(f"tau_plus: expected a probability >= 0 and < 1, got {self.tau_plus!r}")
        checked["hardness"] = check_number("hardness", self.hardness, 0)
        if self.margin is not None:
            checked["margin"] = check_number("margin", self.margin)
        for name, value in checked.items():  # of a frozen dataclass
            object.__setattr__(self, name, value)


class ContrastiveOutput(NamedTuple):
    """What ``return_lse=True`` returns: the loss and, without further work, two by-products.

    `loss` is the loss as without it. `lse` is the log-sum-exp that each row's loss has (with gradient; -inf where a sum
    over negatives alone has none). `top1` (bool) says whether the positive beats all of the row's negatives; a tie
    does not. Rows are ``[M]``; ``[2, M]`` for the two directions of a symmetric loss.
    """

    loss: Tensor
    lse: Tensor
    top1: Tensor


class Columns(NamedTuple):
    """What rows are compared with by NT-Xent and SupCon: themselves, or the rows of all ranks, their own first."""

    embeddings: Tensor  # [N, D]
    inverse_norms: Tensor | None  # [N], where the embeddings are not normalised yet
    ids: Tensor | None  # [N]


# What to pass instead of an option that a loss has under another name, or that belongs to an object it takes.
SAMPLING_HINTS = {field.name: f"sampling=NegativeSampling({field.name}=...)" for field in fields(NegativeSampling)}
TEMPERATURE_HINTS = dict.fromkeys(("tau", "temp"), "temperature=...") | {"logit_scale": "temperature = 1 / logit_scale"}
_OF_OPEN_CLIP = "it to fastloss.compat.open_clip, whose classes have open_clip's own arguments"
OPEN_CLIP_HINTS = dict.fromkeys(("local_loss", "gather_with_grad", "cache_labels", "output_dict"), _OF_OPEN_CLIP)
OPEN_CLIP_HINTS |= dict.fromkeys(("rank", "world_size"), "group=..., a process group, for the batch of all its ranks")
OPEN_CLIP_NAMES = {"image_features": "image", "text_features": "text"}
SCALE_HINTS = dict.fromkeys(("temperature", "temp", "tau"), "logit_scale = 1 / temperature") | OPEN_CLIP_HINTS
SUPCONTRAST_HINTS = {
    "base_temperature": "temperature alone, and multiply the loss by temperature / base_temperature",
    "contrast_mode": "weights=..., 0 for rows that are to be no anchors",
    "mask": "labels=..., equal ones for positives",
}


class MayReturnLse(Protocol[P]):
    """A loss whose result depends on `return_lse`, to type checkers; the other options are the function's own."""

    __name__: str

    @overload  # the first that fits counts, and so the last one is for calls without return_lse
    def __call__(  # type: ignore[overload-overlap]
        self, *args: Any, return_lse: Literal[True], **options: Any
    ) -> ContrastiveOutput: ...

    @overload
    def __call__(self, *args: Any, return_lse: Literal[False], **options: Any) -> Tensor: ...

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, *args: Any, return_lse: bool, **options: Any
    ) -> Tensor | ContrastiveOutput: ...

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor: ...


def may_return_lse(
    *, others: Mapping[str, str] | None = None, hints: Mapping[str, str] | None = None
) -> Callable[[Callable[P, Tensor | ContrastiveOutput]], MayReturnLse[P]]:
    """:func:`public_function` of such a loss."""
    return public_function(others=others, hints=hints)  # type: ignore[return-value]


@dataclass(frozen=True)
class SoftmaxOptions:
    """The options of the softmax losses that are no tensors."""

    include_positive: bool = True
    symmetric: bool = False
    normalize: bool = True
    label_smoothing: float = 0.0
    in_batch: bool = True
    sampling: NegativeSampling | None = None
