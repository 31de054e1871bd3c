"""Which GPUs the Triton kernels serve, and what is known of each kind.

One table, KINDS: `fastloss info`, the table of docs/install.md and the fallback of backends.py are made from it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

MEASURED, COMPILED, UNTRIED, UNSUPPORTED = "measured", "compiled only", "not tried", "not supported"
LEAST_CAPABILITY = (8, 0)  # below it there is no bfloat16 for the matrix instructions
# What a program of a kernel may need. The smallest limit among the kinds: all kernels are compiled ahead of time to it.
SHARED_BYTES = 99 * 1024


class Kind(NamedTuple):
    """What is known of a kind of GPUs."""

    models: str  # some of that kind
    state: str  # MEASURED: values and times on a device; COMPILED: every kernel compiles, none ran on a device
    note: str = ""


KINDS = {  # NVIDIA's by compute capability, AMD's by architecture
    "sm_80": Kind("A100, A30", COMPILED),
    "sm_86": Kind("RTX 30, A10, A40", COMPILED),
    "sm_89": Kind("RTX 40, L4, L40", COMPILED),
    "sm_90": Kind("H100, H200, GH200", MEASURED, "on an H200"),
    "sm_100": Kind("B200, GB200", COMPILED, "with triton 3.6 some contrastive calls with ids do not compile"),
    "sm_120": Kind("RTX 50, RTX PRO 6000", COMPILED),
    "gfx942": Kind("MI300X, MI300A, MI325X", COMPILED),
}
# What GPUs that are not in KINDS are: (which, state, note).
OTHERS = (
    ("others of capability 8.0 and up", UNTRIED, "served by the kernels of the kind below"),
    ("capability below 8.0", UNSUPPORTED, "V100, T4, RTX 20: the reference, with one warning"),
    ("others of AMD", UNSUPPORTED, "the reference, with one warning"),
)


def name_of(properties: Any) -> str:
    """The kind, e.g. "sm_90" or "gfx942", of what `torch.cuda.get_device_properties` returns."""
    architecture = str(
        getattr(properties, "gcnArchName", "")
    )  # "gfx942:sramecc+:xnack-"; of NVIDIA's the model or none
    if architecture.startswith("gfx"):
        return architecture.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def why_unsupported(properties: Any) -> str | None:
    """Why the kernels do not run on a GPU, in a sentence; None where they do."""
    name = name_of(properties)
    if name.startswith("gfx"):
        amd = [kind for kind in KINDS if kind.startswith("gfx")]
        return None if name in amd else f"of AMD's GPUs the kernels serve {', '.join(amd)}, not {name}"
    capability = properties.major, properties.minor
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
        return f"the kernels need compute capability {least}, this GPU has {found}"
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES)
    if shared < SHARED_BYTES:
        return f"the kernels need {SHARED_BYTES // 1024} KiB of shared memory a block, this GPU has {shared // 1024}"
    return None


def described(properties: Any) -> str:
    """What `fastloss info` says of a GPU: measured, compiled only, not tried, or not supported and why."""
    name = name_of(properties)
    if why := why_unsupported(properties):
        return f"{UNSUPPORTED}: {why}"
    kind = KINDS.get(name)
    if kind is None:
        return f"{UNTRIED}: the kernels of the kind below"
    return f"{kind.state} ({kind.note})" if kind.note else kind.state


def table() -> str:
    """The table of docs/install.md, in Markdown."""
    rows = [(f"{name}: {kind.models}", kind.state, kind.note) for name, kind in KINDS.items()]
    lines = [f"| {gpus} | {state} | {note or '-'} |" for gpus, state, note in (*rows, *OTHERS)]
    return "\n".join(["| GPU | fastloss is | |", "|---|---|---|", *lines])


class Unsupported(NamedTuple):
    """A GPU that the kernels do not run on."""

    kind: str  # e.g. "sm_75"
    why: str


def unsupported(index: int) -> Unsupported | None:
    """Of torch's GPU `index`; None where the kernels run. It waits for nothing on the device."""
    properties = torch.cuda.get_device_properties(index)
    why = why_unsupported(properties)
    return None if why is None else Unsupported(name_of(properties), why)
