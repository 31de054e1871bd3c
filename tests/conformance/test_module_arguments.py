"""Arguments of what the conformance tests do not call: PerceptualLoss, CompositeLoss, tap, gram matrices, cached
gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastloss import (
    CompositeLoss,
    ContrastiveLoss,
    Execution,
    NegativeSampling,
    PerceptualLoss,
    gram_matrix,
    loss_and_grads,
    tap,
)
from tests.conformance.test_arguments import Items, default_dtype

CRITERIA = ("l1", "l2", "charbonnier", "smooth_l1", "lpips", "dists", "style")
WEIGHTINGS = {"fixed": {}, "uncertainty": {}, "dwa": {}, "relobralo": {}, "vqgan": {"reference": "a"}}


class Network(nn.Module):
    """Two layers, the second a view of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> list[Tensor]:
        return [self.convolution(image).relu(), image]


@pytest.fixture(name="network")
def _network() -> nn.Module:
    torch.manual_seed(0)
    return Network()


def images(count: int = 2) -> Iterator[Tensor]:
    return iter(torch.rand(count, 2, 3, 9, 8, generator=torch.Generator().manual_seed(1)))


def perceptual(network: nn.Module, criterion: str = "l1", **options) -> PerceptualLoss:
    options |= {"lin_weights": False} if criterion == "lpips" else {}
    return PerceptualLoss(copy.deepcopy(network), criterion=criterion, **options)


def in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def assert_unrounded(got: Tensor, usual: Tensor, default: torch.dtype) -> None:
    """Under a narrow default dtype the same to the bit; under float64 a module's own constants may have more digits."""
    if default == torch.float64:
        torch.testing.assert_close(got, usual, check_dtype=False)
    else:
        assert got.dtype == usual.dtype and torch.equal(got, usual)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("execution", [None, Execution(chunk=1), Execution(checkpoint=True)], ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_perceptual_targets_may_come_from_inference_mode(network, criterion, execution, normalize):
    """Images and encoded features; and the whole call inside it."""
    loss = perceptual(network, criterion, execution=execution, normalize=normalize)
    target, pred = images()
    pred.requires_grad_()

    def results(image, **options) -> list[Tensor]:
        value = loss(image, pred, **options)
        return [value, *torch.autograd.grad(value.sum(), pred)]

    with torch.inference_mode():
        encoded = loss.encode(target)
        inside = loss(in_inference_mode(target), pred.detach())
    for image in (in_inference_mode(target), encoded):
        for options in ({}, {"pairwise": True}):
            for got, expected in zip(results(image, **options), results(target, **options), strict=True):
                assert torch.equal(got, expected)
    assert torch.equal(inside, loss(target, pred))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_perceptual_loss_under_another_default_dtype(network, criterion, default):
    target, pred = images()
    results = []
    for dtype in (torch.float32, default):
        with default_dtype(dtype):
            loss = perceptual(network, criterion, layer_weights=[0.3, 0.7], backbone_weights=[1.1])
            leaf = pred.clone().requires_grad_()
            value = loss(target, leaf)
            results.append((value, *torch.autograd.grad(value, leaf), loss.shift, loss.scale))
    for usual, got in zip(*results, strict=True):
        assert_unrounded(got, usual, default)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_composite_loss_under_another_default_dtype(weighting, default):
    """Four steps, and a state that goes from one default to the other."""
    totals, states = [], []
    for dtype in (torch.float32, default):
        with default_dtype(dtype):
            fuse = CompositeLoss({"a": 1.1, "b": 0.3}, weighting=weighting, **WEIGHTINGS[weighting])
            layer = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float32, requires_grad=True)
            steps = []
            for step in range(4):
                parts = {"a": (layer * (step + 1)).square().sum(), "b": (layer - step).abs().sum()}
                total, _ = fuse(parts, last_layer=layer)
                steps += [total, *torch.autograd.grad(total, layer)]
            totals.append(steps)
            states.append(fuse.state_dict())
            fuse.load_state_dict(states[0], strict=True)
    for usual, got in zip(*totals, strict=True):
        assert_unrounded(got, usual, default)
    for usual, got in zip(*(state.values() for state in states), strict=True):
        assert_unrounded(got, usual, default)


def test_inception_input_under_another_default_dtype():
    from fastloss.perceptual.normalisation import FromImageNet

    usual = FromImageNet((0.5,) * 3, (0.5,) * 3)
    for default in (torch.bfloat16, torch.float64):
        with default_dtype(default):
            got = FromImageNet((0.5,) * 3, (0.5,) * 3)
        assert_unrounded(got.scale, usual.scale, default)
        assert_unrounded(got.shift, usual.shift, default)


def test_the_training_systems_measures_under_another_default_dtype():
    from fastloss.recipes.data.digits import measure
    from fastloss.recipes.imagen.losses import MemoryBank

    image = torch.rand(3, 1, 8, 9, generator=torch.Generator().manual_seed(0))
    usual = measure(image)
    for default in (torch.bfloat16, torch.float64):
        with default_dtype(default):
            assert all(torch.equal(a, b) for a, b in zip(measure(image), usual, strict=True))
            assert MemoryBank(3, 4).emb.dtype == torch.float32


@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "vqgan"])
def test_composite_parts_may_come_from_inference_mode(weighting):
    """A part beside one with a gradient; and a validation step inside it between two training steps."""

    def totals(make) -> list[Tensor]:
        fuse = CompositeLoss({"a": 1.0, "b": 2.0}, weighting=weighting)
        layer, found = torch.tensor([1.0, -2.0], requires_grad=True), []
        for step in range(4):
            total, parts = fuse({"a": make(torch.tensor(2.0 + step)), "b": layer.square().sum()})
            found += [total, parts["a"], *torch.autograd.grad(total, layer)]
            with torch.inference_mode():
                found.append(fuse.eval()({"a": torch.tensor(1.0), "b": torch.tensor(3.0)})[0].clone())
            fuse.train()
        return found

    for got, expected in zip(totals(in_inference_mode), totals(torch.clone), strict=True):
        assert torch.equal(got, expected)


def test_taps_gram_matrices_and_cached_gradients_take_inference_tensors():
    target, pred = images()
    pred.requires_grad_()
    for criterion in ("l1", "l2"):
        for one, two in ((pred, target), (target, pred)):
            got, expected = (
                torch.autograd.grad(tap(form(one), form(two), criterion=criterion, weight=0.5)[1], pred)[0]
                for form in (lambda t: t if t.requires_grad else in_inference_mode(t), lambda t: t)
            )
            assert torch.equal(got, expected)
    assert torch.equal(gram_matrix(in_inference_mode(target)), gram_matrix(target))
    query, key, weights = torch.rand(4, 5), torch.rand(4, 5), torch.rand(4)
    got = loss_and_grads(*map(in_inference_mode, (query, key)), weights=in_inference_mode(weights))
    expected = loss_and_grads(query, key, weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


def test_perceptual_loss_takes_any_sequence_and_numpys_numbers(network):
    target, pred = images()
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    plain = {"layer_weights": [0.5, 2.0], "normalize": (mean, std), "input_range": (-1.0, 1.0)}
    expected = perceptual(network, "l2", **plain)(target, pred)
    for form in (tuple, Items, np.array, lambda v: np.array(v).astype(np.float64), torch.tensor):
        options = {"layer_weights": form([0.5, 2.0]), "normalize": (form(mean), form(std)), "input_range": (-1, 1)}
        torch.testing.assert_close(perceptual(network, "l2", **options)(target, pred), expected)
    options = {"layer_weights": np.array([0.5, 2.0]), "normalize": np.array([mean, std]), "input_range": Items([-1, 1])}
    torch.testing.assert_close(perceptual(network, "l2", **options)(target, pred), expected)
    two = PerceptualLoss(
        Items([copy.deepcopy(network), copy.deepcopy(network)]), layer_weights=Items([np.array([0.5, 2.0]), None]),
        backbone_weights=np.array([1.0, 0.0]), pretrained=np.bool_(True), normalize=np.bool_(False), criterion="l2",
    )  # fmt: skip
    one = perceptual(network, "l2", layer_weights=[0.5, 2.0], normalize=False)
    torch.testing.assert_close(two(target, pred), one(target, pred))
    encoded = one.encode(target)
    torch.testing.assert_close(one(tuple(map(Items, encoded)), pred), one(target, pred))
    lins = [torch.rand(4), torch.rand(3)]
    got = [PerceptualLoss(network, criterion="lpips", lin_weights=form(lins))(target, pred) for form in (list, Items)]
    assert torch.equal(*got)
    chunked = perceptual(network, execution=Execution(chunk=np.int64(1), channels_last=np.bool_(True)))
    torch.testing.assert_close(chunked(target, pred), perceptual(network)(target, pred))


def test_perceptual_loss_names_what_came(network):
    graph = torch.ones(2, requires_grad=True)
    for options, error, text in (
        ({"layer_weights": {0.5: 1}}, TypeError, "layer_weights: expected a list of numbers, got dict"),
        ({"layer_weights": [10**400, 1.0]}, ValueError, r"layer_weights\[0\]: expected a finite number"),
        ({"layer_weights": graph}, ValueError, "layer_weights: no gradient is provided"),
        ({"layer_weights": [True, 1.0]}, TypeError, r"layer_weights\[0\]: expected a number, got bool"),
        ({"input_range": "01"}, TypeError, "input_range: expected a list of numbers, got str"),
        ({"normalize": ([graph], [1.0])}, TypeError, r"mean\[0\]: expected a number, got Tensor"),
        ({"criterion": []}, TypeError, r"criterion: expected one of .*, got list \[\]"),
        ({"reduction": None}, TypeError, "reduction: expected one of .*, got NoneType"),
        ({"criterion": "lpips", "lin_weights": [graph, graph]}, ValueError, r"lin_weights\[0\] requires a gradient"),
    ):
        with pytest.raises(error, match=text):
            PerceptualLoss(network, **options)
    for options in ({"chunk": True}, {"checkpoint": 1}, {"channels_last": "yes"}):
        with pytest.raises(TypeError, match="execution: "):
            Execution(**options)


def test_composite_loss_takes_numpys_numbers_and_no_graphs():
    parts = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    for form in (np.float32, np.float64, np.array):
        fuse = CompositeLoss({"a": form(0.5), "b": form(0.25)}, weighting="dwa", temperature=form(2.0), period=form(1))
        assert all(type(weight) is float for weight in fuse.weights.values())
        assert fuse(parts)[0].item() == 1.75
    seeded = CompositeLoss({"a": 1.0, "b": 1.0}, weighting="relobralo", seed=np.int64(7), alpha=np.float32(0.5))
    assert seeded.rule.seed == 7 and type(seeded.rule.seed) is int
    with pytest.raises(ValueError, match=r"CompositeLoss: weights\['a'\] requires a gradient and is no nn.Parameter"):
        CompositeLoss({"a": torch.tensor(1.0, requires_grad=True)})
    for value, error in ((torch.tensor(1.0), TypeError), (10**400, ValueError), (True, TypeError), ("1", TypeError)):
        with pytest.raises(error, match=r"weights\['a'\]: expected a (finite )?number"):
            CompositeLoss({"a": value})
    with pytest.raises(TypeError, match="seed: expected a whole number, got float"):
        CompositeLoss({"a": 1.0}, weighting="relobralo", seed=1.0)
    with pytest.raises(TypeError, match="weighting: expected one of"):
        CompositeLoss({"a": 1.0}, weighting=[])


def test_sampling_contrastive_temperature_and_tap_weight():
    sampling = NegativeSampling(tau_plus=np.float32(0.5), hardness=np.array(2), margin=np.float64(0.1))
    assert sampling == NegativeSampling(0.5, 2.0, 0.1) and type(sampling.hardness) is float
    for options in ({"hardness": 10**400}, {"margin": 1e39}, {"tau_plus": True}, {"hardness": torch.tensor(1.0)}):
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            NegativeSampling(**options)
    temperature = torch.tensor(0.3, requires_grad=True)
    for value in (temperature, temperature.exp()):
        with pytest.raises(ValueError, match="ContrastiveLoss: temp requires a gradient and is no nn.Parameter"):
            ContrastiveLoss(temp=value)
    learned = ContrastiveLoss(temp=nn.Parameter(temperature.detach().clone()))
    x = torch.rand(4, 3)
    learned(x, x).backward()
    assert learned.temp.grad is not None
    for _ in range(2):  # at each call it is the caller's own graph
        loss = ContrastiveLoss(temp=0.5)(x, x, temperature=temperature.exp())
        assert torch.autograd.grad(loss, temperature)[0].isfinite()
    assert type(ContrastiveLoss(temp=np.float32(0.5)).temp) is float
    target, pred = images()
    assert torch.equal(tap(pred, target, weight=np.float32(0.5))[1], tap(pred, target, weight=0.5)[1])
    with pytest.raises(TypeError, match=r"weights\[0\]: expected a number, got bool"):
        tap(pred, target, weight=True)
