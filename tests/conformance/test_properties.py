"""hypothesis draws shapes, strides and values for the public functions on image pairs."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastloss
from tests.conformance.cases.pixel import eager_pixel
from tests.conformance.tools import Errors

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=5)
finite = st.floats(-1e4, 1e4, width=32)
kinds = st.sampled_from([1, 2, 1.5, 3, 4.0, "charbonnier", "huber"])


@st.composite
def image_pairs(draw):
    """Two tensors of one shape, any strides (permuted, sliced, broadcast), values with ties and large numbers."""
    shape = draw(shapes)
    order = draw(st.permutations(range(len(shape))))
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([1e-4, 1.0, 1e3]))
    constant = draw(finite)
    generator = torch.Generator().manual_seed(seed)

    def tensor(kind: str) -> torch.Tensor:
        t = torch.randn([shape[i] for i in order], generator=generator) * scale
        t = t.permute([order.index(i) for i in range(len(shape))])
        if kind == "broadcast":
            return t[:1].expand(shape)
        if kind == "sliced":
            return torch.stack((t, t), 0)[1:, ...][0]
        return torch.full(shape, constant) if kind == "constant" else t

    form = st.sampled_from(["permuted", "broadcast", "sliced", "constant"])
    return tensor(draw(form)), tensor(draw(form))


def add_relative(errors, name, got, eager, exact):
    """A sample of the rule, which holds over all examples; each in units of its largest value, as sizes differ."""
    largest = exact.detach().abs().max()
    unit = largest if largest > 0 else torch.ones_like(largest)
    errors.add(name, got.double() / unit, eager.double() / unit, exact / unit)


def test_pixel_loss():
    errors = Errors(torch.float32)

    @settings(max_examples=150, deadline=None)
    @given(image_pairs(), kinds, st.sampled_from(["mean", "sum", "none"]))
    def examples(pair, p, reduction):
        image, pred = pair
        results = []
        for fn, dtype in (
            (fastloss.pixel_loss, torch.float32), (eager_pixel, torch.float32), (eager_pixel, torch.float64)
        ):  # fmt: skip
            x = pred.to(dtype).detach().requires_grad_()
            loss = fn(image.to(dtype), x, p=p, reduction=reduction)
            loss.sum().backward()
            results.append((loss, x.grad))
        for what, got, eager, exact in zip(("value", "gradient"), *results, strict=True):
            add_relative(errors, what, got, eager, exact)

    examples()
    errors.check()


def test_pixel_loss_weight():
    """Any weight that broadcasts; halving all weights leaves the weighted mean as it is."""
    errors = Errors(torch.float32)

    @settings(max_examples=60, deadline=None)
    @given(image_pairs(), kinds, st.integers(0, 2**31))
    def examples(pair, p, seed):
        image, pred = pair
        generator = torch.Generator().manual_seed(seed)
        drop = torch.rand(image.ndim, generator=generator) < 0.5
        weight = torch.rand([1 if d else n for d, n in zip(drop, image.shape, strict=True)], generator=generator) + 0.1
        results = [
            fn(image.to(dtype), pred.to(dtype), p=p, weight=weight.to(dtype))
            for fn, dtype in ((fastloss.pixel_loss, torch.float32), (eager_pixel, torch.float32),
                              (eager_pixel, torch.float64))
        ]  # fmt: skip
        add_relative(errors, "weighted", *results)
        halved = fastloss.pixel_loss(image, pred, p=p, weight=weight / 2)
        torch.testing.assert_close(halved, results[0], rtol=1e-5, atol=1e-30)

    examples()
    errors.check()
