"""How many Triton kernels a first step of each loss compiles, and which a change of shape adds, as JSON.

    python -m tests.triton.compilations [--compile] [loss ...] | --warmup     in the environment of stub_driver.build

What is counted are the kernels that Triton has no compiled form of, forward and backward together, in the order of the
steps of a loss. Without --compile none is compiled: the count is that of Triton's own keys, and it takes seconds.
With --warmup: what fastloss.warmup compiles, really, and what is left for the step after it.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.triton import stub_driver

LIBRARY = stub_driver.install()

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import fastloss  # noqa: E402

Shape = tuple[int, ...]
Step = tuple[Callable[[], Tensor], list[Tensor]]  # a loss, and what it is differentiated by


class _Nothing:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        pass

    def run(self, *args: Any) -> None:
        pass


found: list[str] = []  # names of the kernels that were compiled


def count_compilations(really: bool) -> None:
    original = JITFunction._do_compile

    def compiled(self: Any, key: str, signature: Any, device: int, *rest: Any) -> Any:
        found.append(self.fn.__name__)
        if really:
            return original(self, key, signature, device, *rest)
        kernels, *_ = self.device_caches[device]
        kernels[key] = _Nothing()
        return kernels[key]

    JITFunction._do_compile = compiled


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape).to(dtype).requires_grad_()


def of_images(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Shape], Step]:
    def step(shape: Shape) -> Step:
        image, pred = torch.rand(shape), leaf(*shape)
        return lambda: loss(image, pred), [pred]

    return step


def of_pairs(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Shape], Step]:
    def step(shape: Shape) -> Step:
        one, other = (leaf(*shape, dtype=torch.bfloat16) for _ in range(2))
        return lambda: loss(one, other), [one, other]

    return step


def smoothness_with_all(image: Tensor, pred: Tensor) -> Tensor:
    return fastloss.smoothness_loss(pred, guide=image, weight=image[:, :1])


def supcon(features: Tensor, other: Tensor) -> Tensor:
    labels = torch.arange(len(features)) // 2
    return fastloss.supcon_loss(features, labels, temperature=0.1) + 0 * other.sum()


def clip_of_learned_scale(image: Tensor, text: Tensor) -> Tensor:
    scale = torch.tensor(10.0, requires_grad=True)
    return fastloss.clip_loss(image, text, logit_scale=scale, normalize=True)


def info_nce_bank(query: Tensor, key: Tensor) -> Tensor:
    return fastloss.info_nce(query, key, torch.ones(4096, query.shape[1], dtype=query.dtype))


def info_nce_own(query: Tensor, key: Tensor) -> Tensor:
    return fastloss.info_nce(query, key, torch.ones(*query.shape[:1], 32, *query.shape[1:], dtype=query.dtype))


def siglip(image: Tensor, text: Tensor) -> Tensor:
    return fastloss.siglip_loss(image, text, logit_scale=10.0, logit_bias=-10.0)


def of_maps(shape: Shape) -> Step:
    a, b = leaf(*shape), leaf(*shape)
    return lambda: fastloss.attention_consistency_loss(a, b, inputs="logits"), [a, b]


def of_queries_and_keys(causal: bool) -> Callable[[Shape], Step]:
    def step(shape: Shape) -> Step:
        sides = [leaf(*shape, dtype=torch.bfloat16) for _ in range(4)]
        return lambda: fastloss.attention_consistency_from_qk(*sides, causal=causal), sides

    return step


def of_layers(loss: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Callable[[Shape], Step]:
    """VGG16's five layers of images of a size."""

    def step(shape: Shape) -> Step:
        images, height, width = shape
        sizes = [(images, 64 << min(i, 3), max(height >> i, 1), max(width >> i, 1)) for i in range(5)]
        features, targets = [leaf(*size) for size in sizes], [torch.rand(size) for size in sizes]
        return lambda: loss(features, targets), features

    return step


def lpips(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    return fastloss.lpips_distance(features, targets, [torch.rand(f.shape[1]) for f in features]).sum()


class Steps(NamedTuple):
    make: Callable[[Shape], Step]
    shapes: dict[str, Shape]  # the first step's and, by what has changed, those after it


BATCHES = {"first": (2048, 64), "last batch of 1999": (1999, 64), "of 1537": (1537, 64), "of 1536": (1536, 64)}
SMALL = {"first": (512, 64), "last batch of 401": (401, 64), "of 400": (400, 64), "of 17": (17, 64)}
IMAGES = {"first": (2, 3, 256, 256), "last batch of 1": (1, 3, 256, 256), "224x320": (2, 3, 224, 320)}
IMAGES |= {"200x300": (2, 3, 200, 300), "512x512": (1, 3, 512, 512), "96x80": (2, 3, 96, 80), "28x28": (2, 3, 28, 28)}
IMAGES |= {"odd, 255x321": (2, 3, 255, 321)}
LAYERS = {"first": (4, 128, 128), "last batch of 3": (3, 128, 128), "192x320": (2, 192, 320), "224x224": (1, 224, 224)}
LAYERS |= {"100x100": (2, 100, 100), "96x80": (2, 96, 80), "last of 1": (1, 96, 80), "odd, 65x33": (2, 65, 33)}
SEQUENCES = {"first": (4, 8, 512, 64), "last batch of 1": (1, 8, 512, 64), "256": (4, 8, 256, 64)}
SEQUENCES |= {"odd, 197": (4, 8, 197, 64), "odd, 51": (3, 8, 51, 64)}
MAPS = {change: (*shape[:3], shape[2]) for change, shape in SEQUENCES.items()}
LOSSES = {
    "pixel_loss": Steps(of_images(fastloss.pixel_loss), IMAGES),
    "pixel_loss, weight": Steps(of_images(lambda x, y: fastloss.pixel_loss(x, y, weight=x[:, :1])), IMAGES),
    "smoothness_loss": Steps(of_images(lambda x, y: fastloss.smoothness_loss(y)), IMAGES),
    "smoothness_loss, guide and weight": Steps(of_images(smoothness_with_all), IMAGES),
    "ssim_loss": Steps(of_images(fastloss.ssim_loss), IMAGES),
    "image_loss": Steps(
        of_images(lambda x, y: fastloss.image_loss(x, y, pixel=(1, 1.0), smoothness=(1, 0.1))[0]), IMAGES),
    "image_loss, ssim": Steps(of_images(lambda x, y: fastloss.image_loss(x, y, pixel=(1, 1.0), ssim=0.1)[0]), IMAGES),
    "feature_distance": Steps(of_layers(fastloss.feature_distance), LAYERS),
    "lpips_distance": Steps(of_layers(lpips), LAYERS),
    "dists_distance": Steps(of_layers(lambda x, y: fastloss.dists_distance(x, y).sum()), LAYERS),
    "attention_consistency_loss": Steps(of_maps, MAPS),
    "attention_consistency_from_qk": Steps(of_queries_and_keys(False), SEQUENCES),
    "attention_consistency_from_qk, causal": Steps(of_queries_and_keys(True), SEQUENCES),
    "clip_loss": Steps(of_pairs(lambda x, y: fastloss.clip_loss(x, y, logit_scale=10.0)), BATCHES),
    "clip_loss, small": Steps(of_pairs(lambda x, y: fastloss.clip_loss(x, y, logit_scale=10.0)), SMALL),
    "clip_loss, learned scale, cosine": Steps(of_pairs(clip_of_learned_scale), BATCHES),
    "info_nce": Steps(of_pairs(fastloss.info_nce), BATCHES),
    "info_nce, bank": Steps(of_pairs(info_nce_bank), SMALL),
    "info_nce, own negatives": Steps(of_pairs(info_nce_own), SMALL),
    "siglip_loss": Steps(of_pairs(siglip), BATCHES),
    "supcon_loss": Steps(of_pairs(supcon), SMALL),
    "nt_xent_loss": Steps(of_pairs(lambda x, y: fastloss.nt_xent_loss(x, y, temperature=0.1)), SMALL),
}  # fmt: skip


def report(names: list[str]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for name in names or LOSSES:
        make, shapes = LOSSES[name]
        for function in kernels_of_ours():
            function.device_caches.clear()
        result[name] = {}
        for change, shape in shapes.items():
            found.clear()
            loss, wrt = make(shape)
            torch.autograd.grad(loss(), wrt)
            result[name][change] = dict(collections.Counter(found))
    return result


def kernels_of_ours() -> list[Any]:
    """The kernels of fastloss that are imported, each once."""
    modules = [m for n, m in list(sys.modules.items()) if n.startswith("fastloss.") and ".kernels" in n]
    return list({id(f): f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)}.values())


def warmup_report() -> dict[str, int]:
    """What warmup says, what was compiled meanwhile, and what by a step and a warmup after it."""
    image, pred = torch.rand(2, 3, 32, 32), leaf(2, 3, 32, 32)
    counts = {"reported": fastloss.warmup(fastloss.pixel_loss, image, pred).kernels, "loaded": len(found)}
    found.clear()
    fastloss.pixel_loss(image, pred).backward()
    counts |= {"step after": len(found), "again": fastloss.warmup(fastloss.pixel_loss, image, pred).kernels}
    return counts


if __name__ == "__main__":
    options = sys.argv[1:]
    count_compilations("--compile" in options or "--warmup" in options)
    names = [option for option in options if not option.startswith("--")]
    print(json.dumps(warmup_report() if "--warmup" in options else {"triton": triton.__version__} | report(names)))
