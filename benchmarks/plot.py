"""The README's table, written from the result files: `python -m benchmarks.plot` (`--check` only compares)."""

from __future__ import annotations

import csv
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: written by benchmarks/plot.py -->", "<!-- end of results -->"
DEVICES = {"cpu": "CPU", "h200": "H200"}


def read(device: str) -> list[dict]:
    rows: list[dict] = []
    for path in sorted((RESULTS / device).glob("*.csv")):
        with path.open(newline="", encoding="utf8") as file:
            rows.extend(csv.DictReader(file))
    return rows


def table() -> str:
    """Forward plus backward: a row per loss, options, shape, dtype and device; a column per provider."""
    rows = [r for device in DEVICES for r in _of(device)]
    providers = ["fastloss", "eager", "torch.compile"]
    lines = [
        "| loss | shape, dtype | device | " + " | ".join(f"{p} ms" for p in providers)
        + " | vs eager | vs compile | share of copy bandwidth | peak MiB (eager) |",
        "|---|---|---|" + "--:|" * (len(providers) + 4),
    ]
    for key, found in _grouped(rows).items():
        loss, options, shape, dtype, device = key
        times = [_time(found.get(p)) for p in providers]
        ours = found["fastloss"]
        lines.append(
            f"| `{loss}` {_short(options)} | {shape}, {dtype} | {device} | "
            + " | ".join("-" if t is None else f"{t:.2f}" for t in times)
            + f" | {_ratio(times[1], times[0])} | {_ratio(times[2], times[0])} | {float(ours['share']):.0%}"
            f" | {ours['peak_mib'] or '-'} ({found.get('eager', {}).get('peak_mib') or '-'}) |"
        )
    for device, label in DEVICES.items():
        if not read(device):
            lines.append(f"| all | | {label} | not measured | | | | | | |")
    return "\n".join([*lines, "", *_notes()])


def _of(device: str) -> list[dict]:
    return [r | {"where": DEVICES[device]} for r in read(device) if r["mode"] == "both"]


def _grouped(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    groups: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        groups.setdefault((r["loss"], r["options"], r["shape"], r["dtype"], r["where"]), {})[r["provider"]] = r
    return {key: found for key, found in groups.items() if found.get("fastloss", {}).get("p50_ms")}


def _time(row: dict | None) -> float | None:
    return float(row["p50_ms"]) if row and row["p50_ms"] else None


def _ratio(theirs: float | None, ours: float | None) -> str:
    return "-" if theirs is None or ours is None else f"{theirs / ours:.2f}x"


def _short(options: str) -> str:
    return ", ".join(f"{k}={v}" for k, v in json.loads(options).items())


def _notes() -> list[str]:
    seen = {(r["device"], r["threads"], r["torch"], r["commit"]) for d in DEVICES for r in read(d)}
    return [f"Medians, forward + backward. {d}, {n} threads, torch {t}, commit {c}." for d, n, t, c in sorted(seen)]


def updated(readme: str) -> str:
    head, rest = readme.split(BEGIN)
    return head + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf8")
    new = updated(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    path.write_text(new, encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
