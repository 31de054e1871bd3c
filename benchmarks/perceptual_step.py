"""The whole perceptual step, network included: `python -m benchmarks.perceptual_step [--device cuda] [--shape ...]`.

Loss and gradient of the predicted images, VGG16 with the same random weights for everybody. `l1` on the taps of the
first three blocks, `lpips` on its five. Who computes it, besides fastloss:

    eager          the article's own code, vgg16.features as it comes: unfrozen, so the backward makes gradients of the
                   weights too; both images with a graph, all features kept
    basicsr-style  frozen, target without a graph, every tap cloned because the next ReLU is in-place
    piq-style      frozen, target with a graph, mean absolute difference over the pixels, sum over the channels
    torch.compile  frozen, target without a graph, compiled as a whole
    lpips          the lpips package

Rows with an `execution` among their options are fastloss with that `Execution`. On CUDA everybody runs under autocast
to bfloat16. Values must agree with those of the first (piq's formula is another) before a time is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.memory import Child
from benchmarks.rows import RESULTS, options_text, read, shape_of, write
from fastloss import Execution, PerceptualLoss

TAPS = {"l1": (3, 8, 15), "lpips": (3, 8, 15, 22, 29)}  # indices into vgg16.features, all ReLUs
SHAPES = {"cpu": "4x3x128x128", "cuda": "16x3x256x256"}
EXECUTIONS = {
    "channels_last": Execution(channels_last=True),
    "chunk=1": Execution(chunk=1),
    "bfloat16 channels_last": Execution(dtype=torch.bfloat16, channels_last=True),
    "bfloat16 channels_last compiled": Execution(dtype=torch.bfloat16, channels_last=True, compile=True),
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Loss = Callable[[Tensor, Tensor], Tensor]


def network(criterion: str) -> nn.Sequential:
    """vgg16.features up to the last tap, random, the same each time."""
    import torchvision

    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])[: TAPS[criterion][-1] + 1]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layers.eval()


class Taps(nn.Module):
    """The features as users of plain torch take them."""

    def __init__(self, criterion: str, device: str, frozen: bool, clone: bool, inplace: bool = True) -> None:
        super().__init__()
        self.layers, self.taps, self.clone = network(criterion).to(device), TAPS[criterion], clone
        self.layers.requires_grad_(not frozen)
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = inplace
        self.register_buffer("mean", torch.tensor(MEAN, device=device).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD, device=device).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = (x - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                found.append(x.clone() if self.clone else x)
        return found


def l1(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    return torch.stack([nn.functional.l1_loss(f, t) for f, t in zip(features, targets, strict=True)]).sum()


def article(device: str) -> Loss:
    taps = Taps("l1", device, frozen=False, clone=False)

    def loss(image: Tensor, image_pred: Tensor) -> Tensor:
        taps.zero_grad(set_to_none=True)
        return l1(taps(image_pred), taps(image))

    loss.unfrozen = list(taps.parameters())  # type: ignore[attr-defined]
    return loss


def basicsr_style(device: str) -> Loss:
    taps = Taps("l1", device, frozen=True, clone=True)
    return lambda image, image_pred: l1(taps(image_pred), taps(image.detach()))


def piq_style(device: str) -> Loss:
    taps = Taps("l1", device, frozen=True, clone=False)

    def loss(image: Tensor, image_pred: Tensor) -> Tensor:
        pairs = zip(taps(image_pred), taps(image), strict=True)
        return torch.cat([(f - t).abs().mean((2, 3)) for f, t in pairs], 1).sum(1).mean()

    return loss


def compiled(device: str) -> Loss:
    taps = Taps("l1", device, frozen=True, clone=False, inplace=False)

    @torch.compile
    def loss(image: Tensor, image_pred: Tensor) -> Tensor:
        with torch.no_grad():
            targets = taps(image)
        return l1(taps(image_pred), targets)

    return loss


def lpips_package(device: str) -> Loss:
    import lpips

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that torchvision has renamed since
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(device)
    layers = [m for m in model.net.modules() if isinstance(m, nn.Conv2d)]
    for own, shared in zip(layers, (m for m in network("lpips") if isinstance(m, nn.Conv2d)), strict=True):
        own.load_state_dict(shared.state_dict())
    return lambda image, image_pred: model(image_pred, image, normalize=True).mean()


def fastloss_step(device: str, criterion: str, execution: Execution) -> Loss:
    loss = PerceptualLoss("vgg16", criterion=criterion, pretrained=False, execution=execution)
    values = list(network(criterion).state_dict().values())
    loss.backbones[0].load_state_dict(dict(zip(loss.backbones[0].state_dict(), values, strict=True)))
    return loss.to(device)


def who(criterion: str, device: str) -> list[tuple[dict, str]]:
    """(options, provider) of the rows, the first of which is what the others' values are compared with."""
    rivals = ["lpips"] if criterion == "lpips" else ["eager", "basicsr-style", "piq-style", "torch.compile"]
    forms = [name for name in EXECUTIONS if device == "cuda" or "bfloat16" not in name]
    main = {"criterion": criterion}
    return [(main, name) for name in (*rivals, "fastloss")] + [(main | {"execution": f}, "fastloss") for f in forms]


def make(options: dict, provider: str, device: str) -> Loss:
    if provider == "fastloss":
        return fastloss_step(device, options["criterion"], EXECUTIONS.get(options.get("execution", ""), Execution()))
    forms = {"eager": article, "basicsr-style": basicsr_style, "piq-style": piq_style, "torch.compile": compiled}
    return (forms | {"lpips": lpips_package})[provider](device)


def draw(shape: str, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    image = torch.rand(shape_of(shape))
    pred = (image + 0.1 * torch.randn(image.shape)).clamp(0, 1)
    return image.to(device), pred.to(device).requires_grad_()


def step_of(row: dict, device: str) -> tuple[Callable[[], Any], Callable[[], float]]:
    """The step of a row, and its loss alone."""
    loss = make(json.loads(row["options"]), row["provider"], device)
    inputs = draw(row["shape"], device)
    wrt = [inputs[1], *getattr(loss, "unfrozen", [])]
    half = contextlib.nullcontext if device == "cpu" else functools.partial(torch.autocast, device, torch.bfloat16)

    def value() -> Tensor:
        with half():
            return loss(*inputs)

    return lambda: torch.autograd.grad(value(), wrt), lambda: value().item()


def criterion_of(row: dict) -> str:
    return json.loads(row["options"])["criterion"]


def measure_criterion(criterion: str, shape: str, device: str, seconds: float, child: Child) -> list[dict]:
    dtype = "float32" if device == "cpu" else "bfloat16"
    rows: list[dict] = []
    calls: dict[str, measure.Pass] = {}
    truth = None
    for options, provider in who(criterion, device):
        row = dict(loss="perceptual_step", options=options_text(options), shape=shape, dtype=dtype, mode="step",
                   provider=provider, headline=int("execution" not in options), checked=who(criterion, device)[0][1],
                   note="")  # fmt: skip
        rows.append(row)
        try:
            step, value = step_of(row, device)
            got = value()
        except ImportError as error:
            row["note"] = f"absent: {error}"
            continue
        except Exception as error:
            row["note"] = measure.reason(error)
            continue
        truth = got if truth is None else truth
        if provider != "piq-style":
            error = abs(got / truth - 1)
            row["error"] = f"{error:.1e}"
            if error > TOLERANCE[dtype]:
                row["note"] = f"wrong: relative error {error:.1e}"
                continue
        calls[row["options"] + provider] = (step, lambda out: None)
    times, failed = measure.interleaved(calls, measure.Clock(device, ahead=False), seconds, least=5)
    for row in rows:
        name = row["options"] + row["provider"]
        if name in failed:
            row["note"] = measure.reason(failed[name])
        if name in times:
            p20, p50, p80 = measure.quantiles([forward for forward, _ in times[name]])
            row |= dict(p20_ms=f"{p20:.4f}", p50_ms=f"{p50:.4f}", p80_ms=f"{p80:.4f}")
            if device == "cuda":
                row["peak_mib"] = f"{measure.peak_mib(calls[name][0], device):.1f}"
            else:
                row["peak_mib"] = child.peak(row, row["provider"])[0]
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.perceptual_step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", help="of the images, such as 4x3x128x128")
    parser.add_argument("--seconds", type=float, default=6.0, help="time to spend on each criterion")
    parser.add_argument("--criteria", nargs="+", default=list(TAPS), choices=list(TAPS))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    common = measure.common_columns(args.device)
    path = args.out / measure.device_folder(args.device) / "perceptual_step.csv"
    rows: list[dict] = []
    if path.exists():  # rows of the other criteria stay
        rows += [r for r in read(path) if criterion_of(r) not in args.criteria]
    with Child() as child:
        for criterion in args.criteria:
            shape = args.shape or SHAPES[args.device]
            for row in measure_criterion(criterion, shape, args.device, args.seconds, child):
                figures = f"{row['p50_ms']} ms, {row['peak_mib'] or '-'} MiB" if row.get("p50_ms") else row["note"]
                print(f"  {row['provider']:16}{row['options']:64}{figures}", flush=True)
                rows.append(row | common)
            write(path, sorted(rows, key=lambda r: list(TAPS).index(criterion_of(r))))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
