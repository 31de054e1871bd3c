"""Who computes a loss: eager PyTorch, torch.compile, fastloss, and other libraries where they are installed.

An adapter says how a library computes what a row asks for: it takes the row's options and gives a function of the row's
inputs, or None where the library has nothing of the kind. Imports are inside, so that a missing library is one row
"absent". A row of `tests/conformance/cases` may bring providers of its own, `extra={"rivals": {name: function}}`.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness.results import RENAMED
from tests.conformance.cases import CASES, Case

Function = Callable[..., torch.Tensor]
AUTOTUNE = "torch.compile max-autotune"
INSTALL = {
    "open_clip": "open_clip_torch",
    "inf_cl": "inf_cl",
    "memeff": "memeff",
    "cut-cross-entropy": "cut-cross-entropy",
    "siglip-kernel": "siglip-kernel",
    "liger-kernel": "liger-kernel",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "lightly": "lightly",
    "info-nce-pytorch": "info-nce-pytorch",
    "lpips": "lpips",
    "piq": "piq",
    "kornia": "kornia",
    "torchmetrics": "torchmetrics",
    "pytorch-msssim": "pytorch-msssim",
    "faiss": "faiss-cpu",
}
ADAPTERS: dict[str, list[tuple[str, bool, Callable[[dict], Function | None]]]] = {}


def known() -> list[str]:
    """The names of all providers, of whatever loss."""
    rivals = {name for case in CASES for name in case.extra.get("rivals", {})}
    adapters = {name for of_loss in ADAPTERS.values() for name, *_ in of_loss}
    return ["fastloss", "eager", "torch.compile", AUTOTUNE, *sorted(rivals | adapters)]


def providers(
    case: Case, options: dict, device: str, asked: list[str] | None = None, autotune: bool = False
) -> dict[str, Function | str]:
    """Name -> function of the case's inputs and options, or the reason why there is none here.

    `eager` is the loss as a user of plain torch writes it. A graph of torch.compile is for this shape alone; `autotune`
    adds one in its mode max-autotune, which takes minutes to compile.
    """
    wanted = lambda name: not asked or name in asked  # noqa: E731
    found: dict[str, Function | str] = {"eager": case.eager}
    if wanted("torch.compile"):
        found["torch.compile"] = torch.compile(case.eager, dynamic=False)
    if (autotune and wanted(AUTOTUNE)) or AUTOTUNE in (asked or ()):
        found[AUTOTUNE] = torch.compile(case.eager, dynamic=False, mode="max-autotune")
    found["fastloss"] = case.fn
    for name, needs_cuda, adapter in ADAPTERS.get(case.name, ()):
        if not wanted(name) or (needs_cuda and device != "cuda"):
            continue
        made = _made(name, adapter, options)
        if made is not None:
            found[name] = made
    found |= {RENAMED.get(name, name): function for name, function in case.extra.get("rivals", {}).items()}
    return {name: function for name, function in found.items() if wanted(name)}


def absent(name: str, error: Exception) -> str:
    return f"absent: {error}; pip install {INSTALL.get(name, name)}"


def version_of(provider: str) -> str:
    """The installed version of the library that a provider is; empty for what is none, or is not installed."""
    try:
        return importlib.metadata.version(INSTALL[provider]) if provider in INSTALL else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _made(name: str, adapter: Callable[[dict], Function | None], options: dict) -> Function | str | None:
    try:
        return adapter(options)
    except Exception as error:  # a library that is there may fail in any way at its import
        return absent(name, error) if isinstance(error, ImportError) else f"failed: {type(error).__name__}: {error}"


def adapter(name: str, *losses: str, cuda: bool = False) -> Callable:
    """Register the decorated adapter as a provider of these losses; `cuda`: it has no CPU form."""

    def register(function: Callable[[dict], Function | None]) -> Callable[[dict], Function | None]:
        for loss in losses:
            ADAPTERS.setdefault(loss, []).append((name, cuda, function))
        return function

    return register


def _only(options: dict, *names: str) -> bool:
    """No option but these is asked for."""
    return not set(options) - set(names)


def _rows(options: dict, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(F.normalize(t, dim=1) if options.get("normalize") else t for t in tensors)


def _both_ways(one: Function) -> Function:
    """The symmetric softmax loss from a linear cross-entropy, `one(rows, columns, labels)`, called both ways."""

    def loss(image, text, **o):
        image, text = _rows(o, image, text)
        labels = torch.arange(len(image), device=image.device)
        return (one(image * o["logit_scale"], text, labels) + one(text * o["logit_scale"], image, labels)) / 2

    return loss


@adapter("torch.nn.functional", "pixel_loss")
def _(options):
    direct = {1: F.l1_loss, 2: F.mse_loss, "huber": F.huber_loss}.get(options.get("p", 2))
    return (lambda image, image_pred, **o: direct(image_pred, image)) if direct and _only(options, "p") else None


@adapter("torchmetrics", "pixel_loss")
def _(options):  # noqa: F811
    from torchmetrics.functional import mean_absolute_error, mean_squared_error

    metric = {1: mean_absolute_error, 2: mean_squared_error}.get(options.get("p", 2))
    return (lambda image, image_pred, **o: metric(image_pred, image)) if metric and _only(options, "p") else None


@adapter("kornia", "smoothness_loss")
def _(options):  # noqa: F811
    from kornia.losses import total_variation

    return (lambda x, **o: total_variation(x, reduction="mean").mean()) if options == {"p": 1} else None


def _per_difference(x: torch.Tensor) -> int:
    """What a sum over an image is divided by for our mean over each axis: the same for both where it is square."""
    if x.shape[-1] != x.shape[-2]:
        raise ValueError("this library sums both axes alike, ours takes the mean of each: they agree on squares only")
    return x[0].numel() // x.shape[-1] * (x.shape[-1] - 1)


@adapter("piq", "smoothness_loss")
def _(options):  # noqa: F811
    from piq import TVLoss

    norm = {1: "l1", 2: "l2_squared"}.get(options.get("p", 1))
    loss = TVLoss(norm_type=norm or "l1", reduction="mean")
    return (lambda x, **o: loss(x) / _per_difference(x)) if norm and _only(options, "p") else None


@adapter("torchmetrics", "smoothness_loss")
def _(options):  # noqa: F811
    from torchmetrics.functional.image import total_variation

    return (lambda x, **o: total_variation(x, reduction="mean") / _per_difference(x)) if options == {"p": 1} else None


@adapter("pytorch-msssim", "ssim_loss of volumes")
@adapter("pytorch-msssim", "ssim_loss")
def _(options):  # noqa: F811
    from pytorch_msssim import ssim

    known = _only(options, "padding", "window", "sigma") and options.get("padding") == "valid"
    window, sigma = options.get("window", 11), options.get("sigma", 1.5)
    return (lambda x, y, **o: 1 - ssim(x, y, data_range=1.0, win_size=window, win_sigma=sigma)) if known else None


@adapter("piq", "ssim_loss")
def _(options):  # noqa: F811
    from piq import ssim

    known = _only(options, "padding", "window", "sigma") and options.get("padding") == "valid"
    more = {"kernel_size": options.get("window", 11), "kernel_sigma": options.get("sigma", 1.5), "downsample": False}
    return (lambda x, y, **o: 1 - ssim(x, y, data_range=1.0, **more)) if known else None


@adapter("open_clip", "clip_loss")
def _(options):  # noqa: F811
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    known = _only(options, "logit_scale", "normalize")
    return (lambda image, text, **o: loss(*_rows(o, image, text), o["logit_scale"])) if known else None


@adapter("inf_cl", "clip_loss", cuda=True)
def _(options):  # noqa: F811
    from inf_cl import cal_flash_loss

    def loss(image, text, **o):
        image, text = _rows(o, image, text)
        more = {"scale": o["logit_scale"], "head_dim": math.gcd(256, image.shape[1])}
        return (cal_flash_loss(image, text, **more).mean() + cal_flash_loss(text, image, **more).mean()) / 2

    return loss if _only(options, "logit_scale", "normalize") else None


@adapter("memeff", "clip_loss", cuda=True)
def _(options):  # noqa: F811
    from memeff import MemoryEfficientCLIPLoss

    if not _only(options, "logit_scale", "normalize", "label_smoothing"):
        return None
    loss = MemoryEfficientCLIPLoss(
        temperature=1 / options["logit_scale"], normalized_inputs=not options.get("normalize"), stable=False,
        label_smoothing=options.get("label_smoothing", 0.0),
    )  # fmt: skip
    return lambda image, text, **o: loss(image, text)


@adapter("cut-cross-entropy", "clip_loss", cuda=True)
def _(options):  # noqa: F811
    from cut_cross_entropy import linear_cross_entropy

    # its default leaves out small gradients; the exact form is what the others compute
    one = _both_ways(lambda rows, columns, labels: linear_cross_entropy(rows, columns, labels, filter_eps=None))
    return one if _only(options, "logit_scale", "normalize") else None


@adapter("liger-kernel", "clip_loss", cuda=True)
def _(options):  # noqa: F811
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    linear = LigerFusedLinearCrossEntropyLoss()
    known = _only(options, "logit_scale", "normalize")
    return _both_ways(lambda rows, columns, labels: linear(columns, rows, labels)) if known else None


@adapter("open_clip", "siglip_loss")
def _(options):  # noqa: F811
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    known = _only(options, "logit_scale", "logit_bias", "normalize")
    return (lambda i, t, **o: loss(*_rows(o, i, t), o["logit_scale"], o.get("logit_bias"))) if known else None


@adapter("siglip-kernel", "siglip_loss", cuda=True)
def _(options):  # noqa: F811
    from siglip_kernel import fused_siglip_loss

    def loss(image, text, **o):
        image, text = _rows(o, image, text)
        scale, bias = (torch.full((), float(x), device=image.device) for x in (o["logit_scale"], o["logit_bias"] or 0))
        return fused_siglip_loss(image, text, scale.log(), bias)

    return loss if _only(options, "logit_scale", "logit_bias", "normalize") else None


@adapter("siglip-kernel", "siglip_loss with groups", cuda=True)
def _(options):  # noqa: F811
    from siglip_kernel import fused_siglip_plus_loss

    def loss(image, text, image_groups, text_groups, **o):
        image, text = _rows(o, image, text)
        scale, bias = (torch.full((), float(x), device=image.device) for x in (o["logit_scale"], o["logit_bias"] or 0))
        form = {"symmetric": o.get("symmetric", True), "soft_label": o.get("soft_labels", False)}
        mean = fused_siglip_plus_loss(image, text, scale.log(), bias, img_gid=image_groups, txt_gid=text_groups, **form)
        return mean * text.shape[0]  # theirs is over all pairs

    return loss


@adapter("info-nce-pytorch", "info_nce")
def _(options):  # noqa: F811
    from info_nce import info_nce

    known = _only(options, "temperature")
    return (lambda query, key, **o: info_nce(query, key, temperature=o.get("temperature", 0.1))) if known else None


@adapter("info-nce-pytorch", "info_nce own negatives", "info_nce shared negatives")
def _(options):  # noqa: F811
    from info_nce import info_nce

    def loss(query, key, negatives, **o):
        mode = "paired" if negatives.ndim == 3 else "unpaired"
        return info_nce(query, key, negatives, temperature=o.get("temperature", 0.1), negative_mode=mode)

    return loss if _only(options, "temperature") else None


@adapter("pytorch-metric-learning", "nt_xent_loss")
def _(options):  # noqa: F811
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    loss = SelfSupervisedLoss(NTXentLoss(temperature=options.get("temperature", 0.1)))
    return (lambda a, b, **o: loss(a, b)) if _only(options, "temperature") else None


@adapter("lightly", "nt_xent_loss")
def _(options):  # noqa: F811
    from lightly.loss.ntx_ent_loss import NTXentLoss

    loss = NTXentLoss(temperature=options.get("temperature", 0.1))
    return (lambda a, b, **o: loss(a, b)) if _only(options, "temperature") else None


@adapter("pytorch-metric-learning", "supcon_loss")
def _(options):  # noqa: F811
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=options.get("temperature", 0.1))
    return (lambda features, labels, **o: loss(features, labels)) if _only(options, "temperature") else None


def _of_rows(metric: str, generated: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """diversity_loss of images and the bank rows beside them."""
    if metric == "cosine":
        return F.cosine_similarity(generated, bank).mean() - 1
    return -(F.l1_loss if metric == "l1" else F.mse_loss)(generated, bank)


def _searched(search: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[dict], Function | None]:
    """diversity_loss by the search of a library, `search(metric, generated, bank)`: the rows that it finds."""

    def made(options: dict) -> Function | None:
        metric = options.get("metric", "l1")

        def loss(generated, bank, **o):
            generated, bank = generated.flatten(1), bank.flatten(1)
            with torch.no_grad():
                both = (F.normalize(t) if metric == "cosine" else t for t in (generated, bank))
                rows = search(metric, *both)
            return _of_rows(metric, generated, bank[rows])

        return loss if _only(options, "metric") else None

    return made


def _by_cdist(metric, generated, bank):
    if metric == "cosine":
        return (generated @ bank.T).argmax(1)
    return torch.cdist(generated, bank, p=1 if metric == "l1" else 2).argmin(1)


@adapter("torch.cdist", "diversity_loss")
def _(options):  # noqa: F811
    """The search, or all distances in a matrix, by cdist or a product."""
    mode, metric = options.get("mode", "nearest"), options.get("metric", "l1")
    if mode == "nearest":
        return _searched(_by_cdist)(options)

    def loss(generated, bank, temperature=0.01, **o):
        generated, bank = generated.flatten(1), bank.flatten(1)
        if metric == "cosine":
            distances = 1 - F.normalize(generated) @ F.normalize(bank).T
        elif metric == "l1":
            distances = torch.cdist(generated, bank, p=1) / generated.shape[1]
        else:
            distances = torch.cdist(generated, bank).square() / generated.shape[1]
        if mode == "mean":
            return -distances.mean()
        return temperature * (torch.logsumexp(-distances / temperature, 1) - math.log(len(bank))).mean()

    return loss if _only(options, "mode", "metric", "temperature") else None


@adapter("faiss", "diversity_loss")
def _(options):  # noqa: F811
    import faiss

    kinds = {"l1": faiss.METRIC_L1, "l2": faiss.METRIC_L2, "cosine": faiss.METRIC_INNER_PRODUCT}

    def search(metric, generated, bank):
        faiss.omp_set_num_threads(torch.get_num_threads())
        _, rows = faiss.knn(*(t.float().cpu().numpy() for t in (generated, bank)), 1, metric=kinds[metric])
        return torch.from_numpy(rows[:, 0]).to(generated.device)

    return _searched(search)(options)
