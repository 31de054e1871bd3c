"""Perceptual loss: the distance of two images in the features of one or several frozen networks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core import check_reduction, result_dtype
from ..core.checks import (
    as_plain,
    check_choice,
    check_flag,
    check_same_device,
    check_same_length,
    check_same_shape,
    check_tensor,
    is_sequence,
)
from ..core.entry import TORCH_NAMES, public_function
from ..core.traced import at_most
from .backbones import LPIPS_TAPS, Backbone
from .checks import Targets, check_encoded
from .criteria import (
    CRITERIA,
    Criterion,
    LpipsWeights,
    checked_options,
    criterion_distance,
    gradient_counts,
    make_lins,
)
from .execution import Execution, in_pieces
from .frozen import FrozenNetworks
from .normalisation import affine, normalisation, numbers_or_none, range_of
from .scale import ScaleBack, ScaleUp, base_of
from .vision_features import VisionFeatures, names_a_library

NAMED = (Backbone, VisionFeatures)  # their taps have names, and their images three channels


class _Call(nn.Module):
    """A plain callable among the backbones."""

    def __init__(self, fn: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, image: Tensor) -> Sequence[Tensor]:
        return self.fn(image)

    def extra_repr(self) -> str:
        return getattr(self.fn, "__name__", repr(self.fn))


class PerceptualLoss(FrozenNetworks):
    r"""Distance of two images in the features of frozen networks: target first, gradient to the prediction only.

    .. math:: L(x, \hat x) = \sum_b \lambda_b \sum_i w_{b,i} \cdot \mathrm{mean}\,|\phi_{b,i}(\hat x) - \phi_{b,i}(x)|

    The networks are frozen. They are no submodules: the parameters, modules and state dict of a model that holds this
    loss do not have them, so that ``model.train()``, ``model.requires_grad_(True)``, ``model.apply(init)``, optimizers,
    averages of weights and DistributedDataParallel pass them by, and models with and without their loss load each
    other's checkpoints strictly. They are ``loss.backbones`` and ``loss.lins``; they move and cast with the module,
    and ``copy.deepcopy``, pickle and ``torch.save(model)`` carry them.

    The features of the target are computed without a graph; ``targets = loss.encode(image)`` keeps them, and
    ``loss(targets, image_pred)`` takes them in place of the image (``encode(image, graph=True)``: the target gets a
    gradient too). ``loss(image, image_pred, pairwise=True)`` gives the
    distances ``[N,M]`` of N targets and M predictions, with each image encoded once (and no reduction).

    Args:
        backbones: a name, a module or callable that maps the normalised image to a list of features, or a list of
            these. Names (from torchvision): vgg11, vgg13, vgg16, vgg19, each also as ``_bn``, alexnet,
            squeezenet1_1, resnet18, resnet50, inception_v3, convnext_tiny; ``"timm:NAME"`` and
            ``"transformers:NAME"``, see :class:`VisionFeatures`. A module is frozen in place: pass a
            ``copy.deepcopy`` of one that is to be trained, or ``lambda x: module(x)``, which is left as it is.
        layers: the taps, for several backbones a list of such lists (None: the default of that backbone): names
            (relu3_3), torchvision's (features.15) or indices into torchvision's ``features`` (15). Nothing after the
            last tap is computed. Defaults: vgg the last ReLU of each of the first three blocks (vgg16: relu1_2,
            relu2_2, relu3_3, the end of ``features[:16]``; with lpips and dists relu4_3 and relu5_3 too); alexnet and
            squeezenet1_1 the taps of lpips; resnet relu, layer1 to layer3; inception_v3 Conv2d_2b_3x3, Conv2d_4a_3x3,
            Mixed_5d, Mixed_6e; convnext_tiny stage1 to stage3. An unknown name raises with the list of those there are.
        layer_weights: :math:`w_i`, one number a layer, for several backbones a list of such lists; None means 1.
        backbone_weights: :math:`\lambda_b`, one number a backbone; None means 1.
        pretrained: True: torchvision's ``IMAGENET1K_V1`` weights (downloaded once); False: random weights; or the path
            of a ``.pth`` or ``.safetensors`` file with torchvision's names. A list gives one for each backbone.
            Callables have their own weights: True and False mean nothing to them.
        criterion: ``"l1"``, ``"l2"``, ``"charbonnier"`` (eps 1e-6) or ``"smooth_l1"`` (beta 1), see
            :func:`feature_distance`; ``"lpips"``, see :func:`lpips_distance`; ``"dists"``, see :func:`dists_distance`,
            with the layers' weights for all their channels; ``"style"``, see :func:`style_distance`.
        criterion_options: options of that function, e.g. of ``"style"`` ``{"criterion": "l2", "normalization":
            "none"}``, of ``"charbonnier"`` ``{"eps": 1e-3}``.
        lin_weights: of ``"lpips"``: None: version 0.1 of the installed lpips package (its files, nothing is imported);
            the path of such a file; a list of tensors, one a layer; False: ones. For several backbones a list of these.
        input_range: the values of black and white in the images. lpips and most GANs: ``(-1, 1)``.
        normalize: bring the images from `input_range` to [0, 1], subtract the mean of ImageNet, divide by its standard
            deviation (which is what lpips does, too); a pair (mean, std), one number a channel: these instead; False:
            give the images to the networks as they are.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value a sample), see :func:`feature_distance`.
        execution: an :class:`Execution`: dtype and memory format of the networks, compilation, pieces of the batch,
            checkpoints.
        save_networks: True: the state dict holds the networks (``backbones.*``) and the LPIPS weights (``lins.*``), and
            loading one needs them, strictly. False: it holds nothing, and such keys of another's (all that versions
            up to 0.1 saved, too) are passed over. Networks of random weights are then as random when one resumes, and
            on every rank: seed them alike, or save them.

    Call:
        ``loss(image, image_pred, *, pairwise=False)``, both ``[N,C,H,W]`` of one shape, float16, bfloat16, float32 or
        float64; C is 3 for the named backbones. The networks compute in the dtype of their weights (or under autocast),
        the distance in float32 (float64 for float64 features), which is the dtype of the result.

    Raises:
        TypeError, ValueError: an argument does not fit; FileNotFoundError: no such weights file; ImportError: a name
            was given and torchvision does not import; RuntimeError: the download of the weights failed.

    Source: Johnson et al., "Perceptual losses for real-time style transfer and super-resolution", ECCV 2016; networks
    and weights: torchvision.

    Example:
        >>> loss = PerceptualLoss(lambda image: [image, 2 * image], normalize=False)
        >>> loss(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)).item()
        3.0
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        backbones: str | Callable | Sequence[str | Callable] = "vgg16",
        layers: Sequence | None = None,
        layer_weights: Sequence | None = None,
        backbone_weights: Sequence[float] | None = None,
        pretrained: bool | str | os.PathLike | Sequence = True,
        criterion: str = "l1",
        lin_weights: Any = None,
        input_range: tuple[float, float] = (0.0, 1.0),
        normalize: bool | tuple[Sequence[float], Sequence[float]] = True,
        reduction: str = "mean",
        execution: Execution | None = None,
        *,
        criterion_options: Mapping[str, Any] | None = None,
        save_networks: bool = False,
    ) -> None:
        super().__init__(save_networks)
        check_choice("criterion", criterion, CRITERIA)
        self.criterion_options = checked_options(criterion, criterion_options)
        check_reduction(reduction)
        if not isinstance(execution, (Execution, type(None))):
            raise TypeError(f"execution: expected an Execution, got {type(execution).__name__}")
        normalize = as_plain(normalize)
        self.criterion, self.reduction, self.normalize = criterion, reduction, normalize is not False
        self.execution = execution or Execution()
        self.input_range = range_of(input_range)
        self._affine = affine(self.input_range, *normalisation(normalize))
        self._register_affine(torch.promote_types(torch.get_default_dtype(), torch.float32))
        several = is_sequence(backbones)  # nn.Sequential is one backbone
        given: list = list(backbones) if several else [backbones]  # type: ignore[arg-type]
        if not given:
            raise ValueError("backbones: expected at least one, got an empty list")
        all_layers = _each("layers", layers, given, several)
        if criterion in ("lpips", "dists"):
            all_layers = [_lpips_taps(*pair) for pair in zip(given, all_layers, strict=True)]
        all_weights = _each("layer_weights", layer_weights, given, several)
        spread = list(pretrained) if is_sequence(pretrained) else [pretrained] * len(given)  # type: ignore[arg-type]
        check_same_length("backbones", given, "pretrained", spread)
        again = self.execution.checkpoint
        made = [_make(*one, again) for one in zip(given, all_layers, spread, strict=True)]
        self.layer_weights = [numbers_or_none("layer_weights", w) for w in all_weights]
        self.backbone_weights = numbers_or_none("backbone_weights", backbone_weights) or [1.0] * len(given)
        check_same_length("backbones", given, "backbone_weights", self.backbone_weights)
        made_lins = make_lins(criterion, lin_weights, made, several)
        for backbone, w, lins in zip(made, self.layer_weights, made_lins, strict=True):
            if isinstance(backbone, NAMED):
                for name, one in (
                    ("layer_weights", w),
                    ("lin_weights", lins() if isinstance(lins, LpipsWeights) else None),
                ):
                    if one is not None:
                        check_same_length("layers", backbone.taps, name, one)
        self.freeze(made, made_lins)
        self.execution.prepare(self.backbones)
        self.eval()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.execution.compiled(self.backbones)

    def _apply(self, fn: Callable, recurse: bool = True) -> PerceptualLoss:
        """Moves and casts, but never rounds the normalisation: float32 at least, float64 with .double()."""
        super()._apply(fn, recurse)
        self._register_affine(result_dtype(self.shift), self.shift.device)
        return self

    def _register_affine(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        for name, values in zip(("shift", "scale"), self._affine, strict=True):  # settings: not in the state dict
            exact = torch.tensor(values, dtype=dtype, device=device)
            self.register_buffer(name, exact.view(1, -1, 1, 1), persistent=False)

    @property
    def _criterion(self) -> Criterion:
        return Criterion(self.criterion, self.__dict__.get("criterion_options", {}))  # not in older pickles

    def encode(self, image: Tensor, *, graph: bool = False) -> Targets:
        """The target's features, for each backbone a list; they may be kept and used again. With a `graph` the image
        gets a gradient through them, but not in float16 networks, which would lose it: ValueError."""
        self._check_image("image", image)
        if check_flag("graph", graph) and self._in_float16(image, image.dtype):
            raise ValueError("graph: networks in float16 scale the gradients of predictions alone; take bfloat16")
        pieces = image.split(self.execution.chunk) if self.execution.chunk else (image,)
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            found = [self._features(piece) for piece in pieces]
        if len(found) == 1:
            return found[0]
        return [[torch.cat(layer) for layer in zip(*lists, strict=True)] for lists in zip(*found, strict=True)]

    @public_function(others=TORCH_NAMES)
    def forward(self, image: Tensor | Targets, image_pred: Tensor, *, pairwise: bool = False) -> Tensor:
        """The loss; `image` is the target, or what :meth:`encode` made of it."""
        pairwise = check_flag("pairwise", pairwise)
        if isinstance(image, Tensor):
            self._check_image("image", image)
            check_tensor("image_pred", image_pred)
            check_same_device("image", image, "image_pred", image_pred)
            if not pairwise or image.shape[1:] != image_pred.shape[1:]:
                check_same_shape("image", image, "image_pred", image_pred)
        else:
            image = check_encoded(image, len(self.backbones))
            self._check_image("image_pred", image_pred)
            check_same_device("image", image[0][0], "image_pred", image_pred)
        if pairwise:
            return self._pairwise(self.encode(image) if isinstance(image, Tensor) else image, image_pred)
        dtype = image_pred.dtype
        if self.execution.chunk is None:
            return self._value(image, image_pred, self.reduction, dtype)

        def piece(part: slice, pred: Tensor) -> Tensor:
            own = image[part] if isinstance(image, Tensor) else [[f[part] for f in features] for features in image]
            return self._value(own, pred, self.reduction, dtype)

        return in_pieces(image_pred, piece, self.execution.chunk, self.reduction)

    def _value(self, image: Tensor | Targets, image_pred: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
        """`dtype`: that of the predictions as they were given, see `_features`."""
        if isinstance(image, Tensor):
            with torch.no_grad():
                image = self._features(image)
        if not self._in_float16(image_pred, dtype):
            return self._distance(image, self._features(image_pred, dtype), reduction)
        pred, token = ScaleBack.apply(image_pred.to(result_dtype(image_pred)))
        features = self._features(pred, dtype)
        return ScaleUp.apply(self._distance(image, features, reduction), token, self._base(features, reduction))

    def _pairwise(self, targets: Targets, image_pred: Tensor) -> Tensor:
        """Row by row: a target beside all predictions."""
        dtype, rows = image_pred.dtype, []
        scaled = self._in_float16(image_pred, dtype)
        token: Any = None
        if scaled:
            image_pred, token = ScaleBack.apply(image_pred.to(result_dtype(image_pred)))
        features = self._features(image_pred, dtype)
        for i in range(targets[0][0].shape[0]):
            row = [[t[i : i + 1].expand(image_pred.shape[0], *t.shape[1:]) for t in one] for one in targets]
            rows.append(self._distance(row, features, "none"))
        found = torch.stack(rows) if rows else image_pred.new_zeros((0, image_pred.shape[0]), dtype=torch.float32)
        return ScaleUp.apply(found, token, self._base(features, "none")) if scaled else found

    def _distance(self, targets: Targets, found: Targets, reduction: str) -> Tensor:
        total: Any = None
        for features, target, weights, lins, weight in zip(
            found, targets, self.layer_weights, self.lins, self.backbone_weights, strict=True
        ):
            own = lins() if isinstance(lins, LpipsWeights) else None
            distance = criterion_distance(self._criterion, features, target, weights, own, reduction)
            total = torch.zeros_like(distance) if total is None else total
            total = torch.add(total, distance, alpha=weight)
        return total

    def _in_float16(self, image: Tensor, dtype: torch.dtype) -> bool:
        """Whether any of the networks computes in float16."""
        device = image.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device) == torch.float16
        return any(self._dtype_of(backbone, image, dtype) == torch.float16 for backbone in self.backbones)

    def _dtype_of(self, backbone: nn.Module, image: Tensor, dtype: torch.dtype) -> torch.dtype:
        """In which a network gets the image: that of its weights; without any, that of the image."""
        weight = next(backbone.parameters(), None)
        if weight is not None:
            return weight.dtype
        plain = torch.promote_types(image.dtype, self.shift.dtype) if self.normalize else dtype
        return self.execution.dtype or plain

    def _base(self, found: Targets, reduction: str) -> float:
        """See `base_of`, of all layers of all networks."""
        counts, weights = [], []
        for features, own, weight in zip(found, self.layer_weights, self.backbone_weights, strict=True):
            counts += gradient_counts(self._criterion, features, reduction)
            weights += [at_most(abs(weight * w)) for w in own or [1.0] * len(features)]
        return base_of(counts, weights)

    def _features(self, image: Tensor, dtype: torch.dtype | None = None) -> Targets:
        """`dtype`: of the image as it was given, where what comes here is wider."""
        dtype = dtype or image.dtype
        if self.normalize:
            wide = torch.promote_types(image.dtype, self.shift.dtype)
            image = (image.to(wide) - self.shift.to(wide)) / self.scale.to(wide)
        if self.execution.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        found = []
        for backbone in self.backbones:
            own = image.to(self._dtype_of(backbone, image, dtype))
            if self.execution.checkpoint and not isinstance(backbone, Backbone) and torch.is_grad_enabled():
                features = checkpoint(backbone, own, use_reentrant=False, preserve_rng_state=False)
            else:
                features = backbone(own)
            if not is_sequence(features) or not all(isinstance(f, Tensor) for f in features):
                raise TypeError(f"backbones: expected each to return a list of tensors, got {type(features).__name__}")
            found.append(list(features))
        return found

    def _check_image(self, name: str, image: Any) -> None:
        check_tensor(name, image, 4)
        if self.normalize:
            check_same_device("the loss", self.shift, name, image)
        channels = self.shift.shape[1] if self.normalize else 3
        by_name = any(isinstance(backbone, NAMED) for backbone in self.backbones)
        if (self.normalize or by_name) and image.shape[1] != channels:
            hint = f"; repeat a grey image: {name}.expand(-1, {channels}, -1, -1)" if image.shape[1] == 1 else ""
            raise ValueError(
                f"{name}: expected {channels} channels, [N,{channels},H,W], got shape {tuple(image.shape)}{hint}"
            )
        if 0 in image.shape[2:]:
            raise ValueError(f"{name}: expected at least one pixel, got shape {tuple(image.shape)}")

    def extra_repr(self) -> str:
        return (
            f"criterion={self.criterion!r}, criterion_options={self._criterion.options}, "
            f"layer_weights={self.layer_weights}, backbone_weights={self.backbone_weights}, "
            f"input_range={self.input_range}, normalize={self.normalize}, reduction={self.reduction!r}, "
            f"execution={self.execution}, save_networks={self.save_networks}\nbackbones={self.backbones!r}"
        )


def _lpips_taps(backbone: Any, layers: Any) -> Any:
    return LPIPS_TAPS.get(backbone) if layers is None and isinstance(backbone, str) else layers


def _make(backbone: Any, layers: Any, pretrained: Any, checkpointed: bool) -> nn.Module:
    if isinstance(backbone, str) and names_a_library(backbone):
        return VisionFeatures(backbone, layers, pretrained=pretrained)
    if isinstance(backbone, str):
        return Backbone(backbone, layers, as_plain(pretrained), checkpointed)
    if not callable(backbone):
        raise TypeError(
            "backbones: expected a name, or a module or callable that returns a list of features, "
            f"got {type(backbone).__name__}"
        )
    if layers is not None:
        raise ValueError(f"layers: only named backbones have named taps; a callable chooses its own, got {layers!r}")
    if not isinstance(as_plain(pretrained), bool):
        raise ValueError(f"pretrained: a callable has its own weights, only a name takes a file; got {pretrained!r}")
    return backbone if isinstance(backbone, nn.Module) else _Call(backbone)


def _each(name: str, value: Any, backbones: list, several: bool) -> list:
    """One entry for each backbone."""
    if value is None:
        return [None] * len(backbones)
    if not several:
        return [value]
    if not is_sequence(value) or any(v is not None and not is_sequence(v) and not isinstance(v, Tensor) for v in value):
        raise TypeError(f"{name}: expected for several backbones one list (or None) for each, got {value!r}")
    check_same_length("backbones", backbones, name, value)
    return list(value)
