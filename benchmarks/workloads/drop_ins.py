"""Other libraries' losses as their READMEs and examples call them, with their classes and with ours.

An example imports the library where it is made, as a user's file does, so that inside `fastloss.patch` it gets ours. It
gives the call and the tensors that the call is differentiated by. Sizes are those of the library's own text, named in
`source`; networks have random weights, for none can be downloaded while something is timed.
"""

from __future__ import annotations

import contextlib
import json
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import fastloss
from benchmarks.workloads.items import shape_of
from tests.conformance.cases import Draw

Made = tuple[Callable[[], Any], list[Tensor]]


class Example(NamedTuple):
    """One call of a library's loss."""

    library: str  # as in fastloss.compat.LIBRARIES
    loss: str
    shape: str
    source: str  # of the size
    make: Callable[[Draw, tuple[int, ...]], Made]


EXAMPLES: list[Example] = []


def example(library: str, loss: str, shape: str, source: str) -> Callable:
    def register(make: Callable[[Draw, tuple[int, ...]], Made]) -> Callable:
        EXAMPLES.append(Example(library, loss, shape, source, make))
        return make

    return register


def unit(draw: Draw, *shape: int) -> Tensor:
    return nn.functional.normalize(draw.normal(*shape), dim=-1)


def number(draw: Draw, value: float) -> Tensor:
    return torch.tensor(value, dtype=draw.dtype, device=draw.device)


def images(draw: Draw, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A target and a noisy prediction of it, in [0, 1]."""
    target = draw.uniform(*shape)
    return target, (target + 0.1 * draw.normal(*shape)).clamp(0, 1)


def layers_of(name: str) -> nn.Sequential:
    """The features of torchvision's network, random, the same each time."""
    from torchvision import models

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "vgg16":  # without its classifier, 470 MiB
            return models.vgg.make_layers(models.vgg.cfgs["D"])
        return getattr(models, name)(weights=None).features


@example("open_clip", "ClipLoss", "320x512", "README: `--batch-size 320`; the width of ViT-B-32")
def _(draw, shape):
    from open_clip.loss import ClipLoss

    image, text, scale = unit(draw, *shape), unit(draw, *shape), number(draw, 14.3)
    loss = ClipLoss()
    return lambda: loss(image, text, scale), [image, text, scale]


@example("open_clip", "SigLipLoss", "320x512", "the same")
def _(draw, shape):  # noqa: F811
    from open_clip.loss import SigLipLoss

    image, text = unit(draw, *shape), unit(draw, *shape)
    scale, bias = number(draw, 10.0), number(draw, -10.0)
    loss = SigLipLoss()
    return lambda: loss(image, text, scale, bias), [image, text, scale, bias]


@example("lpips", 'LPIPS(net="alex")', "1x3x64x64", "README: `torch.zeros(1,3,64,64)`")
def _(draw, shape):  # noqa: F811
    return _lpips(draw, shape, "alex", "alexnet")


@example("lpips", 'LPIPS(net="vgg")', "1x3x64x64", "the same")
def _(draw, shape):  # noqa: F811
    return _lpips(draw, shape, "vgg", "vgg16")


def _lpips(draw: Draw, shape: tuple[int, ...], net: str, name: str) -> Made:
    import lpips

    network = types.SimpleNamespace(features=layers_of(name))
    with mock.patch.object(lpips.pretrained_networks.tv, name, lambda *a, **k: network):
        loss = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).to(draw.device, draw.dtype)
    target, pred = images(draw, shape)
    return lambda: loss(pred, target, normalize=True), [pred]


@example("piq", "SSIMLoss", "4x3x256x256", "README: `torch.rand(4, 3, 256, 256)`")
def _(draw, shape):  # noqa: F811
    from piq import SSIMLoss

    (target, pred), loss = images(draw, shape), SSIMLoss(data_range=1.0)
    return lambda: loss(pred, target), [pred]


@example("piq", "MultiScaleSSIMLoss", "4x3x256x256", "the same")
def _(draw, shape):  # noqa: F811
    from piq import MultiScaleSSIMLoss

    (target, pred), loss = images(draw, shape), MultiScaleSSIMLoss(data_range=1.0)
    return lambda: loss(pred, target), [pred]


@example("piq", "TVLoss", "4x3x256x256", "the same")
def _(draw, shape):  # noqa: F811
    from piq import TVLoss

    (_, pred), loss = images(draw, shape), TVLoss()
    return lambda: loss(pred), [pred]


@example(
    "torchmetrics", "StructuralSimilarityIndexMeasure", "3x3x256x256", "its docstring: `torch.rand([3, 3, 256, 256])`"
)
def _(draw, shape):  # noqa: F811
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    (target, pred), metric = images(draw, shape), StructuralSimilarityIndexMeasure(data_range=1.0)
    return lambda: metric(pred, target), [pred]


@example("torchmetrics", "multiscale_structural_similarity_index_measure", "3x3x256x256", "the same")
def _(draw, shape):  # noqa: F811
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    target, pred = images(draw, shape)
    return lambda: ms_ssim(pred, target, data_range=1.0), [pred]


@example("torchmetrics", "total_variation", "5x3x28x28", "its docstring's images")
def _(draw, shape):  # noqa: F811
    from torchmetrics.functional.image import total_variation

    _, pred = images(draw, shape)
    return lambda: total_variation(pred), [pred]


@example("kornia", "SSIMLoss", "1x3x256x256", "README: an image of 256 x 256")
def _(draw, shape):  # noqa: F811
    from kornia.losses import SSIMLoss

    (target, pred), loss = images(draw, shape), SSIMLoss(11)
    return lambda: loss(pred, target), [pred]


@example("kornia", "TotalVariation", "1x3x256x256", "the same")
def _(draw, shape):  # noqa: F811
    from kornia.losses import TotalVariation

    (_, pred), loss = images(draw, shape), TotalVariation()
    return lambda: loss(pred), [pred]


@example("pytorch_msssim", "SSIM", "20x3x256x256", "its tests/tests_cuda.py, which times it")
def _(draw, shape):  # noqa: F811
    from pytorch_msssim import SSIM

    (target, pred), loss = images(draw, shape), SSIM(data_range=1.0)
    return lambda: loss(target, pred), [target, pred]


@example("pytorch_msssim", "MS_SSIM", "20x3x256x256", "the same")
def _(draw, shape):  # noqa: F811
    from pytorch_msssim import MS_SSIM

    (target, pred), loss = images(draw, shape), MS_SSIM(data_range=1.0)
    return lambda: loss(target, pred), [target, pred]


@example("basicsr", "L1Loss", "16x3x128x128", "train_MSRResNet_x4.yml: 16 patches of 128 x 128")
def _(draw, shape):  # noqa: F811
    from basicsr.losses.basic_loss import L1Loss

    (target, pred), loss = images(draw, shape), L1Loss()
    return lambda: loss(pred, target), [pred]


@example("basicsr", "CharbonnierLoss", "16x3x128x128", "the same")
def _(draw, shape):  # noqa: F811
    from basicsr.losses.basic_loss import CharbonnierLoss

    (target, pred), loss = images(draw, shape), CharbonnierLoss()
    return lambda: loss(pred, target), [pred]


@example(
    "pytorch_metric_learning",
    "NTXentLoss",
    "256x128",
    "its MNIST example's batch; 4 rows a class",
)
def _(draw, shape):  # noqa: F811
    from pytorch_metric_learning.losses import NTXentLoss

    return _by_labels(draw, shape, NTXentLoss(temperature=0.07))


@example("pytorch_metric_learning", "SupConLoss", "256x128", "the same")
def _(draw, shape):  # noqa: F811
    from pytorch_metric_learning.losses import SupConLoss

    return _by_labels(draw, shape, SupConLoss(temperature=0.1))


def _by_labels(draw: Draw, shape: tuple[int, ...], loss: nn.Module) -> Made:
    embeddings = draw.normal(*shape)
    labels = torch.arange(len(embeddings), device=embeddings.device) % (len(embeddings) // 4)
    return lambda: loss(embeddings, labels), [embeddings]


@example("lightly", "NTXentLoss", "128x128", "README: SimCLR with `batch_size=128` and a projection of 128")
def _(draw, shape):  # noqa: F811
    from lightly.loss import NTXentLoss

    return _views(draw, shape, NTXentLoss(temperature=0.5))


@example("lightly", "NTXentLoss(memory_bank_size=(4096, 128))", "256x128", "its MoCo example")
def _(draw, shape):  # noqa: F811
    from lightly.loss import NTXentLoss

    with torch.random.fork_rng():  # the bank's first rows
        torch.manual_seed(0)
        loss = NTXentLoss(memory_bank_size=(4096, shape[1])).to(draw.device, draw.dtype)
    return _views(draw, shape, loss)


@example("lightly", "DCLLoss", "128x128", "as NTXentLoss, of which its README calls it a variant")
def _(draw, shape):  # noqa: F811
    from lightly.loss import DCLLoss

    return _views(draw, shape, DCLLoss())


def _views(draw: Draw, shape: tuple[int, ...], loss: nn.Module) -> Made:
    views = [draw.normal(*shape), draw.normal(*shape)]
    return lambda: loss(*views), views


@example("sentence_transformers", "MultipleNegativesRankingLoss", "64x768", "64 triplets, as its training on NLI")
def _(draw, shape):  # noqa: F811
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    columns = [draw.normal(*shape) for _ in range(3)]
    loss = MultipleNegativesRankingLoss(nn.Identity())  # in place of the encoder
    return lambda: loss([{"sentence_embedding": column} for column in columns], None), columns


@example("info_nce", "InfoNCE", "32x128", "README: `batch_size, embedding_size = 32, 128`")
def _(draw, shape):  # noqa: F811
    from info_nce import InfoNCE

    query, key, loss = draw.normal(*shape), draw.normal(*shape), InfoNCE()
    return lambda: loss(query, key), [query, key]


@example("info_nce", 'InfoNCE(negative_mode="unpaired")', "32x128", "README: the same with 48 negatives")
def _(draw, shape):  # noqa: F811
    from info_nce import InfoNCE

    query, key, negatives = draw.normal(*shape), draw.normal(*shape), draw.normal(48, shape[1])
    loss = InfoNCE(negative_mode="unpaired")
    return lambda: loss(query, key, negatives), [query, key, negatives]


@example("fused_ssim", "fused_ssim", "5x5x1080x1920", "its tests/test.py, which times it")
def _(draw, shape):  # noqa: F811
    from fused_ssim import fused_ssim

    target, pred = images(draw, shape)
    return lambda: fused_ssim(pred, target), [pred]


@example("siglip_kernel", "fused_siglip_loss", "4096x768", "a batch of ours; it needs a GPU")
def _(draw, shape):  # noqa: F811
    from siglip_kernel import fused_siglip_loss

    image, text = unit(draw, *shape), unit(draw, *shape)
    log_scale, bias = number(draw, 2.3), number(draw, -10.0)
    return lambda: fused_siglip_loss(image, text, log_scale, bias), [image, text]


@example("taming", "LPIPS", "12x3x256x256", "configs/imagenet_vqgan.yaml: 12 images of 256 x 256")
def _(draw, shape):  # noqa: F811
    from taming.modules.losses.lpips import LPIPS

    (target, pred), loss = images(draw, shape), LPIPS().eval().to(draw.device, draw.dtype)
    return lambda: loss(pred, target), [pred]


def example_of(row: dict) -> Example:
    """The example of a row of results."""
    options = json.loads(row["options"])
    return next(e for e in EXAMPLES if (e.library, e.loss) == (options["library"], options["loss"]))


def passes_of(
    row: dict, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], Tensor], Callable[[Tensor], Any], list[Tensor]]:
    """The forward of a row's example, its backward, and what it is differentiated by."""
    asked = example_of(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries', of what torch or torchvision has renamed since
        with fastloss.patch(asked.library) if row["provider"] == "fastloss" else contextlib.nullcontext():
            call, wrt = asked.make(Draw(dtype, device), shape_of(row["shape"]))
    for tensor in wrt:
        tensor.requires_grad_()

    def forward() -> Tensor:
        value = call()
        return value if value.ndim == 0 else value.sum()

    return forward, lambda value: torch.autograd.grad(value, wrt), wrt
