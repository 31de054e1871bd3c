"""Rows of the deep-feature losses: a shape is a list of layer shapes, three layers in every one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fastloss
from tests.conformance.case import Bench, Case, Draw, with_argument, with_options

LAYERS = (
    ((2, 3, 5, 7), (2, 4, 3, 3), (2, 6, 1, 2)),
    ((1, 2, 1, 1), (1, 3, 1, 1), (1, 5, 1, 1)),
    ((3, 8, 9, 5), (3, 2, 4, 11), (3, 17, 2, 3)),
    ((2, 3, 1, 7), (2, 4, 6, 1), (2, 1, 9, 17)),
)

# what VGG16 has for relu1_2, 2_2, 3_3, 4_3, 5_3 of a batch of four 256x256 images
VGG16 = tuple((4, channels, size, size) for channels, size in ((64, 256), (128, 128), (256, 64), (512, 32), (512, 16)))


def feature_bytes(shapes: tuple, size: int, mode: str, options: dict) -> int:
    """Forward reads both lists; backward reads both again and writes one list of gradients.

    L1 writes two bits of sign an element in the forward and reads those alone in the backward.
    """
    count = sum(torch.Size(shape).numel() for shape in shapes)
    if options.get("criterion", "l1") == "l1":
        return int(count * {"forward": 2 * size + 0.25, "backward": size + 0.25, "both": 3 * size + 0.5}[mode])
    return list_bytes(shapes, size, mode)


def list_bytes(shapes: tuple, size: int, mode: str) -> int:
    """Of a pair of lists: both read in the forward, both read and one list of gradients written in the backward."""
    return sum(torch.Size(s).numel() for s in shapes) * size * {"forward": 2, "backward": 3, "both": 5}[mode]


def gram_flops(shapes: tuple, size: int, mode: str) -> int:
    """Two Gram matrices in the forward; one product, of the same size, in the backward."""
    one = sum(2 * n * c * c * h * w for n, c, h, w in shapes)
    return one * {"forward": 2, "backward": 1, "both": 3}[mode]


def lpips_bytes(shapes: tuple, size: int, mode: str) -> int:
    """Read both lists and write four numbers a pixel; read all that and write one list of gradients."""
    count = sum(torch.Size(shape).numel() for shape in shapes)
    pixels = sum(torch.Size(shape).numel() // shape[1] for shape in shapes)
    return {"forward": 2, "backward": 3, "both": 5}[mode] * size * count + (32 if mode == "both" else 16) * pixels


def feature_pair(draw: Draw, shapes: tuple) -> tuple:
    features = [draw.normal(*shape) for shape in shapes]
    return features, [draw.near(f) for f in features]


def feature_pair_and_lins(draw: Draw, shapes: tuple) -> tuple:
    features = [draw.normal(*shape) for shape in shapes]
    targets = [f + 0.3 * draw.normal(*f.shape) for f in features]  # no ties: there the gradient is rounding alone
    return features, targets, [draw.uniform(shape[1]) for shape in shapes]


def eager_feature_distance(features, targets, weights=None, criterion="l1", eps=1e-6, beta=1.0, reduction="mean"):
    total = 0
    for f, t, w in zip(features, targets, weights or [1.0] * len(features), strict=True):
        if criterion == "charbonnier":
            loss = ((f - t) ** 2 + eps**2).sqrt()
            loss = loss.flatten(1).mean(1) if reduction == "none" else getattr(loss, reduction)()
        else:
            of = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[criterion]
            more = {"beta": beta} if criterion == "smooth_l1" else {}
            loss = of(f, t, reduction=reduction, **more)
            loss = loss.flatten(1).mean(1) if reduction == "none" else loss
        total = total + w * loss
    return total


def eager_lpips_distance(features, targets, lin_weights, spatial=False, size=None, eps=1e-10, inside_root=False):
    """The head as the lpips package runs it, with its 1x1 convolutions."""

    def normalised(x):
        square = torch.sum(x**2, dim=1, keepdim=True)
        return x / (torch.sqrt(square + eps) if inside_root else torch.sqrt(square) + eps)

    total = 0
    for i, (f, t) in enumerate(zip(features, targets, strict=True)):
        difference = (normalised(f) - normalised(t)) ** 2
        if lin_weights is None:
            value = difference.sum(1, keepdim=True)
        else:
            value = F.conv2d(difference, lin_weights[i].view(1, -1, 1, 1))
        if spatial:
            value = F.interpolate(value, size=size or features[0].shape[2:], mode="bilinear", align_corners=False)
        else:
            value = value.mean([2, 3])[:, 0]
        total = total + value
    return total


def feature_pair_and_weights(draw: Draw, shapes: tuple) -> tuple:
    features, targets, alphas = feature_pair_and_lins(draw, shapes)
    return features, targets, alphas, [draw.uniform(shape[1]) for shape in shapes]


def rectified_pair_and_weights(draw, shape):
    """Features as they come out of a network: no mean is near zero."""
    features, targets, *weights = feature_pair_and_weights(draw, shape)
    return [f.relu() for f in features], [t.relu() for t in targets], *weights


def eager_dists_distance(features, targets, alphas=None, betas=None, c1=1e-6, c2=1e-6):
    """The formula as DISTS has it."""
    alphas, betas = (w or [f.new_ones(f.shape[1]) for f in features] for w in (alphas, betas))
    total = sum(w.sum() for w in (*alphas, *betas))
    similarity = 0
    for x, y, alpha, beta in zip(features, targets, alphas, betas, strict=True):
        alpha, beta = (w.view(1, -1, 1, 1) / total for w in (alpha, beta))
        x_mean, y_mean = x.mean([2, 3], keepdim=True), y.mean([2, 3], keepdim=True)
        structure = (2 * x_mean * y_mean + c1) / (x_mean**2 + y_mean**2 + c1)
        x_var = ((x - x_mean) ** 2).mean([2, 3], keepdim=True)
        y_var = ((y - y_mean) ** 2).mean([2, 3], keepdim=True)
        cov = (x * y).mean([2, 3], keepdim=True) - x_mean * y_mean
        texture = (2 * cov + c2) / (x_var + y_var + c2)
        similarity = similarity + (alpha * structure).sum(1) + (beta * texture).sum(1)
    return 1 - similarity.flatten()


def eager_style_distance(features, targets, normalization="chw", **options):
    def gram(x):
        n, c, h, w = x.shape
        x = x.reshape(n, c, h * w)
        return torch.bmm(x, x.transpose(1, 2)) / {"chw": c * h * w, "hw": h * w, "none": 1}[normalization]

    return eager_feature_distance([gram(f) for f in features], [gram(t) for t in targets], **options)


def piq_dists(features, targets, alphas, betas, **options):
    """piq's own statistics, without the weights it would download."""
    from piq import DISTS

    of = DISTS.compute_distance(None, features, targets)
    weights = [w.view(1, -1, 1, 1) for w in (*alphas, *betas)]
    return 1 - sum((w * d).sum((1, 2, 3)) for w, d in zip(weights, of, strict=True)) / sum(w.sum() for w in weights)


def piq_style(features, targets, **options):
    from piq import StyleLoss

    grams = [[StyleLoss.gram_matrix(x) / x[0].numel() for x in side] for side in (features, targets)]
    return sum(F.l1_loss(*pair) for pair in zip(*grams, strict=True))


def layer(index: int, change: Callable) -> Callable:
    """A change of one tensor of a list."""
    return lambda tensors: [change(t) if i == index else t for i, t in enumerate(tensors)]


PERCEPTUAL_CASES = [
    Case(
        "feature_distance",
        fastloss.feature_distance,
        feature_pair,
        eager_feature_distance,
        shapes=LAYERS,
        options=[
            {},
            {"weights": [0.5, 0.0, 2.0]},
            {"criterion": "l2", "weights": [1, 2, 3]},
            {"criterion": "charbonnier"},
            {"criterion": "charbonnier", "eps": 0.1},
            {"criterion": "smooth_l1", "beta": 0.1},
        ],
        bad=[
            ("length", with_argument(1, lambda t: t[:-1]), ValueError, "targets: expected as many entries as features"),
            ("tensor", with_argument(0, lambda t: t[0]), TypeError, "features: expected a list of tensors, one a"),
            ("none", lambda args, options: (([], []), options), ValueError, "features: expected at least one layer"),
            (
                "shape",
                with_argument(1, layer(1, lambda t: t[..., 1:])),
                ValueError,
                "targets[1]: expected the shape of features[1], (2, 4, 3, 3), got (2, 4, 3, 2)",
            ),
            ("integer", with_argument(0, layer(2, lambda t: t.long())), TypeError, "features[2]: expected a float16"),
            ("weights", with_options(weights=[1.0, 2.0]), ValueError, "weights: expected as many entries as features"),
            ("weight", with_options(weights=[1.0, float("nan"), 2.0]), ValueError, "weights[1]: expected a finite"),
            ("weight type", with_options(weights=[1.0, "2", 2.0]), TypeError, "weights[1]: expected a number"),
            ("weights type", with_options(weights=2.0), TypeError, "weights: expected a list of numbers"),
            ("criterion", with_options(criterion="l3"), ValueError, "criterion: expected one of"),
            ("eps", with_options(criterion="charbonnier", eps=0.0), ValueError, "eps: expected a finite number > 0"),
            ("beta", with_options(criterion="smooth_l1", beta=-1), ValueError, "beta: expected a finite number > 0"),
            ("reduction", with_options(reduction="avg"), ValueError, "reduction: expected one of"),
            (
                "empty",
                lambda args, options: (([a[0][:0] for a in args], [a[0][:0] for a in args]), options),
                ValueError,
                "the mean of an empty batch is undefined",
            ),
        ],
        bench=Bench(
            shapes=[VGG16],
            cost=feature_bytes,
            options=[{}, {"criterion": "l2"}, {"criterion": "charbonnier"}],
        ),
        module=fastloss.FeatureDistance,
    ),
    Case(
        "lpips_distance",
        fastloss.lpips_distance,
        feature_pair_and_lins,
        eager_lpips_distance,
        shapes=LAYERS,
        options=[
            {},
            {"spatial": True},
            {"spatial": True, "size": (13, 4)},
            {"eps": 1e-3},
            {"inside_root": True, "eps": 0.1},
        ],
        reductions=(),
        bad=[
            ("length", with_argument(1, lambda t: t[:-1]), ValueError, "targets: expected as many entries as features"),
            ("lins", with_argument(2, lambda t: t[:-1]), ValueError, "lin_weights: expected as many entries as"),
            (
                "lin shape",
                with_argument(2, layer(1, lambda t: t[1:])),
                ValueError,
                "lin_weights[1]: expected shape (4,) or (1, 4, 1, 1) for the 4 channels of features[1], got (3,)",
            ),
            ("lins type", with_argument(2, lambda t: t[0]), TypeError, "lin_weights: expected a list of tensors"),
            (
                "rank",
                lambda args, options: (([args[0][0][0]], [args[1][0][0]], None), options),
                ValueError,
                "features[0]: expected a 4-D tensor",
            ),
            ("shape", with_argument(1, layer(2, lambda t: t[:, 1:])), ValueError, "targets[2]: expected the shape of"),
            ("integer", with_argument(1, layer(0, lambda t: t.int())), TypeError, "targets[0]: expected a float16"),
            (
                "samples",
                lambda args, options: tuple(
                    ([[t[:1] if i == 1 else t for i, t in enumerate(side)] for side in args[:2]] + [args[2]], options)
                ),
                ValueError,
                "features[1]: expected as many samples as features[0], 2, got 1",
            ),
            (
                "pixels",
                lambda args, options: (([t[..., :0] for t in args[0]], [t[..., :0] for t in args[1]], None), options),
                ValueError,
                "features[0]: expected at least one pixel",
            ),
            ("size alone", with_options(size=(4, 4)), ValueError, "size: only a map has a size"),
            ("size", with_options(spatial=True, size=(0, 4)), ValueError, "size: expected (height, width)"),
            ("eps", with_options(eps=0), ValueError, "eps: expected a finite number > 0"),
        ],
        bench=Bench(shapes=[VGG16], cost=lpips_bytes),
        module=fastloss.LPIPSDistance,
    ),
    Case(
        "dists_distance",
        fastloss.dists_distance,
        feature_pair_and_weights,
        eager_dists_distance,
        shapes=(*LAYERS[:1], ((1, 2, 2, 1), (1, 3, 1, 4), (1, 5, 3, 3)), *LAYERS[2:]),
        options=[{}, {"c1": 1e-2, "c2": 1e-3}],
        grads=(0, 2, 3, 1),
        reductions=(),
        bad=[
            ("length", with_argument(1, lambda t: t[:-1]), ValueError, "targets: expected as many entries as features"),
            ("alphas", with_argument(2, lambda t: t[:-1]), ValueError, "alphas: expected as many entries as features"),
            ("betas type", with_argument(3, lambda t: t[0]), TypeError, "betas: expected a list of tensors"),
            (
                "beta shape",
                with_argument(3, layer(1, lambda t: t[1:])),
                ValueError,
                "betas[1]: expected shape (4,) or (1, 4, 1, 1) for the 4 channels of features[1], got (3,)",
            ),
            (
                "rank",
                lambda args, options: (([args[0][0][0]], [args[1][0][0]]), options),
                ValueError,
                "features[0]: expected a 4-D tensor",
            ),
            (
                "pixels",
                lambda args, options: (([t[..., :0] for t in args[0]], [t[..., :0] for t in args[1]]), options),
                ValueError,
                "features[0]: expected channels and pixels",
            ),
            ("c1", with_options(c1=0), ValueError, "c1: expected a finite number > 0"),
            ("c2", with_options(c2=-1), ValueError, "c2: expected a finite number > 0"),
        ],
        bench=Bench(shapes=[VGG16], cost=list_bytes, make=rectified_pair_and_weights),
        module=fastloss.DISTSDistance,
        extra={"rivals": {"piq": piq_dists} if importlib.util.find_spec("piq") else {}},
    ),
    Case(
        "style_distance",
        fastloss.style_distance,
        feature_pair,
        eager_style_distance,
        shapes=LAYERS,
        options=[
            {},
            {"criterion": "l2", "normalization": "none", "weights": [1, 2, 3]},
            {"criterion": "charbonnier", "eps": 0.1, "normalization": "hw"},
        ],
        bad=[
            ("length", with_argument(1, lambda t: t[:-1]), ValueError, "targets: expected as many entries as features"),
            (
                "rank",
                lambda args, options: (([args[0][0][0]], [args[1][0][0]]), options),
                ValueError,
                "features[0]: expected a 4-D tensor",
            ),
            ("normalization", with_options(normalization="c"), ValueError, "normalization: expected one of"),
            ("criterion", with_options(criterion="fro"), ValueError, "criterion: expected one of"),
            ("weights", with_options(weights=[1.0]), ValueError, "weights: expected as many entries as features"),
        ],
        bench=Bench(shapes=[VGG16], cost=gram_flops, unit="flops"),
        module=fastloss.StyleDistance,
        extra={"rivals": {"piq": piq_style} if importlib.util.find_spec("piq") else {}},
    ),
]
