"""The compiled kernels: C++ for CPUs, CUDA C++ where there is nvcc. All else is in pyproject.toml, and works without.

FASTLOSS_REQUIRE_CPP=1: an error where the C++ kernels cannot be built, not a wheel without them. FASTLOSS_CUDA=1: an
error where those in CUDA C++ cannot, with the toolkit in CUDA_HOME or on the PATH; FASTLOSS_CUDA=0: they are left out;
FASTLOSS_CUDA=only: they alone are built, beside C++ kernels that may be there (`make cuda`).
FASTLOSS_SANITIZE=1: a build of the C++ under AddressSanitizer and UBSan in build/sanitize, which `make sanitize` loads;
it never takes the place of another.
"""

import os
import pathlib
import re
import subprocess
import warnings
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

REQUIRED = os.environ.get("FASTLOSS_REQUIRE_CPP") == "1"
SANITIZE = os.environ.get("FASTLOSS_SANITIZE") == "1"
CUDA = "0" if SANITIZE else os.environ.get("FASTLOSS_CUDA", "")  # "": where they can be built
MINIMUM_TORCH = "0x020b000000000000"  # 2.11: the stable ABI asked for, whatever torch this is built with
FAST = ["-O3", "-g0"]
CUDA_FLAGS = ["-O3", "-gencode=arch=compute_90a,code=sm_90a", "-DUSE_CUDA"]
CUDA_SOURCES = sorted(map(str, pathlib.Path("csrc").rglob("*.cu")))
CHECKED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=null"]


# What `fastloss bench` needs; a wheel has it in fastloss/_bench, a checkout where it is.
BENCH = ("benchmarks/__init__.py", "benchmarks/run.py", "benchmarks/harness/*.py", "benchmarks/workloads/*.py",
         "benchmarks/report/__init__.py", "benchmarks/report/verdict.py", "benchmarks/report/tables.py",
         "benchmarks/report/explanations.py", "tests/__init__.py", "tests/conformance/__init__.py",
         "tests/conformance/[ce]*.py", "tests/conformance/tools.py", "tests/conformance/cases/*.py")  # fmt: skip


class BuildPy(build_py):
    def bench(self) -> list[pathlib.Path]:
        return sorted(path for pattern in BENCH for path in pathlib.Path().glob(pattern))

    def run(self) -> None:
        super().run()
        for path in [] if self.editable_mode else self.bench():
            target = pathlib.Path(self.build_lib, "fastloss/_bench", path)
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))

    def get_source_files(self) -> list[str]:
        """What a source distribution has besides the package and what the extensions name."""
        return [*super().get_source_files(), *map(str, self.bench()), *CUDA_SOURCES]


def why_no_cuda() -> str | None:
    """Why the kernels in CUDA C++ are not compiled; None where they can be."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA == "0":
        return "FASTLOSS_CUDA=0"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if CUDA_HOME is None or not pathlib.Path(CUDA_HOME, "bin/nvcc").is_file():
        return f"no nvcc: it was looked for in CUDA_HOME ({CUDA_HOME}) and on the PATH; `make cuda` installs one"
    said = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.", said)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release and release[1]}, torch of {torch.version.cuda}: their major versions differ"
    return None


def cuda_extension(include: list[str], macros: list[tuple[str, str]]) -> Any:
    """fastloss/_cuda.abi3.so, of csrc/*/*.cu; None where it is not to be built."""
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension

    if why := why_no_cuda():
        if CUDA in ("1", "only"):
            raise RuntimeError(f"FASTLOSS_CUDA={CUDA}: {why}")
        return None
    libraries = [path for path in (f"{CUDA_HOME}/lib64", f"{CUDA_HOME}/lib") if pathlib.Path(path).is_dir()]
    runtime = ["-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
    return CppExtension("fastloss._cuda", CUDA_SOURCES, include_dirs=[*include, f"{CUDA_HOME}/include"],
                        define_macros=macros, library_dirs=libraries, libraries=["torch_cuda"],
                        extra_compile_args={"cxx": FAST, "nvcc": ["-std=c++20", *CUDA_FLAGS]},
                        extra_link_args=runtime, py_limited_api=True)  # fmt: skip


def extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            if SANITIZE:
                self.build_lib, self.build_temp, self.inplace = "build/sanitize", "build/sanitize/objects", False
            super().finalize_options()

        def build_extensions(self) -> None:
            for module in list(self.extensions):
                required = CUDA in ("1", "only") if module is cuda else REQUIRED or SANITIZE
                extensions, self.extensions = self.extensions, [module]
                try:
                    super().build_extensions()
                except Exception as error:
                    if required:
                        raise
                    what = "kernels in CUDA C++" if module is cuda else "C++ kernels"
                    warnings.warn(f"fastloss: no {what} ({error}); it runs without them", stacklevel=1)
                    pathlib.Path(self.get_ext_fullpath(module.name)).unlink(missing_ok=True)  # of an earlier build
                    extensions = [one for one in extensions if one is not module]
                self.extensions = self.distribution.ext_modules = extensions
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None and not self.extensions:  # Python alone: the wheel's tag (py3-none-any) says so
                wheel.root_is_pure, wheel.py_limited_api = True, False

    sources, headers = (sorted(map(str, pathlib.Path("csrc").rglob(ending))) for ending in ("*.cpp", "*.h"))
    flags = {"cxx": ["-std=c++20", *(CHECKED if SANITIZE else FAST), "-fvisibility=hidden"]}
    macros = [("TORCH_TARGET_VERSION", MINIMUM_TORCH)]
    here = os.path.abspath("csrc")  # ninja runs in another folder
    kernels = CppExtension("fastloss._C", sources, depends=headers, include_dirs=[here], define_macros=macros,
                           extra_compile_args=flags,
                           extra_link_args=["-fsanitize=address,undefined"] if SANITIZE else [],
                           py_limited_api=True)  # fmt: skip
    cuda = cuda_extension([here], macros)
    abi3 = {"bdist_wheel": {"py_limited_api": "cp310"}}
    modules = [cuda] if CUDA == "only" else [kernels, cuda]
    return {
        "ext_modules": [module for module in modules if module is not None],
        "cmdclass": {"build_ext": Build, "build_py": BuildPy},
        "options": abi3,
    }


try:
    arguments = extension()
except ImportError as error:
    if REQUIRED or SANITIZE:
        raise
    warnings.warn(f"fastloss: no C++ kernels (torch: {error})", stacklevel=1)
    arguments = {"cmdclass": {"build_py": BuildPy}}
setup(**arguments)
