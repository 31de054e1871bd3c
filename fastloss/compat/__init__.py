"""Drop-ins for the losses of other libraries: their names, arguments and results, computed by fastloss.

One file a library, imported on demand: ``from fastloss.compat.open_clip import ClipLoss`` in place of ``from open_clip
import ClipLoss``, or :func:`fastloss.patch` for code that stays as it is. A drop-in takes the library's arguments with
its defaults, has its attributes and state_dict keys, and returns its types in its dtype. It calls fastloss's public
functions where they compute the same; other calls go to the library's own code, with one warning that says why.
docs/migration.md says for each what differs.
"""

from .patching import LIBRARIES, patch

__all__ = ["LIBRARIES", "patch"]
