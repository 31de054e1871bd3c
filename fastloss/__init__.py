"""fastloss: fused losses for contrastive and generative training in PyTorch.

What a family exports is exported here: a new loss needs no line in this file.
"""

from . import attention, contrastive, diversity, fusion, image, perceptual
from ._version import __version__
from .attention import *  # noqa: F403
from .contrastive import *  # noqa: F403
from .core import explain, use_backend
from .diversity import *  # noqa: F403
from .fusion import *  # noqa: F403
from .image import *  # noqa: F403
from .perceptual import *  # noqa: F403

__all__ = ["__version__", "explain", "use_backend"]
__all__ += attention.__all__
__all__ += contrastive.__all__
__all__ += diversity.__all__
__all__ += fusion.__all__
__all__ += image.__all__
__all__ += perceptual.__all__
