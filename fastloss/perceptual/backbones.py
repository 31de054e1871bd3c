"""Frozen networks for the perceptual loss: torchvision's by name, cut after the last tap.

torchvision is imported on first use only; everything else in the package works without it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.checks import as_plain, check_sequence
from .normalisation import FromImageNet

Step = tuple[str, str, nn.Module]  # name of the tap, prefix of its weights in torchvision's files, module

_VGG_CONFIGURATIONS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
_VGGS = (*_VGG_CONFIGURATIONS, *(f"{name}_bn" for name in _VGG_CONFIGURATIONS))
_WEIGHTS = "IMAGENET1K_V1"  # there for every network, and a fixed choice: torchvision's DEFAULT may change
_TOO_SMALL = ("is too small", "can't be greater than actual input size", "non-zero size", "strictly positive")

NESTINGS = ("state_dict", "model_state_dict", "model", "params_ema", "params")
_WRAPPERS = ("module.", "_orig_mod.")

DEFAULT_TAPS = {
    "vgg11": ("relu1_1", "relu2_1", "relu3_2"),
    "vgg13": ("relu1_2", "relu2_2", "relu3_2"),
    "vgg16": ("relu1_2", "relu2_2", "relu3_3"),
    "vgg19": ("relu1_2", "relu2_2", "relu3_4"),
    "alexnet": ("relu1", "relu2", "relu3", "relu4", "relu5"),
    "squeezenet1_1": ("relu1", "fire3", "fire5", "fire6", "fire7", "fire8", "fire9"),
    "resnet18": ("relu", "layer1", "layer2", "layer3"),
    "resnet50": ("relu", "layer1", "layer2", "layer3"),
    "inception_v3": ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e"),
    "convnext_tiny": ("stage1", "stage2", "stage3"),
}
LPIPS_TAPS = {"vgg16": ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")}  # where they are not the default
DEFAULT_TAPS |= {f"{name}_bn": DEFAULT_TAPS[name] for name in _VGG_CONFIGURATIONS}
BACKBONES = tuple(sorted(DEFAULT_TAPS))


def _models(name: str) -> Any:
    """torchvision.models, or an error that says why it is missing and how to do without."""
    try:
        import torchvision.models
    except Exception as error:  # beside a torch of another build the import fails with RuntimeError or OSError
        raise ImportError(
            f"backbones: {name!r} needs torchvision, which does not import here ({error}). torchvision's wheel on "
            "PyPI goes with PyPI's CUDA build of torch and does not import beside a CPU-only torch: take both from "
            "the same index, e.g. `pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu`. "
            "Without torchvision, pass any callable that returns a list of features as the backbone"
        ) from error
    return torchvision.models


def _vgg_steps(models: Any, name: str) -> Iterator[Step]:
    """conv1_1, (bn1_1,) relu1_1, ..., pool1, conv2_1, ..., pool5. The classifier is never built."""
    base, _, norm = name.partition("_")
    features = models.vgg.make_layers(models.vgg.cfgs[_VGG_CONFIGURATIONS[base]], batch_norm=norm == "bn")
    block, index = 1, 0
    for position, module in enumerate(features):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            index += 1
            tap = f"conv{block}_{index}"
        elif isinstance(module, nn.MaxPool2d):
            tap = f"pool{block}"
            block, index = block + 1, 0
        else:
            tap = f"{'bn' if isinstance(module, nn.BatchNorm2d) else 'relu'}{block}_{index}"
        yield tap, f"features.{position}", module


def _sequence(names: str, features: nn.Sequential) -> Iterator[Step]:
    for position, (tap, module) in enumerate(zip(names.split(), features, strict=False)):
        yield tap, f"features.{position}", module


def _children(names: str, model: nn.Module) -> Iterator[Step]:
    for tap in names.split():
        yield tap, tap, getattr(model, tap)


def _steps(name: str) -> list[Step]:
    """The whole trunk as a chain of named steps, with random weights."""
    models = _models(name)
    if name in _VGGS:
        return list(_vgg_steps(models, name))
    if name == "inception_v3":
        model = models.inception_v3(weights=None, aux_logits=False, init_weights=False)
        names = (
            "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2 Mixed_5b Mixed_5c "
            "Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c"
        )
        return [("input", "input", FromImageNet((0.5,) * 3, (0.5,) * 3)), *_children(names, model)]
    model = getattr(models, name)(weights=None)
    if name.startswith("resnet"):
        return list(_children("conv1 bn1 relu maxpool layer1 layer2 layer3 layer4", model))
    names = {
        "alexnet": "conv1 relu1 pool1 conv2 relu2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5",
        "squeezenet1_1": "conv1 relu1 pool1 fire2 fire3 pool3 fire4 fire5 pool5 fire6 fire7 fire8 fire9",
        "convnext_tiny": "stem stage1 down2 stage2 down3 stage3 down4 stage4",
    }[name]
    return list(_sequence(names, model.features))


class Backbone(nn.Module):
    """A torchvision trunk up to its last tap: `forward(image)` returns the list of features, in the order of `taps`.

    The image is [N,3,H,W], normalised with ImageNet's mean and standard deviation. In-place ReLUs are made
    out-of-place, so that a tap before one stays what it was. With `checkpointed` a backward runs the steps from one tap
    to the next once more, instead of keeping what is between them.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str | int] | None = None,
        pretrained: bool | str | os.PathLike = True,
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        if name not in DEFAULT_TAPS:
            raise ValueError(
                f"backbones: expected one of {BACKBONES}, 'timm:NAME', 'transformers:NAME', a module or a callable "
                f"that returns a list of features, got {name!r}"
            )
        steps = _steps(name)
        self.name = name
        self.checkpointed = checkpointed
        self.taps = _check_taps(name, layers, [(tap, prefix) for tap, prefix, _ in steps])
        last = max(i for i, (tap, _, _) in enumerate(steps) if tap in self.taps)
        steps = steps[: last + 1]
        if pretrained is not False:
            _load(steps, name, pretrained)
        self.steps = nn.ModuleDict({tap: module for tap, _, module in steps})
        for module in self.steps.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False

    def forward(self, image: Tensor) -> list[Tensor]:
        found, size, names = {}, f"{image.shape[2]} x {image.shape[3]}", list(self.steps)
        start = 0
        for end, tap in enumerate(names, 1):
            if tap not in self.taps:
                continue
            if self.checkpointed and image.requires_grad and torch.is_grad_enabled():
                image = checkpoint(
                    self._run, image, names[start:end], size, use_reentrant=False, preserve_rng_state=False
                )
            else:
                image = self._run(image, names[start:end], size)
            found[tap], start = image, end
        return [found[tap] for tap in self.taps]

    def _run(self, image: Tensor, names: Sequence[str], size: str) -> Tensor:
        for name in names:
            try:
                image = self.steps[name](image)
            except RuntimeError as error:
                if not any(words in str(error) for words in _TOO_SMALL):
                    raise
                raise ValueError(f"image: {size} is too small for {self.name}, at {name}: {error}") from error
        return image

    def extra_repr(self) -> str:
        return f"{self.name!r}, taps={self.taps}"


def _check_taps(name: str, layers: Any, steps: list[tuple[str, str]]) -> tuple[str, ...]:
    """The taps' own names, from these, torchvision's (features.3) or indices into torchvision's `features`."""
    if layers is None:
        return DEFAULT_TAPS[name]
    layers = [as_plain(layer) for layer in check_sequence("layers", layers, "names")]
    known: dict[str | int, str] = {}
    for tap, prefix in steps:
        known |= {tap: tap, prefix: tap}
        if prefix.startswith("features."):
            known[int(prefix.removeprefix("features."))] = tap
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, (str, int)) or layer not in known:
            names = ", ".join(tap for tap, _ in steps)
            raise ValueError(f"layers: {name} has no {layer!r}; the names there are {names}")
    taps = tuple(known[layer] for layer in layers)
    if len(taps) == 0 or len(set(taps)) != len(taps):
        raise ValueError(f"layers: expected one or more different names, got {list(layers)}")
    return taps


def _load(steps: list[Step], name: str, pretrained: Any) -> None:
    """Weights of the steps, from torchvision's download or from a file with torchvision's names."""
    if pretrained is True:
        source, state = f"torchvision's {name} {_WEIGHTS}", _download(name)
    elif isinstance(pretrained, (str, os.PathLike)):
        source, state = os.fspath(pretrained), read_weights(os.fspath(pretrained), "pretrained")
    else:
        raise TypeError(
            "pretrained: expected True (download), False (random weights) or the path of a weights file, "
            f"got {type(pretrained).__name__} {pretrained!r}"
        )
    for _, prefix, module in steps:
        start = f"{prefix}."
        own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            there = "" if own else f"; its names are {', '.join([*state][:4])}, ..."
            raise ValueError(f"pretrained: {source} does not fit {name}: at {prefix}: {error}{there}") from error


def _download(name: str) -> dict[str, Tensor]:
    weights = _models(name).get_model_weights(name)[_WEIGHTS]
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu")
    except (OSError, HTTPException, RuntimeError) as error:  # URLError is an OSError, a wrong hash a RuntimeError
        raise RuntimeError(
            f"pretrained: the weights {weights} of backbone {name!r} could not be had from {weights.url} ({error}). "
            "Pass pretrained=PATH to that file fetched elsewhere (.pth or .safetensors), pretrained=False for random "
            "weights, or as the backbone any callable that returns a list of features"
        ) from error


def read_weights(path: str, argument: str) -> dict[str, Tensor]:
    """The tensors by name of a .pth or .safetensors file; `argument` is whose path it was.

    They may lie under one of `NESTINGS` (or several, one in the other; of several beside one another the first counts,
    so the averaged `params_ema` before `params`), and have the prefix `module.` of DataParallel and
    DistributedDataParallel or `_orig_mod.` of torch.compile.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{argument}: there is no weights file {path!r}")
    read: Callable[[str], Any]
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file as read
        except ImportError as error:
            raise ImportError(f"{argument}: reading {path!r} needs `pip install safetensors`") from error
    else:
        read = _read_pth
    try:
        state = read(path)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{argument}: {path!r} is no readable weights file: {error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # its class is not public; it subclasses Exception only
            raise
        raise ValueError(f"{argument}: {path!r} is no readable weights file: {error}") from error
    return _state_in(state, path, argument)


def _state_in(content: Any, path: str, argument: str) -> dict[str, Tensor]:
    """The state dict that a file holds, itself or under keys that trainers use, without a wrapper's prefix."""
    where = ""
    while not _is_state(content):
        key = next((k for k in NESTINGS if isinstance(content, dict) and isinstance(content.get(k), dict)), None)
        if key is None:
            nestings = ", ".join(map(repr, NESTINGS))
            raise ValueError(
                f"{argument}: {path!r} holds no state dict (names and tensors, at the top or under {nestings}), but "
                f"{_kind_of(content)}{where}"
            )
        content, where = content[key], f"{where or ' under'} {key!r}"
    while prefix := next((p for p in _WRAPPERS if content and all(name.startswith(p) for name in content)), None):
        content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )


def _kind_of(content: Any) -> str:
    """What a file holds instead of a state dict: for a dict its keys, first those that are no tensors."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    keys = sorted(content, key=lambda key: isinstance(content[key], Tensor))
    shown = ", ".join(f"{key!r} ({type(content[key]).__name__})" for key in keys[:8])
    return f"a dict of {shown}{', ...' if len(keys) > 8 else ''}"


def _read_pth(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
