"""A seed -> a call: inputs, options that fit together, and the way it is called."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.fuzz import targets
from tests.fuzz.drawer import Drawer
from tests.fuzz.inputs import INPUTS
from tests.fuzz.nonsense import spoiled
from tests.fuzz.options import LATER, kind_of
from tests.fuzz.values import PRELUDE, Raw, T, code, replaced

MODES = {"backward": 62, "double": 12, "no_grad": 7, "inference": 5, "nonsense": 14}
INNER = {"info_nce": ("query", "key", "negatives"), "clip_loss": ("image", "text"), "siglip_loss": ("image", "text"),
         "nt_xent_loss": ("view_a", "view_b")}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """One drawn call, as data. `spoiled`: which argument is nonsense and how; `sure`: it must be refused."""

    name: str
    args: tuple
    options: dict[str, Any]
    mode: str = "backward"
    form: str = "function"  # or "module", or "copied"
    backend: str | None = None
    autocast: bool = False
    threads: int = 1
    upstream: float = 1.0
    spoiled: str | None = None
    sure: bool = False
    varied: tuple = ()  # of a compiled call: the options of the calls that follow
    seed: str = ""

    def code(self) -> str:
        """Python that repeats the call."""
        name = f"fastloss.{self.name}(" if self.form == "function" and self.name not in targets.SPECIAL else (
            f"call({self.name!r}, ")  # fmt: skip
        given = [code(a) for a in self.args] + [f"{k}={code(v)}" for k, v in self.options.items()]
        given += [f"form={self.form!r}"] if self.form != "function" else []
        lines = [f"out = {name}{', '.join(given)})"]
        if self.autocast:
            lines = ["with torch.autocast('cpu', torch.bfloat16):", *indented(lines)]
        if self.mode in ("no_grad", "inference"):
            context = {"no_grad": "torch.no_grad()", "inference": "torch.inference_mode()"}[self.mode]
            lines = [f"with {context}:", *indented(lines)]
        if self.backend:
            lines = ["from fastloss.core import use_backend", f"with use_backend({self.backend!r}):", *indented(lines)]
        if self.threads > 1:
            lines = [f"torch.set_num_threads({self.threads})", *lines]
        for options in self.varied:
            changed = ", ".join(f"{k}={code(v)}" for k, v in options.items())
            lines.append(f"# compiled once, then called with {changed}")
        told = f"# {self.seed}: {self.mode}, upstream x{self.upstream:g}" + (
            f", {self.spoiled}" if self.spoiled else ""
        )
        return "\n".join([told, PRELUDE, *lines])


def indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def draw(name: str, seed: int, mode: str | None = None, later: bool = True) -> Call:
    """The case `name:seed`; without the `later` options as before there were any."""
    d = Drawer(f"{name}:{seed}")
    mode = mode or d.rng.choices(list(MODES), list(MODES.values()))[0]
    d.spells = d.spells and mode != "compile"  # numpy's numbers are read, which a graph cannot do
    inner = d.pick(*INNER) if name == "loss_and_grads" else ""
    positional, _ = targets.parameters(name)
    args = INPUTS[INNER[inner] if inner else tuple(positional)](d, inner or name)
    if name == "PerceptualLoss":
        args = three_channels(d, args)
    if inner == "info_nce" and len(args) == 3 and mode == "no_grad":
        args = args[:2]
        d.sizes["columns"] = d.sizes["keys"]
    options = draw_options(d, name, inner)
    settle(d, name, inner, args, options)
    if later:
        args = draw_later(Drawer(f"{name}:{seed}:later"), d.sizes, inner or name, args, options)
    if name == "diversity_loss":
        args = (args[0], dataclasses.replace(args[1], grad=False))
    if d.chance(0.03):
        args = some_in_inference_mode(d, args)
    forms = ("function", "function", "function", "module", "copied")
    call = Call(
        name, args, options, mode if mode != "nonsense" else "backward",
        form=d.pick(*forms) if targets.module_of(name) else "function",
        backend="cpp" if d.chance(0.4) else None,
        autocast=name != "PerceptualLoss" and d.chance(0.04),
        threads=d.rng.choices((1, 2, 3), (85, 10, 5))[0],
        upstream=d.rng.choices((1.0, 65536.0, 2.0**-10), (85, 8, 7))[0],
        seed=f"{name}:{seed}",
    )  # fmt: skip
    if mode == "nonsense":
        return spoiled(d, call)
    return compiled(d, call, inner) if mode == "compile" else call


def three_channels(d: Drawer, args: tuple) -> tuple:
    shape = (d.size(1, 4), 3, d.size(1, 16), d.size(1, 16))
    target = d.tensor(*shape)
    d.sizes = {"shape": shape}
    return target, d.beside(target)


def some_in_inference_mode(d: Drawer, args: tuple) -> tuple:
    """A constant input that was made in inference mode."""
    return replaced(args, lambda t: dataclasses.replace(t, inference=True) if not t.grad and d.chance(0.7) else t)


def draw_options(d: Drawer, name: str, inner: str) -> dict[str, Any]:
    weighting = kind_of(name, "weighting")(d) if name == "CompositeLoss" else ""
    _, defaults = targets.parameters(name, weighting, inner)
    required = [k for k, default in defaults.items() if default is targets.inspect.Parameter.empty]
    others = [k for k in defaults if k not in required and k not in LATER]
    count = min(len(others), d.pick(0, 1, 1, 2, 2, 3, 4, 7))
    chosen = required + d.rng.sample(others, count)
    options: dict[str, Any] = {"weighting": weighting} if weighting else {}
    if weighting == "vqgan":
        chosen.append("reference")
    for option in chosen:
        if option != "weighting" and not _is_inapplicable(d, option):
            options[option] = kind_of(inner or name, option, defaults.get(option))(d)
    if inner:
        options["loss_fn"] = Raw(f"fastloss.{inner}")
    return options


def draw_later(d: Drawer, sizes: dict[str, Any], kind: str, args: tuple, options: dict[str, Any]) -> tuple:
    """Adds to the options what came later; the arguments, some of them packed."""
    if kind == "attention_consistency_from_qk" and d.chance(0.25):
        return packed(d, args, options)
    if kind == "PerceptualLoss" and d.chance(0.3):
        kinds = {"style": ("normalization", "beta"), "lpips": ("inside_root",), "dists": ("c1", "c2")}
        names = kinds.get(options.get("criterion", "l1"), ("eps", "beta"))
        own = {"style": "style_distance", "lpips": "lpips_distance", "dists": "dists_distance"}
        function = own.get(options.get("criterion", "l1"), "feature_distance")
        options["criterion_options"] = {name: kind_of(function, name, True)(d) for name in names}
    if kind in ("info_nce", "ContrastiveLoss"):
        later_softmax_options(d, sizes, args, options)
    if kind in ("info_nce", "ContrastiveLoss", "clip_loss", "supcon_loss", "nt_xent_loss") and d.chance(0.15):
        listed_pairs(d, kind, sizes, options)
    return args


def listed_pairs(d: Drawer, kind: str, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    if kind == "supcon_loss" and d.chance(0.5):
        sizes["columns"] = d.size(most=40)
        options["keys"] = d.tensor(sizes["columns"], sizes["width"])
        options["key_labels"] = d.integers(d.pick(1, 2, 5), sizes["columns"])
    names = ("excluded_pairs", "negative_pairs") if kind not in ("clip_loss", "supcon_loss") else ("excluded_pairs",)
    refused = "image_groups" in options or "text_groups" in options or "positives" in options
    if refused or (sizes.get("per_sample") and not options.get("in_batch")):
        return
    options[d.pick(*names)] = listed(d, kind, sizes)


def listed(d: Drawer, kind: str, sizes: dict[str, Any]) -> T:
    rows, columns = sizes["rows"], sizes.get("columns", sizes["rows"])
    if kind == "nt_xent_loss":
        rows, columns = 2 * rows, 2 * columns
    least = min(rows, columns)
    return d.integers(max(least, 1), d.pick(0, 1, 5, 40, 400) if least else 0, 2)


def packed(d: Drawer, args: tuple, options: dict[str, Any]) -> tuple:
    """Queries and keys of sequences one after the other, of which some may be empty."""
    options.pop("mask", None)
    starts = {}
    for name, t in (("cu_seqlens_q", args[0]), ("cu_seqlens_k", args[1])):
        total = t.shape[0] * t.shape[2]
        starts[name] = [0, *sorted(d.rng.randint(0, total) for _ in range(t.shape[0] - 1)), total]
    if min(map(len, starts.values())) < 2 or starts["cu_seqlens_k"][-1] == 0:
        return args
    options |= {name: Raw(f"torch.tensor({found})") for name, found in starts.items()}
    shapes = [(t.shape[0] * t.shape[2], t.shape[1], t.shape[3]) for t in args]
    return tuple(dataclasses.replace(t, shape=shape) for t, shape in zip(args, shapes, strict=True))


def later_softmax_options(d: Drawer, sizes: dict[str, Any], args: tuple, options: dict[str, Any]) -> None:
    rows, keys, own = sizes["rows"], sizes["keys"], sizes.get("per_sample", False)
    if own and len(args) == 3 and d.chance(0.3):
        shape = (rows, sizes["negatives"])
        options["negatives_mask"] = T(shape, "bool", d.pick(0.5, 0.9, 0.0), d.seed(), layout=d.layout())
    if keys and d.chance(0.15):
        options["targets"] = T((rows, d.pick(1, 2, 5)), "int64", seed=d.seed(), low=-1, high=keys, layout=d.layout())
        options["positives"] = d.pick("mean", "sum")
        for name in ("include_positive", "sampling", "query_ids", "key_ids", "return_lse", "symmetric"):
            options.pop(name, None)
        if len(args) == 3 and not options.get("in_batch"):
            options.pop("label_smoothing", None)


def _is_inapplicable(d: Drawer, option: str) -> bool:
    """Needs something that these inputs lack."""
    if option in ("layer_weights",) and "layers" in d.sizes and not d.sizes["layers"]:
        return True
    return option == "guide" and len(d.sizes["shape"]) < 4


def settle_groups(d: Drawer, kind: str, options: dict[str, Any]) -> None:
    """Groups come without ids and what else is refused beside them."""
    given = [name for name in ("image_groups", "text_groups") if name in options]
    if given and d.chance(0.5):
        for name in ("image_ids", "text_ids", "negative_only", "return_lse"):
            options.pop(name, None)
        for name in ("image_groups", "text_groups") if d.sizes["texts"] != d.sizes["rows"] else ():
            options[name] = kind_of(kind, name)(d)
    else:
        for name in given:
            options.pop(name)


def settle_attention(d: Drawer, options: dict[str, Any]) -> None:
    """Temperatures are of logits, scores have fewer metrics, heads a dimension and one mask for all."""
    if options.get("inputs", "probs") != "logits":
        options.pop("temperature", None)
    if options.get("inputs") == "scores":
        options["metric"] = d.pick("mse", "l1", "cosine")
    shape = d.sizes["shape"]
    if len(shape) < 3 or shape[-3] == 0:
        options.pop("head_mean", None)
    if options.get("head_mean"):
        options.pop("mask", None)


def settle(d: Drawer, name: str, inner: str, args: tuple, options: dict[str, Any]) -> None:
    """Makes options that exclude each other fit, as the docstrings have it."""
    kind = inner or name
    if kind in ("info_nce", "ContrastiveLoss"):
        settle_softmax(d, args, options)
    if kind in ("clip_loss", "siglip_loss"):
        settle_groups(d, kind, options)
    if kind == "siglip_loss" and d.sizes["texts"] != d.sizes["rows"] and "image_groups" not in options:
        options["negative_only"] = True
    if (
        kind == "siglip_loss"
        and d.sizes["texts"] != d.sizes["rows"]
        and ("image_ids" in options) != ("text_ids" in options)
    ):
        for option in ("image_ids", "text_ids"):
            options[option] = kind_of(kind, option)(d)
    if kind in ("info_nce", "ContrastiveLoss", "nt_xent_loss") and "tau_plus" in getattr(
        options.get("sampling"), "options", {}
    ):
        options.pop("normalize", None)
        options.pop("bias", None)
    if inner and options.get("reduction") == "none":
        options.pop("reduction")
    if kind == "smoothness_loss" and options.get("convention") in ("basicsr", "kornia"):
        options.pop("reduction", None) if options.get("reduction") == "none" else None
    if kind == "attention_consistency_loss":
        settle_attention(d, options)
    if kind == "mode_seeking_loss" and options.get("form", "msgan") != "dsgan":
        options.pop("margin", None)
    if kind == "diversity_loss" and options.get("mode", "nearest") != "nearest":
        options.pop("return_nearest", None)
    if kind in ("ssim_loss", "ms_ssim_loss"):
        settle_ssim(d, kind, options)
    if kind == "image_loss":
        settle_image(d, options)
    if kind == "lpips_distance" and "size" in options:
        options["spatial"] = True
    if kind == "CompositeLoss":
        settle_composite(options)
    if kind == "PerceptualLoss":
        settle_perceptual(d, args, options)


def settle_softmax(d: Drawer, args: tuple, options: dict[str, Any]) -> None:
    negatives, square = len(args) == 3, d.sizes["rows"] == d.sizes["keys"]
    if not negatives and options.get("in_batch") is False:
        options.pop("in_batch")
    if options.get("symmetric") and not square:
        options.pop("symmetric")
    if options.get("symmetric"):
        options.pop("targets", None)
        if negatives:
            options["in_batch"] = True
    if ("query_ids" in options) != ("key_ids" in options) and ("targets" in options or not square):
        for option in ("query_ids", "key_ids"):
            options[option] = kind_of("info_nce", option)(d)


def settle_ssim(d: Drawer, kind: str, options: dict[str, Any]) -> None:
    """Mostly a window that fits; a map without a weight."""
    if options.get("reduction") == "map":
        options.pop("weight", None)
    if options.get("padding") == "reflect" and min(d.sizes["shape"][-2:]) <= 6:
        options["padding"] = "same"
    valid = options.get("padding", "valid" if kind == "ms_ssim_loss" else "same") == "valid"
    levels = options.get("level_weights")
    halvings = 0 if kind != "ms_ssim_loss" else 4 if levels is None else len(getattr(levels, "value", levels)) - 1
    if options.get("odd_sides") == "drop" and min(d.sizes["shape"][-2:]) % 2**halvings:
        options.pop("odd_sides")  # of the smallest images nothing would be left
    if valid and d.chance(0.9):
        least = -(-min(d.sizes["shape"][-2:]) // 2**halvings)
        if least < 1 or kind == "ms_ssim_loss" and d.chance(0.5):
            options["padding"] = "same"
        else:
            options["window"] = d.pick(*(w for w in (1, 3, 5, 7, 11, 13, 31) if w <= least))


def settle_image(d: Drawer, options: dict[str, Any]) -> None:
    if len(d.sizes["shape"]) != 4:
        options.pop("ssim", None)
    if options.get("pixel", 1) is None and options.get("smoothness") is None and options.get("ssim") is None:
        options.pop("pixel")
    for part in ("pixel", "smoothness", "ssim"):
        if options.get(part, 1 if part == "pixel" else None) is None:
            options.pop(f"{part}_options", None)
    more = options.get("ssim_options")
    if more is not None:
        settle_ssim(d, "ssim_loss", more)


def settle_composite(options: dict[str, Any]) -> None:
    weights = options["weights"]
    if all(float(getattr(w, "value", w)) == 0 for w in weights.values()):
        weights[next(iter(weights))] = 1.0
    if options["weighting"] == "vqgan":
        active = [k for k, w in weights.items() if float(getattr(w, "value", w)) > 0]
        options["reference"] = options["reference"] if options["reference"] in active else active[0]


def settle_perceptual(d: Drawer, args: tuple, options: dict[str, Any]) -> None:
    if options.get("pairwise"):
        options.pop("execution", None)
        options.pop("reduction", None)


def compiled(d: Drawer, call: Call, inner: str) -> Call:
    """The call compiled, and called again with other numbers."""
    varied = []
    for _ in range(4):
        changed = {}
        for option, value in call.options.items():
            if isinstance(value, float) and not isinstance(value, bool):
                other = kind_of(inner or call.name, option)(d)
                changed[option] = (
                    float(other) if isinstance(other, (int, float)) and not isinstance(other, bool) else value
                )
        varied.append(changed)
    return dataclasses.replace(call, mode="compile", form="function", autocast=False, varied=tuple(varied))
