"""What stands between the markers of README.md and of benchmarks/REPORT.md."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.harness.results import RESULTS
from benchmarks.report import accuracy, tables
from benchmarks.report.tables import DEVICES

README_ROWS = (
    ("h200", "clip_loss"),
    ("h200", "info_nce"),
    ("h200", "lpips_distance"),
    ("cpu", "clip_loss"),
    ("cpu", "siglip_loss"),
    ("cpu", "lpips_distance"),
    ("cpu", "pixel_loss"),
    ("cpu", "ssim_loss"),
)


def between(text: str, section: str, body: str) -> str:
    """`text` with `body` between the markers of the section."""
    begin, end = f"<!-- {section}: written by benchmarks/plot.py -->", f"<!-- end of {section} -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def pictures(folder: str, *names: str, devices: Iterable[str] = DEVICES) -> list[str]:
    """Those pictures that there are, as Markdown; `folder` leads from the text to the results."""
    found = [(device, name) for device in devices for name in names if (RESULTS / device / f"{name}.svg").exists()]
    return [f"![{name}, {DEVICES[device]}]({folder}/{device}/{name}.svg)\n" for device, name in found]


def report() -> str:
    """The body of REPORT.md."""
    standing = " ".join(f"{DEVICES[d]}: {tables.standing(d)}." for d in DEVICES if tables.measured(d))
    parts = [
        "## Forward and backward, and whole training steps",
        "",
        standing,
        "",
        tables.table(),
        "",
        tables.notes(),
        "",
    ]
    parts += pictures("results", "speed", "memory", "roofline", "scaling", "accuracy")
    for device, name in DEVICES.items():
        parts += ["", f"## Where fastloss loses, {name}", ""]
        if not tables.measured(device):
            parts.append("Not measured. Predictions, kept apart from measurements, are in docs/experiments.")
        else:
            parts += [*tables.lost_table(device), "", f"## Not timed, {name}", "", *tables.without_time(device)]
            parts += ["", f"## Scaling, {name}", "", *tables.scaling_table(device)]
        parts += accuracy.section(device)
    return "\n".join(parts)


def promise() -> str:
    """What fastloss is for, in a sentence with a figure: the largest CLIP loss on a GPU, else on the CPU."""
    words = "PyTorch losses for contrastive and generative training that take less time and memory"
    for device, where in (("h200", "an H200"), ("cpu", "two CPU cores")):
        found = next(iter(tables.main_row(device, "clip_loss").values()), {})
        if found.get("eager", {}).get("p50_ms"):
            ours, eager, compiled = (
                f"{float(row['p50_ms']):.3g} ms and {float(row['peak_mib']):,.0f} MiB" if row.get("p50_ms") else ""
                for row in (found["fastloss"], found["eager"], found.get("torch.compile", {}))
            )
            pairs, dtype = int(found["fastloss"]["shape"].split("x")[0]), found["fastloss"]["dtype"]
            return (
                f"{words}:\non {where}, CLIP's loss of {pairs:,} pairs and its gradients take {ours} in {dtype}; eager "
                f"PyTorch takes {eager}{', torch.compile ' * bool(compiled)}{compiled}."
            )
    return f"{words}."


def results() -> str:
    """The README's rows, how the whole suite came out, and the speed pictures."""
    lines, shown = tables.short_table(README_ROWS)
    about = (
        "Medians of forward and backward together, in brackets how many times as long as fastloss: below 1x fastloss "
        "loses. All rows, and why some are lost: [REPORT](benchmarks/REPORT.md). How it is measured: "
        "[METHOD](benchmarks/METHOD.md). On your machine: `fastloss bench clip_loss`."
    )
    if any(row["provider"] != "fastloss" and not row["version"] for _, row in shown):
        about += " A library without its version was measured before the suite kept versions."
    parts = [*lines, "", about]
    devices = [device for device in DEVICES if any(where == device for where, _ in shown)]
    for device in devices:
        here = [row for where, row in shown if where == device]
        seen = sorted({f"{row['device']}, {row['threads']} threads, torch {row['torch']}" for row in here})
        parts.append(f"{DEVICES[device]} ({'; '.join(seen)}): {tables.standing(device)}.")
    return "\n".join([*parts, "", *(p.strip() for p in pictures("benchmarks/results", "speed", devices=devices))])


SECTIONS = {
    "README.md": {"promise": promise, "results": results, "accuracy": accuracy.summary},
    "benchmarks/REPORT.md": {"results": report},
}


def written(name: str, text: str) -> str:
    """The text of a file with its sections as the result files have them."""
    for section, body in SECTIONS[name].items():
        text = between(text, section, body())
    return text
