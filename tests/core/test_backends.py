"""Which backend is forced: per thread and task, by the environment, and under torch.compile."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastloss
from fastloss import core

ENVIRONMENT = core.backends.state.forced


def forced() -> str | None:
    return core.backends.state.forced


def test_overlapping_threads_leave_each_other_alone():
    """Blocks that do not nest: A enters, B enters, A leaves, B leaves."""
    seen, steps = {}, {name: threading.Event() for name in ("a entered", "b entered", "a left")}

    def a() -> None:
        with core.use_backend("reference"):
            steps["a entered"].set()
            assert steps["b entered"].wait(20)
            seen["a inside"] = forced()
        seen["a after"] = forced()
        steps["a left"].set()

    def b() -> None:
        assert steps["a entered"].wait(20)
        seen["b before"] = forced()
        with core.use_backend("cuda"):
            steps["b entered"].set()
            assert steps["a left"].wait(20)
            seen["b inside"] = forced()
        seen["b after"] = forced()

    threads = [threading.Thread(target=work) for work in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {
        "a inside": "reference", "a after": ENVIRONMENT, "b before": ENVIRONMENT, "b inside": "cuda",
        "b after": ENVIRONMENT,
    }  # fmt: skip
    assert forced() == ENVIRONMENT


def test_tasks_have_their_own():
    async def task(name: str | None, waits: int) -> list[str | None]:
        seen = []
        with core.use_backend(name):
            for _ in range(waits):
                await asyncio.sleep(0)
                seen.append(forced())
        return [*seen, forced()]

    async def look() -> str | None:
        return forced()

    async def inherits() -> str | None:
        with core.use_backend("reference"):
            return await asyncio.create_task(look())

    async def main() -> None:
        some = await asyncio.gather(task("reference", 3), task("cuda", 5), task(None, 2))
        assert some == [["reference"] * 3 + [ENVIRONMENT], ["cuda"] * 5 + [ENVIRONMENT], [None] * 2 + [ENVIRONMENT]]
        assert await inherits() == "reference"

    asyncio.run(main())
    assert forced() == ENVIRONMENT


def test_blocks_nest_and_end_with_an_exception():
    with core.use_backend("reference"):
        with core.use_backend(None):
            assert forced() is None
            with core.use_backend("cuda"):
                assert forced() == "cuda"
            assert forced() is None
        with contextlib.suppress(KeyError), core.use_backend("cuda"):
            raise KeyError
        assert forced() == "reference"
        with pytest.raises(ValueError, match="backend: expected one of"), core.use_backend("fast"):
            pass
        assert forced() == "reference"
    assert forced() == ENVIRONMENT


def test_a_generator_closed_in_another_context_leaves_nothing():
    def generator():
        with core.use_backend("reference"):
            yield

    opened = generator()
    contextvars.copy_context().run(next, opened)
    opened.close()
    assert forced() == ENVIRONMENT


def test_new_threads_follow_the_environment():
    code = (
        "import threading; from fastloss import core; seen = []; "
        "look = lambda: seen.append(core.backends.state.forced)\n"
        "with core.use_backend('cuda'):\n    t = threading.Thread(target=look); t.start(); t.join()\n"
        "print(seen)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env=os.environ | {"FASTLOSS_BACKEND": "reference"},
    )  # fmt: skip
    assert done.stdout.strip() == "['reference']", done.stderr


def _graph_ops(fn, *args) -> set[str]:
    """Names of what the compiled graph calls."""
    found: set[str] = set()

    def look(graph, _):
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(fn, fullgraph=True, backend=look)(*args)
    return found


@pytest.mark.skipif(not core.op._OPS["pixel"].kernels["cpp"], reason="about the C++ kernels")
def test_compiled_functions_follow_the_block():
    """Outside a compiled function it means another graph, inside it works; every call gives the eager value."""
    x, y = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    kernel = "fastloss.pixel_fwd.default"

    def inside(x, y):
        with core.use_backend("reference"):
            one = fastloss.pixel_loss(x, y)
        return one, fastloss.pixel_loss(x, y, p=1)

    assert kernel in _graph_ops(fastloss.pixel_loss, x, y)
    with core.use_backend("reference"):
        assert kernel not in _graph_ops(fastloss.pixel_loss, x, y)
    assert kernel in _graph_ops(inside, x, y)
    assert core.backends.state.traced == core.backends._UNSET and forced() == ENVIRONMENT

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(fastloss.pixel_loss, fullgraph=True, backend=counter)
    for name in (None, "reference", "cpp", None, "reference"):
        with core.use_backend(name):
            torch.testing.assert_close(compiled(x, y), fastloss.pixel_loss(x, y))
    assert counter.frame_count == 3  # one graph for each of None, "reference" and "cpp"


@pytest.mark.skipif(not core.op._OPS["pixel"].kernels["cpp"], reason="about the C++ kernels")
def test_the_backward_follows_its_forward():
    """After the block, in another thread, twice, and of a checkpoint that is told the block."""
    x, y = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)

    def graph(loss: torch.Tensor) -> str:
        return loss.grad_fn.next_functions[0][0].name()

    with core.use_backend("reference"):
        leaf = y.clone().requires_grad_()
        loss = fastloss.pixel_loss(x, leaf)
    assert "pixel" not in graph(loss)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join(20)
    torch.testing.assert_close(leaf.grad, 2 * (y - x) / y.numel())

    leaf = y.clone().requires_grad_()
    with core.use_backend("cpp"):
        loss = fastloss.pixel_loss(x, leaf, p=3)
    assert "pixel" in graph(loss)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(first, 3 * (y - x).abs() * (y - x) / y.numel())
    torch.testing.assert_close(second, 6 * (y - x).abs() / y.numel())

    leaf = y.clone().requires_grad_()
    blocks = lambda: (contextlib.nullcontext(), core.use_backend("reference"))  # noqa: E731
    with core.use_backend("reference"):
        loss = checkpoint(fastloss.pixel_loss, x, leaf, use_reentrant=False, context_fn=blocks)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * (y - x) / y.numel())
