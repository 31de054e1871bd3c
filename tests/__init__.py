"""The tests, in the folders of the package.

conformance/   every loss through every check, and the rows (cases) that describe the losses
triton/        Triton without a GPU: the interpreter, ahead-of-time compilation
core/, contrastive/, image/, perceptual/, diversity/, attention/, fusion/, recipes/   what the rows cannot say of each
compat/        drop-ins beside the libraries they stand for
benchmarks/    the benchmarks' own arithmetic
fuzz/          drawn calls of the whole public API
processes.py   ranks as processes
peers.py       other libraries' own tests, with their classes and with ours
sanitize.py    the C++ kernels under the sanitizers
conftest.py    devices, and memory that shows what was never written
"""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def kernel_files() -> list[str]:
    """Test files of kernels, marked so as a whole: run interpreted, on devices and under the sanitizers too."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.kernels" in path.read_text()]
    return sorted(str(path.relative_to(ROOT)) for path in files)
