"""cached_step against the same pieces with graphs: gradients, random numbers, buffers, one reduction under DDP."""

from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

from fastloss import cached_step, clip_loss, info_nce
from tests.distributed.encoders import CHUNK, Encoder, loss_of, with_graphs


def check_same(ours: Tensor, theirs: Tensor, encoders: tuple, others: tuple, atol: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for one, two in zip(encoders, others, strict=True):
        for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        for p, q in zip(one.buffers(), two.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["plain", "dropout", "norm", "scale"])
def test_gradients_random_numbers_and_buffers(kind, autocast):
    options = {
        "dropout": 0.3 if kind in ("dropout", "scale") else 0.0,
        "norm": kind == "norm",
        "scale": kind == "scale",
    }
    encoders = Encoder(12, **options), Encoder(10, dropout=0.2)
    others = copy.deepcopy(encoders)
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 12, generator=g), torch.randn(20, 10, generator=g)
    found, states = [], []
    for fn, of in ((cached_step, encoders), (with_graphs, others)):
        torch.manual_seed(9)
        # its cache would add up the pieces' gradients of a weight in bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=fn is cached_step):
            more = {"chunk": CHUNK} if fn is with_graphs else {"loss_fn": loss_of, "chunk": CHUNK}
            found.append(fn(of, inputs, **more))
        states.append(torch.get_rng_state())
    check_same(*found, encoders, others)
    assert torch.equal(*states)


def test_one_encoder_for_two_inputs_of_different_lengths_as_mappings():
    one = Encoder(12, dropout=0.3, norm=True)
    two = copy.deepcopy(one)
    x, y = torch.randn(10, 12), torch.randn(14, 12)
    torch.manual_seed(1)
    inputs = UserDict({"x": x}), {"x": y}
    fn = lambda a, b: info_nce(a, b, temperature=0.5)  # noqa: E731
    ours = cached_step((one, one), inputs, fn, chunk=4)
    torch.manual_seed(1)
    check_same(ours, with_graphs((two, two), (x, y), fn, chunk=4), (one,), (two,))


def test_a_frozen_encoder_runs_once_and_loss_fn_reads_a_parameter():
    frozen, learned = Encoder(12, norm=True).requires_grad_(False), Encoder(10)
    others = copy.deepcopy((frozen, learned))
    scale = nn.Parameter(torch.tensor(3.0))
    x, y, calls, done = torch.randn(10, 12), torch.randn(10, 10), [], []
    fn = lambda a, b: clip_loss(a, b, logit_scale=scale)  # noqa: E731

    def embed(encoder: nn.Module, piece: Tensor) -> Tensor:
        calls.append(encoder)
        return encoder(piece)

    ours = cached_step((frozen, learned), (x, y), fn, chunk=4, embed=embed, progress=lambda *now: done.append(now))
    grad, scale.grad = scale.grad, None
    check_same(ours, with_graphs(others, (x, y), fn, chunk=4), (frozen, learned), others)
    torch.testing.assert_close(grad, scale.grad)
    assert [calls.count(frozen), calls.count(learned)] == [3, 6]
    assert done == [(i, 9) for i in range(1, 10)]


def test_a_loss_scale_reaches_the_gradients():
    one = Encoder(12)
    two = copy.deepcopy(one)
    x, scaler = torch.randn(8, 12), torch.amp.GradScaler("cpu", init_scale=1024.0)
    fn = lambda a: a.square().mean()  # noqa: E731
    loss = cached_step((one,), (x,), fn, chunk=3, scaler=scaler)
    torch.testing.assert_close(loss, with_graphs((two,), (x,), fn, chunk=3))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 1024 * q.grad)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"chunk": 0}, ValueError, "chunk: expected a whole number from 1"),
        ({"encoders": nn.Linear(2, 2)}, TypeError, "encoders: expected a tuple"),
        ({"inputs": ()}, ValueError, "inputs: expected one per encoder"),
        ({"inputs": (torch.ones(0, 2),)}, ValueError, r"M >= 1"),
        (
            {"inputs": ((torch.ones(3, 2), torch.ones(4, 2)),)},
            ValueError,
            r"of one length within an input, got \[3, 4\]",
        ),
        ({"embed": (len, len)}, ValueError, "embed: expected one function, or one per encoder, 1, got 2"),
        ({"embed": lambda e, x: e(x).sum(0)}, ValueError, "name it in `numbers`"),
        ({"embed": lambda e, x: "text"}, TypeError, "embed: expected tensors"),
        ({"loss_fn": lambda x: x}, ValueError, r"loss_fn: expected a scalar loss, got shape \(5, 2\)"),
        ({"progress": 3}, TypeError, "progress: expected True or False"),
        ({"reduce": "piece"}, ValueError, "reduce: expected one of"),
    ],
)
def test_what_it_refuses(change, error, said):
    options = {"encoders": (nn.Linear(2, 2),), "inputs": (torch.ones(5, 2),), "loss_fn": torch.sum, "chunk": 3} | change
    with pytest.raises(error, match=said):
        cached_step(**options)


def test_buffers_and_generators_are_as_before_when_an_encoder_fails():
    encoder = Encoder(12, norm=True, dropout=0.5)
    before = copy.deepcopy(encoder.state_dict())

    def fails(module: nn.Module, piece: Tensor) -> Tensor:
        module(piece)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_step((encoder,), (torch.randn(5, 12),), torch.sum, chunk=2, embed=fails)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
