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
    ("cpu", "clip_loss", "*", "8192x512", "*", "torch.compile",
     "It keeps the 256 MiB of logits, 3 U of arithmetic in three times our memory; ours keeps 64 MiB of them and makes "
     "the others again, 3.75 U. Its forward is the slower one."),
    ("cpu", "clip_loss", "*", "2048x512", "memory", "*",
     "The forward makes the gradients from all logits at once: 16 MiB of those, of their gradient and of its "
     "transpose."),
    ("cpu", "clip_loss", "*", "256x512", "both", "eager",
     "Level in an earlier run, 1.49 ms each. The machine has two speeds, and in the slower one short steps count for "
     "more, we guess: ours makes the same three products between more of them."),
    ("cpu", "feature_distance", "*", "*", "backward", "torch.compile",
     "Its forward, which takes twice as long as ours, leaves it as little to do: level but for noise. Compare both."),
    ("cpu", "siglip_loss", "*", "1024x512", "memory", "torch.compile",
     "4 MiB of the logits' gradient, and as much of embeddings in pieces of 256 columns, what oneDNN may add up."),
    ("cpu", "supcon_loss", "*", "4096x512", "memory", "torch.compile",
     "Both keep 64 MiB of logits; ours holds blocks of their gradient and its transpose beside them."),
    ("cpu", "feature_distance", "*", "*", "memory", "torch.compile",
     "It reads both lists again, ours keeps two bits an element, 8 MiB: the target's features, 122 MiB, are free after "
     "the forward, which this benchmark, whose inputs stay alive, does not show."),
    ("cpu", "dists_distance", "*", "*", "forward", "torch.compile",
     "Sums in double, and squares about the means: two passes over what is in the cache, for the digits of two. The "
     "backward is the faster one; compare both."),
    ("cpu", "style_distance", "*", "*", "forward", "*",
     "Nearly all of it is torch.bmm, which each of them calls: what is ours begins in the backward."),
    *(("cpu", loss, "*", "*", "forward", "*",
       "The forward makes the gradients as well (3 U), so that the backward is one multiplication: compare both.")
      for loss in ("info_nce", "clip_loss", "siglip_loss")),
    ("cpu", "smoothness_loss with guide and weight", "*", "*", "forward", "torch.compile",
     "Bound by the factors of the guide, made in one sweep for both directions, and by the sums of the two directions, "
     "each with its own weights. The backward makes the factors again and is the faster one; compare both."),
    ("cpu", "perceptual_step", "*", "*", "memory", "torch.compile",
     "By arithmetic: it keeps 8 bits of max_pool2d's 64-bit indices (10 MiB less), and fuses the backward of pooling, "
     "tap and ReLU, where autograd holds one gradient of the first block more (16 MiB). `Execution(chunk=1)` needs a "
     "third."),
)  # fmt: skip


def why(device: str, row: dict[str, str], mode: str) -> str:
    """The explanation of a lost row, or an empty string."""
    columns = (device, row["loss"], row["options"], row["shape"], mode, row["provider"])
    for *patterns, text in EXPLANATIONS:
        if all(fnmatch.fnmatchcase(c, p.replace("[", "[[]")) for c, p in zip(columns, patterns, strict=True)):
            return text
    return ""
