"""What stands between the markers of README.md and of benchmarks/REPORT.md."""

from __future__ import annotations

from benchmarks.harness.results import RESULTS
from benchmarks.report import accuracy, tables
from benchmarks.report.tables import DEVICES

BEGIN, END = "<!-- results: written by benchmarks/plot.py -->", "<!-- end of results -->"


def between(text: str, body: str) -> str:
    """`text` with `body` between its markers."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def pictures(folder: str, *names: str) -> list[str]:
    """Those pictures that there are, as Markdown; `folder` leads from the text to the results."""
    found = [(device, name) for device in DEVICES for name in names if (RESULTS / device / f"{name}.svg").exists()]
    return [f"![{name}, {DEVICES[device]}]({folder}/{device}/{name}.svg)\n" for device, name in found]


def report() -> str:
    """The body of REPORT.md."""
    parts = ["## Forward and backward, and whole training steps", "", tables.table(full=True), "", tables.notes(), ""]
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


def readme_body() -> str:
    more = "Medians of forward + backward, a row per loss: its first options at the largest shape. " + " ".join(
        f"{DEVICES[device]}: {tables.standing(device)}." for device in DEVICES if tables.measured(device)
    )
    parts = [tables.table(), "", *pictures("benchmarks/results", "speed"), tables.notes(), more]
    return "\n".join([*parts, "", accuracy.summary()])
