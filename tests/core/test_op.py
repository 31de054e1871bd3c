"""The mechanism: backend choice, the Loss base, the public surface, and what import needs."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch

import fastloss
from fastloss import core
from tests.conformance.cases import CASES

FUNCTIONS = [n for n in fastloss.__all__ if inspect.isfunction(getattr(fastloss, n))]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def test_every_public_loss_has_a_case():
    named = {case.name for case in CASES}
    others = (
        "loss_and_grads",
        "backend_report",
        "use_backend",
        "explain",
        "gram_matrix",
        "tap",
        "warmup",
        "cached_step",
        "collect_qk",
        "similar_pairs",
    )
    losses = {name for name in FUNCTIONS if not name.startswith(others)}
    assert losses <= named, f"no row in tests/conformance/cases for {sorted(losses - named)}"


@pytest.mark.parametrize("name", [n for n in fastloss.__all__ if not n.startswith("__")])
def test_every_public_name_is_documented(name):
    doc = inspect.getdoc(getattr(fastloss, name)) or ""
    assert len(doc) > 20, f"{name} has no docstring"
    if name in FUNCTIONS and name in {case.name for case in CASES}:
        for part in ("Args:", "Returns:", "Raises:", "Source:", ">>>"):
            assert part in doc, f"{name}'s docstring has no {part}"


def test_docstring_examples_run():
    import doctest

    for name in FUNCTIONS:
        function = getattr(fastloss, name)
        for example in doctest.DocTestFinder(recurse=False).find(function, name, globs={"torch": torch}):
            example.globs |= {n: getattr(fastloss, n) for n in fastloss.__all__}
            assert doctest.DocTestRunner().run(example).failed == 0, name


@pytest.mark.parametrize("absent", ["triton", "torchvision", "numpy", "typer"])
def test_import_needs_only_torch(absent):
    code = f"import sys; sys.modules[{absent!r}] = None; import torch, fastloss; "
    code += "print(fastloss.pixel_loss(torch.zeros(2, 3), torch.ones(2, 3)).item())"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0"


def test_import_without_the_extension_uses_the_reference(tmp_path):
    """The package's Python files alone, as a wheel built with no compiler has them."""
    import pathlib
    import shutil

    source = pathlib.Path(fastloss.__file__).parent
    shutil.copytree(source, tmp_path / "fastloss", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch, fastloss; from fastloss import core; "
        "assert fastloss.__file__.startswith(sys.path[0]); x = torch.rand(4, 3, requires_grad=True); "
        "fastloss.pixel_loss(torch.zeros(4, 3), x).backward(); "
        "torch.testing.assert_close(x.grad, x.detach() / 6); print(core.backend_report()['cpp'])"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "the C++ kernels are not in this installation" in done.stdout


def test_forced_backend_that_is_missing_raises_and_says_what_to_do():
    x = torch.zeros(2)
    with core.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced .* cannot serve pixel"):
        fastloss.pixel_loss(x, x)
    if not torch.cuda.is_available():
        with core.use_backend("triton"), pytest.raises(RuntimeError, match="device|triton"):
            fastloss.pixel_loss(x, x)
    with pytest.raises(ValueError, match="backend: expected one of"), core.use_backend("fast"):
        pass


def test_forced_backend_from_the_environment():
    code = "from fastloss import core; print(core.backends.state.forced)"
    assert python(code, FASTLOSS_BACKEND="reference").stdout.strip() == "reference"
    assert "backend: expected one of" in python(code, FASTLOSS_BACKEND="quick").stderr


def test_float64_and_unknown_devices_take_the_reference():
    op = core.op._OPS["pixel"]
    args = (None, "l2", 2.0, True)
    x = torch.zeros(2, dtype=torch.float64)
    assert op.backend(x, x, *args) == "reference"
    m = torch.zeros(2, device="meta")
    assert op.backend(m, m, *args) == "reference"


def test_gradient_that_an_op_does_not_provide_raises():
    op = core.op._OPS["pixel"]
    if not op.kernels["cpp"]:
        pytest.fail("the C++ extension is not built: run `pip install --no-build-isolation -e .`")
    x = torch.rand(4)
    weight = torch.rand(4, requires_grad=True)
    loss = op.fwd(x, x + 1, weight, "l2", 2.0, True)
    with pytest.raises(RuntimeError, match="no gradient is provided for 'weight'"):
        loss.backward()


def test_reduce():
    rows = torch.tensor([1.0, 2.0, 6.0])
    assert core.reduce(rows, "mean").item() == 3 and core.reduce(rows, "sum").item() == 9
    assert core.reduce(rows, "none") is rows
    with pytest.raises(ValueError, match="mean of an empty batch"):
        core.reduce(rows[:0], "mean")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        core.reduce(rows, "max")


def test_loss_base_keeps_tensor_options_as_state():
    class Scaled(core.Loss):
        """Test loss."""

        @staticmethod
        def fn(x, *, scale, offset=0.0):
            return (x * scale + offset).sum()

    loss = Scaled(scale=torch.nn.Parameter(torch.tensor(2.0)), offset=torch.tensor(1.0))
    assert dict(loss.named_parameters())["scale"].item() == 2 and "offset" in loss.state_dict()
    loss(torch.ones(3)).backward()
    assert loss.scale.grad.item() == 3
    assert loss(torch.ones(3), offset=0.0).item() == 6


def test_report_names_every_backend():
    report = core.backend_report()
    assert set(report) == set(core.BACKENDS) and report["reference"] == "available"


def test_ddp_trains_through_the_kernel():
    """A DDP-wrapped model gets the plain model's gradients (one gloo process)."""
    code = """
import os, torch, torch.distributed as dist, fastloss
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
plain = torch.nn.Conv2d(3, 3, 3, padding=1)
x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
expected = torch.autograd.grad(fastloss.pixel_loss(y, plain(x), p=1), list(plain.parameters()))
model = torch.nn.parallel.DistributedDataParallel(plain)
fastloss.PixelLoss(p=1)(y, model(x)).backward()
for p, e in zip(plain.parameters(), expected):
    torch.testing.assert_close(p.grad, e)
dist.destroy_process_group()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_compiles_with_dynamic_shapes_and_numbers():
    """torch.compile makes a changing size, and a changing number, symbolic; both must pass through the checks."""

    def both(image, image_pred, eps):
        pixel = fastloss.pixel_loss(image, image_pred, p="charbonnier", eps=eps)
        return pixel + fastloss.info_nce(image.flatten(1), image_pred.flatten(1), temperature=eps)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for size, eps in ((8, 0.1), (9, 0.2), (13, 0.3)):
        image, image_pred = torch.rand(2, 3, 2, size, 5)
        torch.testing.assert_close(compiled(image, image_pred, eps), both(image, image_pred, eps))
