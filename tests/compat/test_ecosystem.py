"""Drop-ins inside what people train with: compiled, exported, checkpointed, captured, under autocast and torch.func.

Across ranks: tests/distributed/drop_ins.py. In others' trainers: test_trainers.py.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

SCALE = 10.0


def pair(rows=8, dim=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=draw) for _ in range(2)]


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))


class Step(nn.Module):
    """An encoder and a library's loss of two views."""

    def __init__(self, loss, call=lambda loss, a, b: loss(a, b)):
        super().__init__()
        self.encoder, self.loss, self.call = encoder(), loss, call

    def forward(self, a, b):
        return self.call(self.loss, self.encoder(a), self.encoder(b))


LOSSES = {
    "clip": lambda: Step(pytest.importorskip("fastloss.compat.open_clip").ClipLoss(), lambda f, a, b: f(a, b, SCALE)),
    "siglip": lambda: Step(
        pytest.importorskip("fastloss.compat.open_clip").SigLipLoss(), lambda f, a, b: f(a, b, SCALE, -SCALE)
    ),
    "info_nce": lambda: Step(pytest.importorskip("fastloss.compat.info_nce").InfoNCE()),
    "nt_xent": lambda: Step(pytest.importorskip("fastloss.compat.lightly").NTXentLoss()),
}


def gradients(step, *inputs):
    step.zero_grad()
    value = step(*inputs)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in step.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip"])
def test_compiled_whole_for_all_batches(name):
    """One graph, traced for the first batch and not again for other numbers of rows."""
    step = LOSSES[name]()
    torch._dynamo.reset()
    traced = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=traced)
    counts = []
    for rows in (8, 12, 5):
        torch.testing.assert_close(gradients(compiled, *pair(rows)), gradients(step, *pair(rows)))
        counts.append(traced.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LOSSES))
def test_exported(name):
    step = LOSSES[name]()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(step, tuple(pair()), dynamic_shapes=({0: rows}, {0: rows}))
    torch.testing.assert_close(program.module()(*pair(5)), step(*pair(5)))


@pytest.mark.parametrize("name", list(LOSSES))
def test_autocast_and_a_gradient_scaler(name):
    """Gradients of a scaled loss of half-precision embeddings, unscaled, beside those of float32."""
    step, exact = LOSSES[name](), gradients(LOSSES[name](), *pair())
    optimizer, scaler = torch.optim.SGD(step.parameters(), lr=0.0), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", torch.bfloat16):
        value = step(*pair())
    assert value.dtype == torch.float32
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    found = [value.detach(), *(p.grad for p in step.parameters())]
    for got, wanted in zip(found, exact, strict=True):
        assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max() + 1e-3


@pytest.mark.parametrize("name", list(LOSSES))
def test_checkpointed(name):
    """The loss computed again in the backward, of activations made again."""
    step = LOSSES[name]()
    exact = gradients(step, *pair())
    step.zero_grad()
    value = checkpoint(step, *pair(), use_reentrant=False)
    value.backward()
    torch.testing.assert_close([value.detach(), *(p.grad for p in step.parameters())], exact)


@pytest.mark.parametrize("name", list(LOSSES))
def test_torch_func(name):
    """Gradients by torch.func, and of each of three batches under vmap: PyTorch's operators compute these."""
    step = LOSSES[name]()
    parameters = dict(step.named_parameters())

    def loss(given, a, b):
        return torch.func.functional_call(step, given, (a, b))

    found = torch.func.grad(loss)(parameters, *pair())
    torch.testing.assert_close(list(found.values()), gradients(step, *pair())[1:])
    batches = [torch.stack(views) for views in zip(*(pair(seed=seed) for seed in range(3)), strict=True)]
    several = torch.func.vmap(loss, in_dims=(None, 0, 0))(parameters, *batches)
    torch.testing.assert_close(several, torch.stack([step(*pair(seed=seed)) for seed in range(3)]))


@pytest.mark.parametrize("name", list(LOSSES))
def test_embeddings_of_inference_mode(name):
    """A frozen encoder's embeddings as the other view, which the libraries themselves may refuse; and all of it."""
    step, (a, b) = LOSSES[name](), pair()
    with torch.inference_mode():
        frozen, whole = step.encoder(b), step(a, b)
    value = step.call(step.loss, step.encoder(a), frozen)
    value.backward()
    torch.testing.assert_close([value.detach(), whole], [step(a, b).detach()] * 2)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in step.parameters())


SPARSE = {
    "info_nce": lambda m: m.InfoNCE()(torch.rand(4, 8).to_sparse(), torch.rand(4, 8)),
    "kornia": lambda m: m.ssim_loss(torch.rand(1, 3, 16, 16).to_sparse(), torch.rand(1, 3, 16, 16), 5),
    "lightly": lambda m: m.NTXentLoss()(torch.rand(4, 8).to_sparse(), torch.rand(4, 8)),
    "piq": lambda m: m.ssim(torch.rand(1, 3, 16, 16).to_sparse(), torch.rand(1, 3, 16, 16)),
}


@pytest.mark.parametrize("library", list(SPARSE))
def test_sparse_inputs(library):
    """An error that says so, in place of what an operator of the library's says; ours where it is not installed."""
    module = pytest.importorskip(f"fastloss.compat.{library}")
    with pytest.raises(
        (RuntimeError, TypeError), match="expected (a dense tensor|dense tensors), got .*torch.sparse_coo"
    ):
        SPARSE[library](module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are captured on a CUDA device")
@pytest.mark.parametrize("name", list(LOSSES))
def test_captured_in_a_cuda_graph(name):
    """A step replayed with new inputs is the step of these inputs."""
    step = LOSSES[name]().cuda()
    static, new = ([t.cuda() for t in pair(seed=seed)] for seed in (0, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(step, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [step(*static)]
        captured += torch.autograd.grad(captured[0], list(step.parameters()))
    for held, given in zip(static, new, strict=True):
        held.copy_(given)
    graph.replay()
    torch.testing.assert_close([t.detach() for t in captured], gradients(step, *new))
