"""The compiled CPU kernels. All else is in pyproject.toml, and works without them.

FASTLOSS_REQUIRE_CPP=1: an error where they cannot be built, not a wheel without them. FASTLOSS_SANITIZE=1: a build
under AddressSanitizer and UBSan in build/sanitize, which `make sanitize` loads; it never takes the place of another.
"""

import os
import pathlib
import warnings

from setuptools import setup
from setuptools.command.build_py import build_py

REQUIRED = os.environ.get("FASTLOSS_REQUIRE_CPP") == "1"
SANITIZE = os.environ.get("FASTLOSS_SANITIZE") == "1"
MINIMUM_TORCH = "0x020b000000000000"  # 2.11: the stable ABI asked for, whatever torch this is built with
FAST = ["-O3", "-g0"]
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
        return [*super().get_source_files(), *map(str, self.bench())]


def extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            if SANITIZE:
                self.build_lib, self.build_temp, self.inplace = "build/sanitize", "build/sanitize/objects", False
            super().finalize_options()

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if REQUIRED or SANITIZE:
                    raise
                warnings.warn(f"fastloss: no C++ kernels ({error}); it runs on PyTorch operators", stacklevel=1)
                self.leave_out()

        def leave_out(self) -> None:
            """Go on as a package of Python alone, so that the wheel's tag (py3-none-any) says what is in it."""
            for module in self.extensions:
                pathlib.Path(self.get_ext_fullpath(module.name)).unlink(missing_ok=True)  # of an earlier build
            self.extensions = self.distribution.ext_modules = []
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure, wheel.py_limited_api = True, False

    sources, headers = (sorted(map(str, pathlib.Path("csrc").rglob(ending))) for ending in ("*.cpp", "*.h"))
    flags = {"cxx": ["-std=c++20", *(CHECKED if SANITIZE else FAST), "-fvisibility=hidden"]}
    macros = [("TORCH_TARGET_VERSION", MINIMUM_TORCH)]
    here = os.path.abspath("csrc")  # ninja runs in another folder
    kernels = CppExtension("fastloss._C", sources, depends=headers, include_dirs=[here], define_macros=macros,
                           extra_compile_args=flags,
                           extra_link_args=["-fsanitize=address,undefined"] if SANITIZE else [],
                           py_limited_api=True)  # fmt: skip
    abi3 = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": Build, "build_py": BuildPy}, "options": abi3}


try:
    arguments = extension()
except ImportError as error:
    if REQUIRED or SANITIZE:
        raise
    warnings.warn(f"fastloss: no C++ kernels (torch: {error})", stacklevel=1)
    arguments = {"cmdclass": {"build_py": BuildPy}}
setup(**arguments)
