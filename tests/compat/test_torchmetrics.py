"""torchmetrics' SSIM, MS-SSIM, total variation, LPIPS and DISTS and their drop-ins, on random networks."""

from __future__ import annotations

import copy
import types

import pytest
import torch

from fastloss.compat import _common
from tests.compat.tools import Draws
from tests.perceptual.test_backbones import needs_torchvision

theirs = pytest.importorskip("torchmetrics.functional.image")
metrics = pytest.importorskip("torchmetrics.image")
from fastloss.compat import torchmetrics as ours  # noqa: E402

FLOATS = (torch.float32, torch.float32, torch.float64)


def test_total_variation():
    for draw in Draws(120):
        images = draw.normal(*(draw.size(1, n) for n in (3, 3, 20, 20)))
        options = {"reduction": draw.one_of("sum", "mean", "none", None)}
        draw.compare(ours.total_variation, theirs.total_variation, [images], **options)


def test_ssim():
    pair = [module.structural_similarity_index_measure for module in (ours, theirs)]
    for draw in Draws(120, FLOATS):
        volumes = draw.random.random() < 0.1
        shape = draw.size(1, 2), draw.size(1, 3 - volumes), *(draw.size(11, 13) for _ in range(2 + volumes))
        target, scale = draw.uniform(*shape), draw.one_of(1.0, 255.0)
        preds = 0.7 * target + 0.3 * draw.uniform(*shape)
        options = {
            "sigma": draw.one_of(0.8, 1.5, (1.5, 0.8), [1.0, 1.2]),
            "kernel_size": draw.one_of(11, 3, (5, 7)),
            "reduction": draw.one_of("elementwise_mean", "sum", "none", None),
            "data_range": draw.one_of(scale, (0.0, scale), (0.1 * scale, 0.9 * scale)),
            "k1": draw.one_of(0.01, 0.02),
            "k2": draw.one_of(0.03, 0.4),
        }
        if volumes:  # its last axis is padded by kernel_size, not by the window
            options |= {"sigma": draw.one_of(0.8, (0.5, 1.0, 0.8)), "kernel_size": draw.one_of(7, (5, 3, 7))}
        more = draw.one_of({}, {"return_full_image": True}, {"return_contrast_sensitivity": True})
        if draw.dtype == torch.float64:  # in which single pixels differ by more than the rule's 64 roundings
            more = {}
        draw.compare(*pair, [scale * preds, scale * target], **options, **more)


MS_SSIM = "multiscale_structural_similarity_index_measure"


def test_ms_ssim():
    pair = [getattr(module, MS_SSIM) for module in (ours, theirs)]
    for draw in Draws(24, FLOATS[:1]):  # as for pytorch_msssim, levels of float64 differ by more than 64 roundings
        shape = draw.size(1, 2), draw.size(1, 3), draw.size(44, 52), draw.size(44, 52)
        target, scale = draw.uniform(*shape), draw.one_of(1.0, 255.0)
        preds = 0.7 * target + 0.3 * draw.uniform(*shape)
        options = {
            "sigma": draw.one_of(0.8, 1.0, (1.5, 1.5)),
            "kernel_size": draw.one_of(5, 7, (5, 3)),
            "reduction": draw.one_of("elementwise_mean", "sum", "none", None),
            "data_range": draw.one_of(scale, (0.1 * scale, 0.9 * scale)),
            "k2": draw.one_of(0.03, 0.4),
            "betas": draw.one_of((0.3, 0.7), (0.2, 0.3, 0.5)),
            "normalize": draw.one_of("relu", "simple", None),
        }
        draw.compare(*pair, [scale * preds, scale * target], **options)


def test_ms_ssim_of_opposites_has_no_gradient_where_it_is_0():
    target = torch.rand(1, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    preds = (1 - target).requires_grad_()
    options = {"data_range": 1.0, "kernel_size": 3, "betas": (0.5, 0.5)}
    value = getattr(ours, MS_SSIM)(preds, target, **options)
    assert value == getattr(theirs, MS_SSIM)(preds, target, **options) == 0
    assert torch.equal(torch.autograd.grad(value, preds)[0], torch.zeros_like(preds))


def test_ms_ssim_of_volumes():
    pair = [getattr(module, MS_SSIM) for module in (ours, theirs)]
    for draw in Draws(4, FLOATS[:1]):
        target = draw.uniform(draw.size(1, 2), draw.size(1, 2), *(draw.size(14, 17) for _ in range(3)))
        options = {"sigma": (0.8, 0.6, 0.8), "kernel_size": 7, "data_range": 1.0, "betas": (0.4, 0.6)}
        draw.compare(*pair, [0.7 * target + 0.3 * draw.uniform(*target.shape), target], **options)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("StructuralSimilarityIndexMeasure", {}),
        ("StructuralSimilarityIndexMeasure", {"return_full_image": True}),
        ("StructuralSimilarityIndexMeasure", {"return_contrast_sensitivity": True}),
        ("MultiScaleStructuralSimilarityIndexMeasure", {"betas": (0.4, 0.6), "kernel_size": 5}),
    ],
)
def test_metrics(name, more):
    """Two batches, by each reduction: the value of each, of both, and the states."""
    options = {"data_range": 1.0, "sigma": 1.0, **more}
    for reduction in ("elementwise_mean", "sum", "none", None):
        mine, other = (getattr(m, name)(reduction=reduction, **options) for m in (ours, metrics))
        draw = torch.Generator().manual_seed(1)
        for count in (2, 3):
            pair = torch.rand(2, count, 3, 32, 36, generator=draw)
            torch.testing.assert_close(mine(*pair), other(*pair))
        torch.testing.assert_close(mine.compute(), other.compute())
        torch.testing.assert_close(mine.metric_state, other.metric_state)
        mine.reset()
        assert isinstance(mine, getattr(metrics, name)) and mine.total.item() == 0


def test_total_variation_metric():
    for reduction in ("mean", "sum", "none", None):
        mine, other = (m.TotalVariation(reduction=reduction) for m in (ours, metrics))
        for count in (2, 3):
            images = torch.rand(count, 3, 9, 11, generator=torch.Generator().manual_seed(count))
            torch.testing.assert_close(mine(images), other(images))
        torch.testing.assert_close(mine.compute(), other.compute())
        torch.testing.assert_close(mine.metric_state, other.metric_state)


def test_the_images_own_range():
    pair = [module.structural_similarity_index_measure for module in (ours, theirs)]
    for draw in Draws(6, FLOATS):
        draw.compare(*pair, [draw.uniform(2, 3, 16, 16), draw.uniform(2, 3, 16, 16)], frozen=2)
        draw.compare(*pair, [draw.uniform(2, 3, 16, 16), draw.uniform(2, 3, 16, 16)], quiet=False)


def test_what_is_torchmetrics():
    pair = [module.structural_similarity_index_measure for module in (ours, theirs)]
    cases = [
        ((1, 1, 9, 9, 9), {"data_range": 1.0, "sigma": 0.5}),
        ((1, 2, 16, 16), {"data_range": 1.0, "gaussian_kernel": False}),
        ((1, 2, 16, 16), {"data_range": 1.0, "sigma": (0.1, 1.5), "return_contrast_sensitivity": True}),
    ]
    for i, draw in enumerate(Draws(len(cases), FLOATS)):
        shape, options = cases[i % len(cases)]
        draw.compare(*pair, [draw.uniform(*shape), draw.uniform(*shape)], quiet=False, **options)


@pytest.fixture
def networks(monkeypatch):
    """Random layers, the same each time, in place of torchvision's files; and no network of another test."""
    models, made = pytest.importorskip("torchvision").models, {}

    def features(net, pretrained=True):
        if net not in made:
            torch.manual_seed(3)
            kinds = {"alexnet": models.AlexNet, "squeezenet1_1": lambda: models.SqueezeNet("1_1")}
            made[net] = models.vgg.make_layers(models.vgg.cfgs["D"]) if net == "vgg16" else kinds[net]().features
        return copy.deepcopy(made[net])

    monkeypatch.setattr(ours._lpips, "_get_tv_model_features", features)
    monkeypatch.setattr(ours._dists, "vgg16", lambda weights=None: types.SimpleNamespace(features=features("vgg16")))
    ours._network.cache_clear()
    yield
    ours._network.cache_clear()


@needs_torchvision
def test_lpips(networks):
    """A pair alone is a number; images below 0 or of one colour have features that are 0."""
    for draw in Draws(6, FLOATS):
        shape, normalize = (draw.size(1, 2), 3, draw.size(40, 48), draw.size(40, 48)), draw.one_of(True, False)
        images = [draw.uniform(*shape), draw.uniform(*shape)]
        if not normalize:
            images = [2 * image - 1 for image in images]
        options = {"net_type": draw.one_of("alex", "squeeze"), "normalize": normalize}
        options["reduction"] = draw.one_of("mean", "sum", "none")
        pair = [m.learned_perceptual_image_patch_similarity for m in (ours, theirs)]
        draw.compare(*pair, images, **options)


@needs_torchvision
def test_dists(networks):
    for draw in Draws(2, FLOATS[:1]):
        shape = draw.size(1, 2), 3, draw.size(17, 20), draw.size(17, 20)
        pair = [m.deep_image_structure_and_texture_similarity for m in (ours, theirs)]
        exact = ours._network("dists", torch.device("cpu"), torch.float32)
        exact = copy.deepcopy(exact).double()
        options = {"reduction": draw.one_of("mean", "sum", "none", None)}

        def of_exact(x, y, reduction, exact=exact):
            return ours._dists._dists_compute(exact(x, y, require_grad=True), reduction)

        draw.compare(*pair, [draw.uniform(*shape), draw.uniform(*shape)], of_exact, **options)
    image = torch.rand(1, 3, 24, 24)
    with torch.inference_mode():
        first = ours.deep_image_structure_and_texture_similarity(image, image.flip(3))
    needs = image.clone().requires_grad_()
    again = ours.deep_image_structure_and_texture_similarity(needs, image.flip(3))
    again.backward()
    assert first == again.detach() and needs.grad.any()
    metric = ours.DeepImageStructureAndTextureSimilarity(reduction="sum")
    assert metric(image, image.flip(3)) == first == metric.compute() and metric.total == 1


@needs_torchvision
def test_metrics_of_networks(networks):
    images = torch.rand(2, 3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    name = "LearnedPerceptualImagePatchSimilarity"
    mine, other = (getattr(m, name)(normalize=True, net_type="alex") for m in (ours, metrics))
    for pair in (images, images.flip(0)):
        torch.testing.assert_close(mine(*pair), other(*pair), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine.compute(), other.compute(), rtol=1e-4, atol=1e-6)
    assert isinstance(mine, getattr(metrics, name)) and mine.state_dict().keys() == other.state_dict().keys()


@needs_torchvision
def test_errors_of_lpips(networks):
    image = torch.rand(1, 3, 40, 40)
    _common._said.clear()
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="Expected both input arguments to be normalized tensors"):
            module.learned_perceptual_image_patch_similarity(image - 3, image)
        with pytest.raises(ValueError, match="Argument medium is not valid|reduction"):
            module.learned_perceptual_image_patch_similarity(image, image, reduction="medium")


def test_errors():
    image = torch.rand(1, 3, 16, 16)
    wrong = [
        (ValueError, lambda m: m.structural_similarity_index_measure(image, image, kernel_size=4)),
        (ValueError, lambda m: m.structural_similarity_index_measure(image, image, sigma=(1.0, 1.0, 1.0))),
        (ValueError, lambda m: m.structural_similarity_index_measure(image, image, sigma=-1.0, data_range=1.0)),
        (ValueError, lambda m: m.structural_similarity_index_measure(image[0], image[0])),
        (ValueError, lambda m: m.structural_similarity_index_measure(image, image, reduction="median")),
        (RuntimeError, lambda m: m.structural_similarity_index_measure(image, image[:, :2])),
        (ValueError, lambda m: getattr(m, MS_SSIM)(image, image)),
        (ValueError, lambda m: getattr(m, MS_SSIM)(image, image, betas=[0.5], kernel_size=3)),
        (ValueError, lambda m: getattr(m, MS_SSIM)(image, image, betas=(0.5,), kernel_size=3, normalize="mean")),
        (RuntimeError, lambda m: m.total_variation(image[0])),
        (ValueError, lambda m: m.total_variation(image, "median")),
    ]
    _common._said.clear()
    for error, call in wrong:
        for module in (ours, theirs):
            with pytest.raises(error):
                call(module)
