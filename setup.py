"""The compiled CPU kernels. All else is in pyproject.toml, and works without them."""
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
                warnings.warn(f"fastloss: no C++ kernels ({error}); it runs on PyTorch operators", stacklevel=1)

    sources, headers = (sorted(map(str, pathlib.Path("csrc").glob(ending))) for ending in ("*.cpp", "*.h"))
    flags = {"cxx": ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]}
    macros = [("TORCH_TARGET_VERSION", MINIMUM_TORCH)]
    kernels = CppExtension("fastloss._C", sources, depends=headers, define_macros=macros, extra_compile_args=flags,
                           py_limited_api=True, optional=not REQUIRED)  # fmt: skip
    abi3 = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": Build}, "options": abi3}


try:
    arguments = extension()
except ImportError as error:
    if REQUIRED:
        raise
    warnings.warn(f"fastloss: no C++ kernels (torch: {error})", stacklevel=1)
    arguments = {}
setup(**arguments)
