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
    ("cpu", "clip_loss", "*", "2048x512", "memory", "torch.compile",
     "The 16 MiB of logits are kept for the backward, as far as 64 MiB allow it: 3 U of arithmetic instead of 4 U."),
    ("cpu", "*", "*", "256x512", "*", "*",
     "65536 logits: the calls decide, not the arithmetic. Ours are eleven of dense torch around the log-sum-exp of the "
     "negatives alone, which keeps the digits of confident rows; one cross_entropy is quicker and loses them."),
    ("cpu", "siglip_loss", "*", "*", "forward", "*",
     "The forward makes the gradients as well (3 U), so that the backward is one multiplication: compare both."),
    ("cpu", "smoothness_loss with guide and weight", "*", "*", "forward", "torch.compile",
     "Bound by the factors of the guide, made in one sweep for both directions, and by the sums of the two directions, "
     "each with its own weights. The backward makes the factors again and is the faster one; compare both."),
    ("cpu", "smoothness_loss with guide and weight", "*", "*", "both", "torch.compile",
     "The forward above; the backward is the faster one, and the memory a quarter."),
)  # fmt: skip


def why(device: str, row: dict[str, str], mode: str) -> str:
    """The explanation of a lost row, or an empty string."""
    columns = (device, row["loss"], row["options"], row["shape"], mode, row["provider"])
    for *patterns, text in EXPLANATIONS:
        if all(fnmatch.fnmatchcase(c, p.replace("[", "[[]")) for c, p in zip(columns, patterns, strict=True)):
            return text
    return ""
