"""fastloss: fused losses for contrastive and generative training in PyTorch.

What a family exports is exported here: a new loss needs no line in this file.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from ._version import __version__


def _is_the_command() -> bool:
    """The process is `fastloss ...` or `python -m fastloss ...`, whose help, version and completion need no torch."""
    name = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    return name in ("fastloss", "fastloss.exe") or (name == "-m" and "fastloss" in sys.orig_argv)


if TYPE_CHECKING:
    from . import attention, contrastive, distributed, diversity, fusion, image, perceptual
    from .attention import *  # noqa: F403
    from .compat import patch
    from .contrastive import *  # noqa: F403
    from .core import explain, use_backend, warmup
    from .distributed import *  # noqa: F403
    from .diversity import *  # noqa: F403
    from .fusion import *  # noqa: F403
    from .image import *  # noqa: F403
    from .perceptual import *  # noqa: F403

    __all__ = ["__version__", "explain", "patch", "use_backend", "warmup"]
    __all__ += attention.__all__
    __all__ += contrastive.__all__
    __all__ += distributed.__all__
    __all__ += diversity.__all__
    __all__ += fusion.__all__
    __all__ += image.__all__
    __all__ += perceptual.__all__
else:
    _loaded = False

    def _load() -> None:
        global _loaded
        _loaded = True
        core = importlib.import_module(f"{__name__}.core")
        compat = importlib.import_module(f"{__name__}.compat")
        names = {"explain": core.explain, "patch": compat.patch, "use_backend": core.use_backend, "warmup": core.warmup}
        for family in ("attention", "contrastive", "distributed", "diversity", "fusion", "image", "perceptual"):
            module = importlib.import_module(f"{__name__}.{family}")
            names |= {name: getattr(module, name) for name in module.__all__}
        globals().update(names, __all__=["__version__", *names])

    def __getattr__(name: str) -> Any:
        """In the command's process: the first name asked for brings all the losses."""
        if not _loaded:
            _load()
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    if not _is_the_command():
        _load()
