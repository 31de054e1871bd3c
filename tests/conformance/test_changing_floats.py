"""Float options that change between calls of a compiled graph: the value is that of the option now, without a
recompilation for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import core
from tests.conformance.cases import CASES, Draw
from tests.conformance.tools import INTERPRETING, first, leaves

VALUES = (0.5, 0.4, 0.3, 0.15, 0.7)
pytestmark = pytest.mark.skipif(INTERPRETING, reason="the compiler is the same for all backends")


def sampled(**of: Callable[[float], float]) -> Callable[[float], dict]:
    return lambda t: {"sampling": fastloss.NegativeSampling(**{name: f(t) for name, f in of.items()})}


def itself(t: float) -> float:
    return t


# By function: how each of its float options follows one number in (0, 1). What needs other options has them.
CONTRASTIVE: dict[str, Callable[[float], dict]] = {
    "temperature": lambda t: {"temperature": t},
    "workspace_mib": lambda t: {"workspace_mib": 100 * t},
}
FLOATS: dict[str, dict[str, Callable[[float], dict]]] = {
    "info_nce": CONTRASTIVE
    | {
        "label_smoothing": lambda t: {"label_smoothing": t},
        "bias": lambda t: {"bias": t},
        "sampling.tau_plus": sampled(tau_plus=lambda t: 0.1 * t),
        "sampling.hardness": sampled(hardness=itself),
        "sampling.margin": sampled(margin=itself),
    },
    "clip_loss": {
        "logit_scale": lambda t: {"logit_scale": 10 * t},
        "logit_bias": lambda t: {"logit_bias": t, "logit_scale": 10.0},
        "label_smoothing": lambda t: {"label_smoothing": t, "logit_scale": 10.0},
        "workspace_mib": lambda t: {"workspace_mib": 100 * t, "logit_scale": 10.0},
    },
    "siglip_loss": {
        "logit_scale": lambda t: {"logit_scale": 10 * t, "logit_bias": -1.0},
        "logit_bias": lambda t: {"logit_bias": -10 * t, "logit_scale": 10.0},
        "workspace_mib": lambda t: {"workspace_mib": 100 * t, "logit_scale": 10.0, "logit_bias": -1.0},
    },
    "supcon_loss": CONTRASTIVE,
    "nt_xent_loss": CONTRASTIVE | {"label_smoothing": lambda t: {"label_smoothing": t}},
    "feature_distance": {
        "weights": lambda t: {"weights": [t, 1.0, 2 * t]},
        "eps": lambda t: {"eps": t, "criterion": "charbonnier"},
        "beta": lambda t: {"beta": t, "criterion": "smooth_l1"},
    },
    "tap": {
        "weight": lambda t: {"weight": t},
        "eps": lambda t: {"eps": t, "criterion": "charbonnier"},
        "beta": lambda t: {"beta": t, "criterion": "smooth_l1"},
    },
    "style_distance": {
        "weights": lambda t: {"weights": [t, 1.0, 0.5]},
        "eps": lambda t: {"eps": t, "criterion": "charbonnier"},
        "beta": lambda t: {"beta": t, "criterion": "smooth_l1"},
    },
    "lpips_distance": {"eps": lambda t: {"eps": t}},
    "dists_distance": {"c1": lambda t: {"c1": t}, "c2": lambda t: {"c2": t}},
    "pixel_loss": {
        "p": lambda t: {"p": 1.2 + t},
        "eps": lambda t: {"eps": t, "p": "charbonnier"},
        "delta": lambda t: {"delta": t, "p": "huber"},
    },
    "ssim_loss": {
        "sigma": lambda t: {"sigma": 1 + t},
        "data_range": lambda t: {"data_range": 1 + t},
        "k1": lambda t: {"k1": 0.1 * t},
        "k2": lambda t: {"k2": 0.1 * t},
    },
    "ms_ssim_loss": {
        "sigma": lambda t: {"sigma": 1 + t, "level_weights": (0.4, 0.6), "window": 5},
        "data_range": lambda t: {"data_range": 1 + t, "level_weights": (0.4, 0.6), "window": 5},
        "k1": lambda t: {"k1": 0.1 * t, "level_weights": (0.4, 0.6), "window": 5},
        "k2": lambda t: {"k2": 0.1 * t, "level_weights": (0.4, 0.6), "window": 5},
        "level_weights": lambda t: {"level_weights": (t, 0.6), "window": 5},
    },
    "image_loss": {
        "pixel": lambda t: {"pixel": (1.2 + t, t), "smoothness": (1, 0.1)},
        "smoothness": lambda t: {"smoothness": (1, t)},
        "ssim": lambda t: {"ssim": t, "ssim_options": {"data_range": 1 + t, "sigma": 1 + t}},
        "pixel_options": lambda t: {"pixel": ("huber", 1.0), "smoothness": (2, t), "pixel_options": {"delta": t}},
    },
    "diversity_loss": {
        "margin": lambda t: {"margin": 5 * t},
        "temperature": lambda t: {"temperature": t, "mode": "softmin"},
        "workspace_mib": lambda t: {"workspace_mib": 100 * t},
        "bank_scale": lambda t: {"bank_scale": 1 + t},
        "bank_shift": lambda t: {"bank_shift": t, "metric": "l2"},
    },
    "mode_seeking_loss": {"eps": lambda t: {"eps": t}, "margin": lambda t: {"margin": t, "form": "dsgan"}},
    "normalized_diversity_loss": {"alpha": lambda t: {"alpha": t}},
    "attention_consistency_loss": {"temperature": lambda t: {"temperature": 1 + t, "inputs": "logits"}},
    "attention_consistency_from_qk": {
        "scale": lambda t: {"scale": t},
        "temperature": lambda t: {"temperature": t},
    },
}
FUNCTIONS = {name: f for name in fastloss.__all__ if inspect.isfunction(f := getattr(fastloss, name))}
MODULES = [m for m in vars(fastloss).values() if inspect.isclass(m) and issubclass(m, core.Loss)]
MODULES.remove(fastloss.ContrastiveLoss)  # an InfoNCELoss with names of its own
OF_OTHERS = {"loss_and_grads", "info", "similar_pairs"}  # run another loss, or make lists, outside of graphs


def arguments(name: str) -> tuple[tuple, list[Tensor]]:
    """Positional arguments of a function of the package, and their tensors that get gradients."""
    if name == "tap":
        feature, target = Draw().normal(2, 3, 4, 4), Draw(seed=1).normal(2, 3, 4, 4)
        return (feature, target), [feature, target]
    case = next(c for c in CASES if c.fn is FUNCTIONS[name])
    args = case.make(Draw(), (2, 3, 9, 9) if name == "ms_ssim_loss" else case.shapes[0])
    return args, leaves(case, args)


def test_every_float_option_is_here():
    for name, fn in FUNCTIONS.items():
        if name in OF_OTHERS:
            continue
        keywords = [p for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
        floats = {p.name for p in keywords if "float" in str(p.annotation)}
        here = {option.partition(".")[0] for option in FLOATS.get(name, {})}
        missing = floats - here - {"layer_weights"} - ({"p"} if name == "smoothness_loss" else set())
        assert not missing, f"{name}: {missing} not in FLOATS"


def loss_of(name: str, args: tuple, options: dict) -> Tensor:
    out = FUNCTIONS[name](*args, **options)
    return (out[1] if name == "tap" else first(out)).sum()


def check(
    fn: Callable[..., Tensor], count: int, wrt: list[Tensor], graphs: int = 2, backend: str = "aot_eager"
) -> None:
    """The compiled function of `count` numbers is the function, in value and gradients, in at most so many graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    for value in VALUES:
        numbers = [value * (1 - 0.01 * i) for i in range(count)]  # no two alike: those would be one input
        both = compiled(*numbers), fn(*numbers)
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
        for mine, wanted in zip(*(torch.autograd.grad(x, wrt, allow_unused=True) for x in both), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made <= graphs, f"{made} graphs for {len(VALUES)} values"


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", FLOATS)
def test_options_change(name: str, backend: str) -> None:
    """Each number is an option, and used once more as the weight of the loss. AOTAutograd sees the ops, of which the
    reference has none."""
    args, wrt = arguments(name)
    for t in wrt:
        t.requires_grad_()
    options = {option: of for option, of in FLOATS[name].items() if option != "workspace_mib"}

    def total(of: list[Callable[[float], dict]]) -> Callable[..., Tensor]:
        def fn(*numbers: float) -> Tensor:
            return sum(t * loss_of(name, args, f(t)) for t, f in zip(numbers, of, strict=True))

        return fn

    compiler = "eager" if backend == "reference" else "aot_eager"
    with core.use_backend(backend if backend == "reference" else None):
        try:
            check(total(list(options.values())), len(options), wrt, backend=compiler)
        except Exception:
            for option, of in options.items():
                try:
                    check(total([of]), 1, wrt, backend=compiler)
                except Exception as error:
                    raise AssertionError(f"{name} under a changing {option}") from error
            raise


@pytest.mark.parametrize("name", [name for name, options in FLOATS.items() if "workspace_mib" in options])
def test_workspace_changes(name: str) -> None:
    """A bound is rounded down to a power of two (traced.at_most), and so has a graph for each of these."""
    args, wrt = arguments(name)
    for t in wrt:
        t.requires_grad_()
    check(lambda t: t * loss_of(name, args, FLOATS[name]["workspace_mib"](t)), 1, wrt, len(VALUES))


@pytest.mark.parametrize("name", [name for name, options in FLOATS.items() if options and name != "tap"])
def test_module_options_change(name: str) -> None:
    """Options of the module form that are set anew between calls, all of them in one graph."""
    args, wrt = arguments(name)
    for t in wrt:
        t.requires_grad_()
    form = next(m for m in MODULES if m.fn is FUNCTIONS[name])
    options = [of for option, of in FLOATS[name].items() if option != "workspace_mib" and "." not in option]
    modules = [form(**of(VALUES[0])) for of in options]

    def total(*modules: torch.nn.Module) -> Tensor:
        out = [module(*args) for module in modules]
        return torch.stack([(x if isinstance(x, Tensor) else x[0]).sum() for x in out]).sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(total, fullgraph=True, backend="eager")
    for value in VALUES:
        for module, of in zip(modules, options, strict=True):
            for option, given in of(value).items():
                setattr(module, option, given)
        torch.testing.assert_close(compiled(*modules), total(*modules), rtol=1e-5, atol=1e-6)
    in_tuples = name in ("ms_ssim_loss", "image_loss")  # those that a module keeps are constants to torch.compile
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= (len(VALUES) if in_tuples else 2)


def test_inductors_caches_return_no_other_value() -> None:
    """The same through the compiler whose caches did."""
    z, labels = Draw().normal(16, 8), torch.arange(16) % 4
    image, image_pred = Draw().uniform(2, 3, 12, 12), Draw(seed=1).uniform(2, 3, 12, 12)

    def total(t: float, w: float) -> Tensor:
        supcon = fastloss.supcon_loss(z, labels, temperature=t)
        clip = w * fastloss.clip_loss(z, z.flip(0), logit_scale=10 * w)
        return torch.stack((supcon, clip, w * fastloss.ssim_loss(image, image_pred, data_range=1 + w)))

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True)
    for value in VALUES:
        torch.testing.assert_close(compiled(value, value / 2), total(value, value / 2), rtol=1e-5, atol=1e-6)
