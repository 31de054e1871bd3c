"""Why fastloss loses a row, for benchmarks/REPORT.md. A lost row that nothing here matches fails a test.

(device, loss, options, shape, mode, provider, why): the first six are shell patterns against the columns of the results
(`memory` is the mode of a row lost in peak memory). The first that matches is taken.
"""

from __future__ import annotations

import fnmatch

EXPLANATIONS = (
    ("cpu", "pixel_loss", "*", "*", "backward", "torch.compile",
     "It keeps the difference (or its sign) from the forward and writes the gradient over it, 8 B per element; ours "
     "keeps nothing and reads both images again, 12 B. Its forward, which stores that, is slower by more."),
    ("cpu", "pixel_loss", "*charbonnier*", "*", "both", "torch.compile",
     "Level within the noise of several runs: a square root and a division per element bound both, not bytes."),
)  # fmt: skip


def why(device: str, row: dict[str, str], mode: str) -> str:
    """The explanation of a lost row, or an empty string."""
    columns = (device, row["loss"], row["options"], row["shape"], mode, row["provider"])
    for *patterns, text in EXPLANATIONS:
        if all(fnmatch.fnmatchcase(c, p.replace("[", "[[]")) for c, p in zip(columns, patterns, strict=True)):
            return text
    return ""
