"""The compiled CPU kernels. All else is in pyproject.toml, and works without them."""

from __future__ import annotations

import os
import pathlib
import warnings

from setuptools import setup

REQUIRED = os.environ.get("FASTLOSS_REQUIRE_CPP") == "1"
MINIMUM_TORCH = "0x020b000000000000"  # 2.11: the stable ABI asked for, whatever torch this is built with


def extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if REQUIRED:
                    raise
                warnings.warn(f"fastloss: no C++ kernels ({error}); its losses run on PyTorch operators", stacklevel=1)

    sources = sorted(str(path) for path in pathlib.Path("csrc").glob("*.cpp"))
    options = {"cxx": ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]}
    macros = [("TORCH_TARGET_VERSION", MINIMUM_TORCH)]
    kernels = CppExtension("fastloss._C", sources, define_macros=macros, extra_compile_args=options,
                           depends=[str(path) for path in pathlib.Path("csrc").glob("*.h")],
                           py_limited_api=True, optional=not REQUIRED)  # fmt: skip
    wheel = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": Build}, "options": wheel}


try:
    arguments = extension()
except ImportError as error:
    if REQUIRED:
        raise
    warnings.warn(f"fastloss: no C++ kernels (torch: {error})", stacklevel=1)
    arguments = {}
setup(**arguments)
