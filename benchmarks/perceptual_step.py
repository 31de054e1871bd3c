"""The whole perceptual step, network included: `python -m benchmarks.perceptual_step [--device cuda] [--shape ...]`.

Loss and gradient of the predicted images, VGG16 with the same random weights for everybody. `l1` on the taps of the
first three blocks, `lpips` on its five. Who computes it, besides fastloss with its `Execution` options:

    article        vgg16.features as it comes: unfrozen, so the backward makes gradients of the weights too; both
                   images with a graph, all features kept
    basicsr-style  frozen, target without a graph, every tap cloned because the next ReLU is in-place
    piq-style      frozen, target with a graph, mean absolute difference over the pixels, sum over the channels
    torch.compile  frozen, target without a graph, compiled as a whole
    lpips          the lpips package

Values must agree with those of the article's form (piq's with its own formula's) before a time is kept.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.rows import shape_text
from fastloss import Execution, PerceptualLoss

TAPS = {"l1": (3, 8, 15), "lpips": (3, 8, 15, 22, 29)}  # indices into vgg16.features, all ReLUs
COLUMNS = (
    "loss,options,shape,dtype,mode,provider,p20_ms,p50_ms,p80_ms,peak_mib,error,note,device,threads,commit,torch"
).split(",")
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


def makers(criterion: str, device: str) -> dict[str, Callable[[str], Loss]]:
    ours = functools.partial(fastloss_step, criterion=criterion)
    forms = {
        "fastloss": Execution(),
        "fastloss channels_last": Execution(channels_last=True),
        "fastloss chunk=1": Execution(chunk=1),
    }
    if device == "cuda":
        forms["fastloss bfloat16"] = Execution(dtype=torch.bfloat16, channels_last=True)
        forms["fastloss bfloat16 compiled"] = Execution(dtype=torch.bfloat16, channels_last=True, compile=True)
    own = {name: functools.partial(ours, execution=execution) for name, execution in forms.items()}
    if criterion == "lpips":
        return {"lpips": lpips_package, **own}
    rivals = {"article": article, "basicsr-style": basicsr_style, "piq-style": piq_style, "torch.compile": compiled}
    return {**rivals, **own}


def step_of(loss: Loss, inputs: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    wrt = [inputs[1], *getattr(loss, "unfrozen", [])]
    return lambda: torch.autograd.grad(loss(*inputs), wrt)


def draw(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    image = torch.rand(shape)
    pred = (image + 0.1 * torch.randn(shape)).clamp(0, 1)
    return image.to(device), pred.to(device).requires_grad_()


def timed(fn: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure_criterion(criterion: str, args: argparse.Namespace) -> list[dict[str, str]]:
    shape = tuple(int(n) for n in args.shape.split("x"))
    inputs = draw(shape, args.device)
    rows: list[dict[str, str]] = []
    steps: dict[str, Callable[[], Any]] = {}
    truth = None
    for name, make in makers(criterion, args.device).items():
        row = dict(loss="perceptual_step", options=f'{{"criterion": "{criterion}"}}', shape=shape_text(shape),
                   dtype="float32", mode="both", provider=name, note="", device=measure.device_label(args.device),
                   threads=str(torch.get_num_threads()), commit=measure.commit(), torch=torch.__version__)
        rows.append(row)
        try:
            loss = make(args.device)
            value = loss(*inputs).item()
        except (ImportError, RuntimeError) as error:
            row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        truth = value if truth is None else truth
        error = abs(value - truth) / abs(truth)
        row["error"] = f"{error:.1e}" if name != "piq-style" else ""
        if name != "piq-style" and error > (2e-2 if "bfloat16" in name else 1e-4):
            row["note"] = f"wrong: {value} where the first gives {truth}"
            continue
        steps[name] = step_of(loss, inputs)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    stop = time.monotonic() + args.seconds
    while time.monotonic() < stop or len(next(iter(times.values()))) < 3:
        for name, step in steps.items():
            times[name].append(timed(step, args.device))
    for row in rows:
        if row["provider"] in times:
            p20, p50, p80 = measure.quantiles(times[row["provider"]])
            row |= dict(p20_ms=f"{p20:.2f}", p50_ms=f"{p50:.2f}", p80_ms=f"{p80:.2f}")
            row["peak_mib"] = memory(criterion, row["provider"], steps[row["provider"]], args)
    return rows


def memory(criterion: str, provider: str, step: Callable[[], Any], args: argparse.Namespace) -> str:
    """Peak MiB beyond weights and images; on the CPU in a process of its own."""
    if args.device == "cuda":
        return f"{measure.peak_mib(step, 'cuda'):.0f}"
    command = [sys.executable, "-m", "benchmarks.perceptual_step", "--shape", args.shape, "--of", criterion, provider]
    done = subprocess.run(command, capture_output=True, text=True, env=measure.CHILD_ENV, timeout=300)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.perceptual_step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default="4x3x128x128")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each criterion")
    parser.add_argument("--criteria", nargs="+", default=list(TAPS), choices=list(TAPS))
    parser.add_argument("--of", nargs=2, metavar=("CRITERION", "PROVIDER"), help="its peak memory alone")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.of:
        inputs = draw(tuple(int(n) for n in args.shape.split("x")), "cpu")
        loss = makers(args.of[0], "cpu")[args.of[1]]("cpu")
        print(f"{measure.peak_mib(step_of(loss, copy.copy(inputs)), 'cpu'):.0f}")
        return 0
    rows = [row for criterion in args.criteria for row in measure_criterion(criterion, args)]
    for row in rows:
        shown = f"{row.get('p50_ms', ''):>9} ms {row.get('peak_mib', ''):>6} MiB  {row.get('error', '')} {row['note']}"
        print(f"{row['options']:24} {row['provider']:28} {shown}")
    path = args.out / measure.device_folder(args.device) / "perceptual_step.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
