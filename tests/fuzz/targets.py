"""The public names that are called, and how: functions as they are, modules that are more than a function's options."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fastloss
from fastloss.core import Loss
from fastloss.fusion.rules import WEIGHTINGS

# Types whose objects other calls take or return: each is drawn with those.
PARTS = {"ContrastiveOutput", "Exchange", "Execution", "ImageLosses", "LossAndGrads", "MemoryBank", "NegativeSampling",
         "VisionFeatures", "__version__", "cached_step", "collect_qk", "explain", "patch", "similar_pairs",
         "use_backend", "warmup"}  # fmt: skip


class Network(nn.Module):
    """Three layers of features of an image, the same weights for everybody."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, stride=2)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, image: Tensor) -> list[Tensor]:
        first = self.one(image)
        second = self.two(first.relu())
        return [first, first.relu(), second]


def perceptual_loss(
    image: Tensor,
    image_pred: Tensor,
    *,
    encoded: bool = False,
    exact: bool = False,
    pairwise: bool = False,
    **options: Any,
) -> Tensor:
    """A PerceptualLoss of a small network, called with the image or its encoded features."""
    criterion = options.get("criterion")
    more = {"lin_weights": False} if isinstance(criterion, str) and criterion == "lpips" else {}
    loss = fastloss.PerceptualLoss(Network(), **more, **options)
    loss = loss.double() if exact else loss
    target = loss.encode(image) if encoded else image
    return loss(target, image_pred, pairwise=pairwise)


def composite_loss(steps: Sequence[dict[str, Tensor]], *, exact: bool = False, **options: Any) -> Any:
    """The totals, the parts and the weights of several steps of one CompositeLoss."""
    loss = fastloss.CompositeLoss(**options)
    loss = loss.double() if exact else loss
    last = torch.linspace(0.5, 1.5, 3, dtype=torch.float64 if exact else torch.float32).requires_grad_()
    loss.train(torch.is_grad_enabled())  # "vqgan" asks for gradients in training mode
    out = []
    for parts in steps:
        more: dict[str, Any] = {}
        if loss.weighting == "vqgan" and isinstance(parts, dict):
            more = {"last_layer": last}
            parts = {
                name: _own(part) * last.pow(i + 1).sum() if isinstance(part, Tensor) and not part.is_quantized else part
                for i, (name, part) in enumerate(parts.items())
            }
        total, seen = loss(parts, **more)
        out.append((total, seen, {name: weight.clone() for name, weight in loss.current_weights.items()}))
    return out


def _own(part: Tensor) -> Tensor:
    return part.clone() if part.is_inference() and not torch.is_inference_mode_enabled() else part


def contrastive_loss(
    text_emb: Tensor, image_emb: Tensor, negative_embs: Tensor | None = None, *, temp: Any = 0.1, **options: Any
) -> Any:
    return fastloss.ContrastiveLoss(temp, **options)(text_emb, image_emb, negative_embs)


def loss_and_grads(query: Tensor, key: Tensor, negatives: Tensor | None = None, **options: Any) -> Any:
    return fastloss.loss_and_grads(query, key, negatives, **options)


SPECIAL: dict[str, Callable] = {
    "CompositeLoss": composite_loss,
    "ContrastiveLoss": contrastive_loss,
    "PerceptualLoss": perceptual_loss,
    "loss_and_grads": loss_and_grads,
}


@functools.cache
def names() -> list[str]:
    """What is called: every public function, and the modules that are not a function's options alone."""
    functions = [name for name in fastloss.__all__ if inspect.isfunction(getattr(fastloss, name)) and name not in PARTS]
    return sorted({*functions, *SPECIAL})


@functools.cache
def module_of(name: str) -> str | None:
    """The class that is the module form of a function."""
    for other in fastloss.__all__:
        found = getattr(fastloss, other)
        own = inspect.isclass(found) and issubclass(found, Loss) and other not in SPECIAL
        if own and found.fn is getattr(fastloss, name, None):
            return other
    return None


def parameters(name: str, weighting: str = "", loss_fn: str = "") -> tuple[list[str], dict[str, Any]]:
    """(names of the positional parameters, defaults of the options by name)."""
    if name == "CompositeLoss":
        kind = WEIGHTINGS.get(weighting)
        more = dict(getattr(getattr(kind, "__init__", None), "__kwdefaults__", None) or {})
        return ["steps"], {"weights": inspect.Parameter.empty, "weighting": "fixed"} | more
    if name == "loss_and_grads":
        names, options = parameters(loss_fn or "info_nce")
        return names, {k: v for k, v in options.items() if k != "return_lse"}
    if name == "ContrastiveLoss":
        _, options = parameters("info_nce")
        return ["text_emb", "image_emb", "negative_embs"], {"temp": 0.1} | {
            k: v for k, v in options.items() if k != "temperature"
        }
    if name == "PerceptualLoss":
        taken = inspect.signature(fastloss.PerceptualLoss).parameters
        left_out = ("backbones", "layers", "pretrained", "lin_weights")  # of named networks
        own = {k: p.default for k, p in taken.items() if k not in left_out}
        return ["image", "image_pred"], own | {"pairwise": False, "encoded": False}
    taken = inspect.signature(getattr(fastloss, name)).parameters
    keywords = {p.name: p.default for p in taken.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    of_ranks = ("group", "exchange")  # tests/distributed
    return [p for p in taken if p not in keywords], {k: v for k, v in keywords.items() if k not in of_ranks}


def all_parameters() -> set[str]:
    """Every word that an error may begin with: the names of parameters, and the classes'."""
    found = {*fastloss.__all__, "parts", "steps", "weighting", "last_layer", "reference", "backbones", "log_variance",
             "period", "alpha", "beta", "tau", "seed", "max_ratio", "mean", "std"}  # fmt: skip
    for name in fastloss.__all__:
        item = getattr(fastloss, name)
        if callable(item):
            found |= set(inspect.signature(item).parameters)
            found |= set(inspect.signature(getattr(item, "forward", item)).parameters)
    return found


def given(name: str, form: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as they are passed: to a module, what is learned has to be a Parameter."""
    if form == "function" and name != "ContrastiveLoss":
        return options
    return {k: nn.Parameter(v.detach()) if isinstance(v, Tensor) and v.requires_grad else v for k, v in options.items()}


def function(name: str, form: str, exact: bool) -> Callable:
    """What `call` calls: (args, options) -> outputs."""
    if name == "ContrastiveLoss" and exact:  # what it is the module of: that takes tensors with a graph
        return lambda *args, temp=0.1, **options: fastloss.info_nce(*args, temperature=temp, **options)
    if name in SPECIAL:
        more = {"exact": exact} if name in ("CompositeLoss", "PerceptualLoss") and exact else {}
        return functools.partial(SPECIAL[name], **more) if more else SPECIAL[name]
    if form == "function" or module_of(name) is None:
        return getattr(fastloss, name)

    def through_module(*args: Any, **options: Any) -> Any:
        module = getattr(fastloss, str(module_of(name)))(**options)
        module = (
            copy.deepcopy(module)
            if form == "copied" and not any(p.requires_grad for p in module.parameters())
            else module
        )
        return module(*args)

    return through_module


def call(name: str, *args: Any, form: str = "function", **options: Any) -> Any:
    """A drawn call again, pasted by hand."""
    return function(name, form, exact=False)(*args, **given(name, form, options))


def flat(out: Any, name: str = "out") -> list[tuple[str, Tensor]]:
    """The tensors of what was returned, each with where it stands."""
    if isinstance(out, Tensor):
        return [(name, out)]
    if dataclasses.is_dataclass(out):
        out = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    if hasattr(out, "_fields"):
        return [pair for field in out._fields for pair in flat(getattr(out, field), field)]
    if isinstance(out, dict):
        return [pair for key in out for pair in flat(out[key], f"{name}[{key!r}]")]
    if isinstance(out, (list, tuple)):
        return [pair for i, item in enumerate(out) for pair in flat(item, f"{name}[{i}]")]
    return []


def detached(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach(), tree)
