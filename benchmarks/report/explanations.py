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
    *(("cpu", loss, "*", shape, "memory", "torch.compile",
       "Both keep the logits, up to 64 MiB; ours holds blocks of their gradient and its transpose beside them.")
      for loss, shape in (("clip_loss", "4096x512"), ("supcon_loss", "2048x512"))),
    ("cpu", "siglip_loss", "*", "4096x512", "memory", "torch.compile",
     "Both keep 64 MiB of the logits' gradient; ours holds the embeddings in pieces of 256 columns, what oneDNN may "
     "add up, and transposed blocks beside it."),
    ("cpu", "clip_step", "*", "16384x512", "step", "torch.compile",
     "It keeps the gigabyte of logits, ours 64 MiB of them and makes the others again: a sixth of its memory."),
    ("cpu", "clip_loss", "*", "256x512", "both", "eager",
     "Level in an earlier run, 1.49 ms each. The machine has two speeds, and in the slower one short steps count for "
     "more, we guess: ours makes the same three products between more of them."),
    ("cpu", "clip_loss", "*", "4096x512", "*", "torch.compile",
     "Level on an Intel Xeon in both directions together, where ours was 1.19 times as fast on an AMD EPYC: the same "
     "three products of the library, which are faster there, so that the rest counts for more, we guess."),
    ("cpu", "feature_distance", "*", "*", "backward", "torch.compile",
     "Its forward, which takes twice as long as ours, leaves it as little to do: level but for noise. Compare both."),
    ("cpu", "info_nce", "*", "2048x512", "memory", "*",
     "The forward makes the gradients from all logits at once: 16 MiB of those, of their gradient and of its "
     "transpose."),
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
      for loss in ("info_nce", "info_nce bank", "clip_loss", "siglip_loss")),
    ("cpu", "smoothness_loss with guide and weight", "*", "*", "forward", "torch.compile",
     "Bound by the factors of the guide, made in one sweep for both directions, and by the sums of the two directions, "
     "each with its own weights. The backward makes the factors again and is the faster one; compare both."),
    ("cpu", "perceptual_step", "*", "*", "memory", "torch.compile",
     "By arithmetic: it keeps 8 bits of max_pool2d's 64-bit indices (10 MiB less), and fuses the backward of pooling, "
     "tap and ReLU, where autograd holds one gradient of the first block more (16 MiB). `Execution(chunk=1)` needs a "
     "third."),
    ("h200", "pixel_loss", "*", "*", "*", "torch.compile",
     "Its forward writes the difference, 24 MiB that lie in the L2 cache (60 MiB) when the backward comes; ours reads "
     "both images again from memory (since: from the last block on, not measured). Above the cache's size both move "
     "20 B per element."),
    ("h200", "smoothness_loss with guide and weight", "*", "*", "*", "torch.compile",
     "Its graph has the weighted means in it, ours had twenty launches for them, two thirds of the forward's time; and "
     "both of ours were bound by instructions, by ncu. Since: means in the op, a quarter of the instructions, not "
     "measured."),
    ("h200", "smoothness_loss", "*isotropic*", "*", "backward", "torch.compile",
     "Two derivatives, a root and a division for each of three pixels that pull at one; its "
     "forward, which keeps 24 MiB more, takes twice as long as ours. Compare both."),
    ("h200", "feature_distance", "*", "*", "memory", "torch.compile",
     "Two bits an element from the forward, 8 MiB, for which it need not keep the target's features; it does."),
    ("h200", "image_loss", "*", "*", "memory", "torch.compile",
     "Two bits an element from the forward, 6 MiB; torch.compile reads both images again."),
    ("h200", "ms_ssim_loss", "*", "*", "memory", "torch.compile",
     "The derivatives of each level are kept in float32, and of a bfloat16 prediction the float32 copy that avg_pool2d "
     "keeps, 24 MiB; torch.compile makes them again."),
    ("h200", "info_nce bank", "*", "*", "*", "torch.compile",
     "The lengths of the bank are a pass of their own (38 of 310 us), and some seventy small launches stand around the "
     "op, which torch.compile fuses. It keeps 113 MiB for the backward, ours 2. Since: one op, six launches, not "
     "measured."),
    ("h200", "info_nce", "*", "32768x768", "both", "torch.compile",
     "Chunks of rows, each with products of its own, in 446 MiB; torch.compile holds 5.1 GiB of logits."),
    ("h200", "info_nce", "*", "*", "forward", "*",
     "The forward makes the gradients as well (3 U), so that the backward is one multiplication: compare both."),
    ("h200", "clip_loss", "*", "*", "backward", "liger-kernel",
     "It makes the gradients in its forward; compare both."),
    ("h200", "clip_loss", "*", "*", "backward", "torch.compile",
     "It keeps the logits. Ours makes them again where their exponentials do not fit in `workspace_mib`, here at 32768 "
     "(4 U against 3 U, 0.5 against 4 GiB), and is the faster one in both directions together."),
    ("h200", "clip_loss", "*", "1024x768", "memory", "torch.compile",
     "Exponentials and the gradient of the logits, 2 MiB each, and float32 sums of the embeddings' gradients."),
    ("h200", "clip_loss", "*", "*", "memory", "*",
     "What `workspace_mib` allows, 256 by default, is used; they keep nothing of the logits and take 2 to 37 times as "
     "long. A smaller `workspace_mib` keeps less."),
)  # fmt: skip


def why(device: str, row: dict[str, str], mode: str) -> str:
    """The explanation of a lost row, or an empty string."""
    return _first((device, row["loss"], row["options"], row["shape"], mode, row["provider"]), EXPLANATIONS)


def _first(columns: tuple[str, ...], explanations: tuple[tuple[str, ...], ...]) -> str:
    for *patterns, text in explanations:
        if all(fnmatch.fnmatchcase(c, p.replace("[", "[[]")) for c, p in zip(columns, patterns, strict=True)):
            return text
    return ""


# (device, loss, options, inputs, dtype, measure, why); a row that nothing here matches is called "not explained".
INEXACT: tuple[tuple[str, ...], ...] = (
    *(("*", "supcon_loss", "*", inputs, "float32", "gradient",
       "The mean over a row's positives comes from the sum of its class, in M D operations, and its gradient is "
       "subtracted from that of the log-sum-exp as a vector, where both are nearly equal; eager subtracts in each "
       "logit. The reference, which has the same formula, is as far off, for each of three seeds.")
      for inputs in ("late", "anisotropic")),
)  # fmt: skip


def why_inexact(device: str, key: tuple[str, str, str, str, str], measure: str) -> str:
    """The explanation of a row in which another is more exact, or an empty string."""
    loss, options, _, dtype, inputs = key
    return _first((device, loss, options, inputs, dtype, measure), INEXACT)
