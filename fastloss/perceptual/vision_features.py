"""Features of vision models of timm and transformers, by block: what people take beside VGG today (DINO, ConvNeXt).

Both libraries are imported on first use only.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import as_plain, check_choice, check_sequence, check_tensor
from .normalisation import IMAGENET, FromImageNet

LIBRARIES = ("timm", "transformers")
TOKENS = ("patch", "class", "all")


class VisionFeatures(nn.Module):
    r"""Features of a vision model's blocks, as a backbone of :class:`PerceptualLoss`.

    ``PerceptualLoss("timm:vit_small_patch14_dinov2", layers=[2, 5, 8, 11])`` makes one with the defaults of the other
    arguments, ``PerceptualLoss(VisionFeatures(...))`` takes all of them.

    Args:
        model: ``"timm:NAME"``, a name or a folder after ``"transformers:"``, or a model of one of these libraries,
            which is frozen in place by the loss.
        layers: the blocks (of a convolutional network: stages) whose output is taken, by number from 0, negative ones
            from the end. None: four at equal distances, the last among them; of four or fewer all.
        pretrained: True: the library's weights (downloaded once); False: random ones; timm also takes a weights file.
            A model is taken as it is.
        tokens: of transformers ``"patch"``, the patches' tokens as maps ``[N,C,h,w]``; ``"class"``, the first token
            ``[N,C,1]``; ``"all"``, ``[N,C,L]``. Convolutional networks have maps only.
        resize: the side, or (height, width), to which images are resized, bicubic and antialiased;
            ``"multiple"``: each side to the nearest multiple of the patches' side; None: they are taken as they are,
            and must be such multiples.

    Call:
        ``features(image)`` with image ``[N,3,H,W]``, normalised by ImageNet's mean and standard deviation as
        :class:`PerceptualLoss` does by default; it is brought to the model's own. Returns the list of features.

    Raises:
        TypeError, ValueError: an argument does not fit; ImportError: the library is not installed; RuntimeError: the
            download of the weights failed.

    Source: timm's ``forward_intermediates``, transformers' ``output_hidden_states``; DINO features as a perceptual
    distance: Oquab et al., "DINOv2", 2023.
    """

    model: Any

    def __init__(
        self,
        model: str | nn.Module,
        layers: Sequence[int] | None = None,
        *,
        pretrained: bool | str | os.PathLike = True,
        tokens: str = "patch",
        resize: int | tuple[int, int] | str | None = None,
    ) -> None:
        super().__init__()
        check_choice("tokens", tokens, TOKENS)
        self.tokens, self.resize = tokens, _checked_resize(resize)
        self.name = model if isinstance(model, str) else type(model).__name__
        self.model = _made(model, pretrained) if isinstance(model, str) else model
        self.library = _library_of(self.model)
        mean, std = _normalisation_of(self.model, self.library)
        self.input = FromImageNet(mean, std)
        self.patch = _patch_of(self.model)
        self.blocks = _blocks_of(self.model, self.library)
        self.taps = _checked_layers(layers, self.blocks, self.name)

    def forward(self, image: Tensor) -> list[Tensor]:
        check_tensor("image", image, 4)
        image = self.input(self._resized(image))
        return self._of_timm(image) if self.library == "timm" else self._of_transformers(image)

    def _resized(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        if self.resize == "multiple":
            size = tuple(max(1, round(n / p)) * p for n, p in zip((height, width), self.patch, strict=True))
        elif self.resize is None:
            size = (height, width)
            if height % self.patch[0] or width % self.patch[1]:
                raise ValueError(
                    f"image: expected sides that are multiples of {self.name}'s patches, {self.patch}, got "
                    f"{(height, width)}; pass VisionFeatures(..., resize='multiple') or a size"
                )
        else:
            size = self.resize  # type: ignore[assignment]
        if size == (height, width):
            return image
        wide = image.to(torch.promote_types(image.dtype, torch.float32))
        return F.interpolate(wide, size, mode="bicubic", antialias=True, align_corners=False).to(image.dtype)

    def _of_timm(self, image: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"indices": list(self.taps), "intermediates_only": True, "stop_early": True}
        if self.tokens == "patch":
            return self.model.forward_intermediates(image, output_fmt="NCHW", **options)
        self._check_has_tokens(hasattr(self.model, "num_prefix_tokens"))
        found = self.model.forward_intermediates(image, output_fmt="NLC", return_prefix_tokens=True, **options)
        return [self._chosen(torch.cat((prefix, patches), 1)) for patches, prefix in found]

    def _of_transformers(self, image: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"output_hidden_states": True}
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            options["interpolate_pos_encoding"] = True
        out = self.model(pixel_values=image, **options)
        maps = getattr(out, "reshaped_hidden_states", None)
        states = maps if maps is not None and self.tokens == "patch" else out.hidden_states
        rows, columns = (n // p for n, p in zip(image.shape[2:], self.patch, strict=True))
        found = []
        for layer in self.taps:
            state = states[layer + len(states) - self.blocks]  # before the first block comes the embedding
            if state.ndim == 4 or self.tokens != "patch":
                self._check_has_tokens(state.ndim == 3 or self.tokens == "patch")
                found.append(state if state.ndim == 4 else self._chosen(state))
            else:
                patches = state[:, state.shape[1] - rows * columns :]
                found.append(patches.transpose(1, 2).unflatten(2, (rows, columns)))
        return found

    def _chosen(self, tokens: Tensor) -> Tensor:
        """[N, L, C] as [N, C, L], or of the first token [N, C, 1]."""
        return (tokens[:, :1] if self.tokens == "class" else tokens).transpose(1, 2)

    def _check_has_tokens(self, there: bool) -> None:
        if not there:
            raise ValueError(f"tokens: {self.name} has maps and no tokens; expected 'patch', got {self.tokens!r}")

    def extra_repr(self) -> str:
        return f"{self.name!r}, layers={self.taps}, tokens={self.tokens!r}, resize={self.resize!r}"


def names_a_library(backbone: str) -> bool:
    return backbone.partition(":")[0] in LIBRARIES and ":" in backbone


def _made(name: str, pretrained: Any) -> nn.Module:
    library, _, own = name.partition(":")
    if library not in LIBRARIES or not own:
        raise ValueError(f"model: expected 'timm:NAME' or 'transformers:NAME', got {name!r}")
    pretrained = as_plain(pretrained)
    try:
        return _made_by_timm(own, pretrained) if library == "timm" else _made_by_transformers(own, pretrained)
    except ModuleNotFoundError as error:
        raise ImportError(f"model: {name!r} needs {library}, which does not import here ({error})") from error
    except OSError as error:  # huggingface_hub's errors are such
        raise RuntimeError(
            f"pretrained: the weights of {name!r} could not be had ({error}); pass pretrained=False for random "
            "weights, or as the model one that is made already"
        ) from error


def _made_by_timm(name: str, pretrained: Any) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]) and not name.startswith("hf"):
        raise ValueError(f"model: timm has no {name!r}; timm.list_models('*dino*') and the like list its names")
    options = {"pretrained": pretrained} if isinstance(pretrained, bool) else {"checkpoint_path": os.fspath(pretrained)}
    try:
        return timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:  # a network of convolutions, which any size fits
        return timm.create_model(name, **options)


def _made_by_transformers(name: str, pretrained: Any) -> nn.Module:
    import transformers

    if not isinstance(pretrained, bool):
        raise ValueError(f"pretrained: a model of transformers takes its folder as the name, got {pretrained!r}")
    if pretrained:
        return transformers.AutoModel.from_pretrained(name)
    return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))


def _library_of(model: Any) -> str:
    if hasattr(model, "forward_intermediates") and hasattr(model, "feature_info"):
        return "timm"
    if hasattr(model, "config") and hasattr(getattr(model, "config", None), "hidden_size") or _is_hub_model(model):
        return "transformers"
    raise TypeError(
        "model: expected 'timm:NAME', 'transformers:NAME', or a model of theirs (with forward_intermediates or a "
        f"config), got {type(model).__name__}"
    )


def _is_hub_model(model: Any) -> bool:
    return hasattr(getattr(model, "config", None), "num_channels")


def _normalisation_of(model: Any, library: str) -> tuple[Sequence[float], Sequence[float]]:
    """The mean and standard deviation that a model was trained with."""
    if library == "timm":
        known = getattr(model, "pretrained_cfg", None) or {}
        return known.get("mean", IMAGENET[0]), known.get("std", IMAGENET[1])
    try:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(model.config.name_or_path)
        return processor.image_mean, processor.image_std
    except Exception:  # a model that is not on disk has none
        return IMAGENET


def _patch_of(model: Any) -> tuple[int, int]:
    """The sides of a patch, (1, 1) of a network that has none."""
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is None:
        size = getattr(getattr(model, "config", None), "patch_size", None)
    size = (size, size) if isinstance(size, int) else size
    return (1, 1) if size is None else (int(size[0]), int(size[1]))


def _blocks_of(model: Any, library: str) -> int:
    if library == "timm":
        return len(model.feature_info)
    config = model.config
    return int(getattr(config, "num_hidden_layers", 0) or len(config.depths))


def _checked_layers(layers: Any, blocks: int, name: str) -> tuple[int, ...]:
    if layers is None:
        count = min(blocks, 4)
        return tuple(blocks * (i + 1) // count - 1 for i in range(count))
    found = []
    for layer in check_sequence("layers", layers, "numbers of blocks"):
        layer = as_plain(layer)
        if isinstance(layer, bool) or not isinstance(layer, int) or not -blocks <= layer < blocks:
            raise ValueError(f"layers: {name} has the blocks 0 to {blocks - 1}, got {layer!r}")
        found.append(layer % blocks)
    if not found or sorted(set(found)) != found:
        raise ValueError(f"layers: expected different blocks in ascending order, got {list(layers)}")
    return tuple(found)


def _checked_resize(resize: Any) -> Any:
    resize = as_plain(resize)
    if resize is None or resize == "multiple":
        return resize
    sides = (resize, resize) if isinstance(resize, int) and not isinstance(resize, bool) else resize
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise ValueError(f"resize: expected None, 'multiple', a side or (height, width) in pixels, got {resize!r}")
    return tuple(sides)
