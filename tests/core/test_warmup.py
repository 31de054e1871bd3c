"""warmup(): what runs, and what it leaves as it was. With kernels: tests/triton/test_compilations.py."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fastloss
from fastloss import warmup

IMAGE, PRED = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)


class Seen:
    """A loss that writes down what it was given, and which gradients arrived."""

    def __init__(self, loss):
        self.loss, self.calls, self.gradients = loss, [], []

    def __call__(self, *args, **options):
        self.calls.append((args, options))
        out = self.loss(*args, **options)
        if isinstance(out, torch.Tensor) and out.requires_grad:
            out.register_hook(lambda g: self.gradients.append((tuple(g.shape), g.stride())))
        return out


def test_forward_and_backward_run_and_leave_no_gradient():
    pred, seen = PRED.clone().requires_grad_(), Seen(fastloss.pixel_loss)
    kept = pred.grad = torch.ones_like(pred)
    done = warmup(seen, IMAGE, pred, p=1)
    assert done.kernels == 0 and 0 < done.seconds < 60
    assert [options for _, options in seen.calls] == [{"p": 1}] * 2 and seen.gradients == [((), ())] * 2
    assert pred.grad is kept and (kept == 1).all()


def test_a_map_has_both_sorts_of_gradients():
    seen = Seen(functools.partial(fastloss.pixel_loss, reduction="none"))
    warmup(seen, IMAGE, PRED.clone().requires_grad_())
    assert seen.gradients == [((2, 3, 8, 8), (192, 64, 8, 1))] * 2 + [((2, 3, 8, 8), (0, 0, 0, 0))] * 2


def test_an_output_of_a_network_keeps_its_graph():
    layer = nn.Conv2d(3, 3, 1)
    pred = layer(PRED)
    warmup(fastloss.pixel_loss, IMAGE, pred)
    assert layer.weight.grad is None
    pred.sum().backward()
    assert layer.weight.grad is not None


def test_lists_named_tuples_and_parts():
    features = [torch.rand(2, 4, 4, requires_grad=True) for _ in range(3)]
    seen = Seen(fastloss.feature_distance)
    warmup(seen, features, [torch.rand(2, 4, 4) for _ in range(3)], weights=(1.0, 2.0, 3.0))
    (given, _), options = seen.calls[0]
    assert all(g is not f and g.data_ptr() == f.data_ptr() for g, f in zip(given, features, strict=True))
    assert options == {"weights": (1.0, 2.0, 3.0)} and all(f.grad is None for f in features)
    warmup(fastloss.image_loss, IMAGE, PRED.clone().requires_grad_(), pixel=(1, 1.0), smoothness=(1, 0.1))


class Noisy(nn.Module):
    """A loss with everything that a step changes."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = nn.BatchNorm2d(3), nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", torch.full((2,), float("nan")))

    def forward(self, image, pred):
        self.count = self.count + 1  # another tensor each time
        self.seen.add_(1)
        return fastloss.pixel_loss(image, self.norm(pred + torch.rand_like(pred))) * self.scale


def test_a_module_is_as_it_was():
    loss = Noisy()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    ids = {name: id(buffer) for name, buffer in loss.named_buffers()}
    state = torch.get_rng_state()
    warmup(loss, IMAGE, PRED)
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert ids == {name: id(buffer) for name, buffer in loss.named_buffers()}
    assert torch.equal(torch.get_rng_state(), state) and loss.training
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="image_pred"):  # a call that fails, too
        warmup(loss, IMAGE[:1], PRED)
    assert loss.count == 0 and loss.norm.num_batches_tracked == 0
    warmup(loss.forward, IMAGE, PRED)
    assert loss.count == 0


def test_adaptive_weights_do_not_move():
    fuse = fastloss.CompositeLoss({"a": 1.0, "b": 1.0}, weighting="dwa")
    before = {name: value.clone() for name, value in fuse.state_dict().items()}
    warmup(fuse, {"a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor(2.0, requires_grad=True)})
    assert all(torch.equal(value, before[name]) for name, value in fuse.state_dict().items())


def test_a_learned_scale_in_a_closure_gets_its_gradient_too():
    scale, x = nn.Parameter(torch.tensor(10.0)), torch.eye(4)
    arrived = []
    scale.register_hook(arrived.append)
    warmup(lambda a, b: fastloss.clip_loss(a, b, logit_scale=scale), x, x)
    assert len(arrived) == 2 and scale.grad is None


def test_a_compiled_loss_is_compiled_before_its_first_step():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastloss.pixel_loss, backend=counter)
    pred = PRED.clone().requires_grad_()
    warmup(compiled, IMAGE, pred)
    assert counter.frame_count == 1
    compiled(IMAGE, pred).backward()
    assert counter.frame_count == 1


def test_no_gradient():
    with pytest.raises(ValueError, match="warmup: expected an example with a tensor that requires a gradient"):
        warmup(fastloss.pixel_loss, IMAGE, PRED)
    seen = Seen(fastloss.pixel_loss)
    with torch.no_grad():
        warmup(seen, IMAGE, PRED.clone().requires_grad_())
    assert len(seen.calls) == 2 and seen.gradients == []
