"""Tables of the result files, for README.md and benchmarks/REPORT.md."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable

from benchmarks.harness.results import RESULTS, read_all
from benchmarks.report.explanations import why
from benchmarks.workloads.items import named

DEVICES = {"cpu": "CPU", "h200": "H200"} | {  # and whatever else there are results of
    path.name: path.name.upper() for path in sorted(RESULTS.glob("*/")) if path.name not in ("cpu", "h200")
}
BASE = ("eager", "torch.compile", "torch.compile max-autotune", "torch.nn.functional")
LEVEL = 0.05  # a difference of so much or less, with overlapping spreads, is called level
UNEXPLAINED = "**unexplained**"
Key = tuple[str, str, str, str]
Group = dict[str, dict[str, str]]


@functools.cache
def _read(device: str) -> tuple[dict[str, str], ...]:
    return tuple(read_all(RESULTS / device))


def measured(device: str) -> bool:
    return bool(_read(device))


def rows_of(device: str, *modes: str) -> list[dict[str, str]]:
    return [r for r in _read(device) if r["mode"] in modes]


def key_of(row: dict[str, str]) -> Key:
    return row["loss"], row["options"], row["shape"], row["dtype"]


def grouped(rows: Iterable[dict[str, str]]) -> dict[Key, Group]:
    """Rows by (loss, options, shape, dtype), then by provider; the groups where fastloss has a time."""
    groups: dict[Key, Group] = {}
    for r in rows:
        groups.setdefault(key_of(r), {})[r["provider"]] = r
    return {key: found for key, found in groups.items() if found.get("fastloss", {}).get("p50_ms")}


def is_headline(row: dict[str, str]) -> bool:
    """Files from before there was a headline have it for all their rows."""
    return row["headline"] in ("1", "")


def time_of(row: dict[str, str] | None) -> float | None:
    return float(row["p50_ms"]) if row and row["p50_ms"] else None


def label(key: Key) -> str:
    loss, options, shape, dtype = key
    return f"`{loss}`{' ' + short(options) if short(options) else ''}, {shape_label(shape)}, {dtype}"


def short(options: str) -> str:
    return ", ".join(f"{k}={_plain(v)}" for k, v in json.loads(options).items())


def _plain(value: object) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, list) else str(value)


def shape_label(shape: str) -> str:
    """Lists of many layers by their first one."""
    first, *more = shape.split("+")
    return f"{first} and {len(more)} smaller" if more else first


def _versus(row: dict[str, str] | None, ours: float) -> str:
    """`7.45 (2.5x)`: their milliseconds, and how many times ours that is."""
    theirs = time_of(row)
    if theirs is None:
        return row["note"].split(":")[0] if row and row["note"] else "-"
    return f"{_ms(theirs)} ({theirs / ours:.2f}x)"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _best_library(found: Group, ours: float) -> str:
    times = {name: time_of(row) for name, row in found.items() if name not in (*BASE, "fastloss")}
    known = {name: t for name, t in times.items() if t is not None}
    if not known:
        return "-"
    name = min(known, key=known.__getitem__)
    return " ".join(filter(None, (name, found[name]["version"], _versus(found[name], ours))))


def _main_rows(groups: dict[Key, Group]) -> dict[Key, Group]:
    """One row per loss: of its headline the first options and dtype, at the largest shape."""
    chosen: dict[str, Key] = {}
    for key, found in groups.items():
        if is_headline(found["fastloss"]):
            other = chosen.setdefault(key[0], key)
            if (key[1], key[3]) == (other[1], other[3]) and _size(key) > _size(other):
                chosen[key[0]] = key
    return {key: groups[key] for key in chosen.values()}


def _size(key: Key) -> int:
    """Elements of the first layer."""
    return math.prod(int(n) for n in key[2].split("+")[0].split("x"))


def table() -> str:
    """Forward plus backward, or a whole step: a line per loss, options, shape and dtype."""
    lines = [
        "| loss, input | device | fastloss ms | eager ms | torch.compile ms | best library ms | of the ceiling "
        "| peak MiB (eager) |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for device, name in DEVICES.items():
        groups = grouped(rows_of(device, "both", "step"))
        for key, found in groups.items():
            row = found["fastloss"]
            ours = time_of(row) or 0.0
            roof = "copy" if row["unit"] == "GB/s" else "matmul"
            share = f"{float(row['share']):.0%} of {roof}" if row["share"] else "-"
            peak = f"{row['peak_mib'] or '-'} ({found.get('eager', {}).get('peak_mib') or '-'})"
            lines.append(
                f"| {label(key)} | {name} | {_ms(ours)} | {_versus(found.get('eager'), ours)} | "
                f"{_versus(found.get('torch.compile'), ours)} | {_best_library(found, ours)} | {share} | {peak} |"
            )
        missing = sorted(set(named()) - {row["loss"] for row in _read(device)})
        if missing:
            lost = "all" if not _read(device) else ", ".join(f"`{loss}`" for loss in missing)
            lines.append(f"| {lost} | {name} | not measured | | | | | |")
    return "\n".join(lines)


def short_table(rows: Iterable[tuple[str, str]]) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """The main row of each (device, loss) as a line; (device, row) of fastloss and of the libraries in it.

    A loss that the device has no results of is a line "not measured".
    """
    lines = [
        "| loss, input | device | fastloss ms | eager ms | torch.compile ms | best library ms |",
        "|---|---|--:|--:|--:|--:|",
    ]
    shown: list[tuple[str, dict[str, str]]] = []
    for device, loss in rows:
        groups = main_row(device, loss)
        if not groups:
            lines.append(f"| `{loss}` | {DEVICES[device]} | not measured | | | |")
        for key, found in groups.items():
            ours = time_of(found["fastloss"]) or 0.0
            others = [_versus(found.get(name), ours) for name in ("eager", "torch.compile")]
            cells = (label(key), DEVICES[device], _ms(ours), *others, _best_library(found, ours))
            lines.append(f"| {' | '.join(cells)} |")
            shown += [(device, row) for name, row in found.items() if name not in BASE and row["p50_ms"]]
    return lines, shown


def main_row(device: str, loss: str) -> dict[Key, Group]:
    """The loss's row of the first options at the largest shape; nothing where there are no results."""
    return _main_rows(grouped(row for row in rows_of(device, "both") if row["loss"] == loss))


def notes() -> str:
    """Where the figures come from: a line per device, versions and commit."""
    lines = []
    for device in DEVICES:
        seen: dict[tuple, list[str]] = {}
        for r in _read(device):
            found = seen.setdefault((r["device"], r["threads"], r["torch"], r["commit"]), [])
            found += [r["loss"]] if r["loss"] not in found else []
        several = len(seen) > 1
        for (name, threads, torch, commit), losses in sorted(seen.items()):
            whose = f"{', '.join(losses)}: " if several else ""
            lines.append(f"{whose}{name}, {threads} threads, torch {torch}, commit {commit}.")
    return "\n".join(lines)


def lost(device: str) -> list[tuple[str, dict[str, str], dict[str, str], float, str]]:
    """(mode, our row, theirs, how many times as much we take, explanation) of each row that fastloss loses.

    In time: any mode. In peak memory: by more than 5 % and a MiB. The explanation says "level" where the medians are
    within 5 % and the spreads overlap.
    """
    found = []
    for mode in ("forward", "backward", "both", "step"):
        for group in grouped(rows_of(device, mode)).values():
            ours = group["fastloss"]
            for name, theirs in group.items():
                if name == "fastloss" or not theirs["p50_ms"]:
                    continue
                times = float(ours["p50_ms"]) / float(theirs["p50_ms"])
                if times > 1:
                    level = times <= 1 + LEVEL and float(ours["p20_ms"]) <= float(theirs["p80_ms"])
                    found.append((mode, ours, theirs, times, "level" if level else why(device, theirs, mode)))
                mine, other = (float(r["peak_mib"] or "nan") for r in (ours, theirs))
                if mine > 1.05 * other and mine > other + 1:
                    times = mine / max(other, 0.1)
                    found.append(("memory", ours, theirs, times, why(device, theirs, "memory")))
    return found


def unexplained() -> list[str]:
    """The lost rows that nobody has explained, in words."""
    return [
        f"{device}: {theirs['loss']} {theirs['options']} {theirs['shape']} {mode}: "
        f"{times:.2f} times {theirs['provider']}'s"
        for device in DEVICES
        for mode, _, theirs, times, text in lost(device)
        if not text
    ]


class Footnotes:
    """Texts that rows of a table share, each once under it and numbered as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"({self.texts.index(text) + 1})"

    def lines(self) -> list[str]:
        return ["", *(f"({i + 1}) {text}\n" for i, text in enumerate(self.texts))]


def lost_table(device: str) -> list[str]:
    rows = lost(device)
    if not rows:
        return ["No row is lost."]
    lines = ["| loss, input | what | against | ours | theirs | times | why |", "|---|---|---|--:|--:|--:|---|"]
    notes = Footnotes()
    for mode, ours, theirs, times, text in rows:
        key = key_of(theirs)
        column, unit = ("peak_mib", "MiB") if mode == "memory" else ("p50_ms", "ms")
        if text not in ("", "level"):
            text = notes.mark(text)
        lines.append(
            f"| {label(key)} | {mode} | {theirs['provider']} | {float(ours[column]):.3g} {unit} "
            f"| {float(theirs[column]):.3g} {unit} | {times:.2f} | {text or UNEXPLAINED} |"
        )
    return lines + notes.lines()


def without_time(device: str) -> list[str]:
    """What was not timed, and why: absent libraries, failures, wrong values."""
    seen: dict[tuple[str, str], list[str]] = {}
    for r in _read(device):
        if not r["p50_ms"] and r["note"]:
            where = seen.setdefault((r["provider"], re.sub(r"\s+", " ", r["note"])), [])
            place = f"{r['loss']} {short(r['options'])}".strip()
            where += [place] if place not in where else []
    return [f"- {provider}: {note} ({', '.join(where)})" for (provider, note), where in seen.items()] or ["Nothing."]


def scaling_table(device: str) -> list[str]:
    """How far each provider goes, and what threads bring, of every loss that `benchmarks.scaling` has swept."""
    rows = [r for r in read_all(RESULTS / device / "scaling") if r["mode"] == "both"]
    if not rows:
        return ["Not measured."]
    sweeps: dict[tuple[str, str], dict[int, list[dict[str, str]]]] = {}
    for r in rows:
        sweeps.setdefault((r["loss"], r["provider"]), {}).setdefault(int(r["threads"] or 0), []).append(r)
    titles = ("loss", "provider", "largest size", "ms", "peak MiB", "what stopped it", "threads")
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|--:|--:|---|---|"]
    for (loss, provider), by_threads in sweeps.items():
        own = by_threads[max(by_threads)]
        timed = [r for r in own if r["p50_ms"]]
        if timed:
            last, note = timed[-1], next((r["note"] for r in own if r["note"]), "the end of the sweep")
            lines.append(
                f"| `{loss}` | {provider} | {shape_label(last['shape'])} | {_ms(float(last['p50_ms']))} "
                f"| {last['peak_mib'] or '-'} | {note} | {_gain(by_threads)} |"
            )
    return lines


def _gain(by_threads: dict[int, list[dict[str, str]]]) -> str:
    """`1 to 2: 1.9x at 2048x512`: how many times faster the most threads are, at the largest size that all did."""
    few, many = min(by_threads), max(by_threads)
    alone, together = ({r["shape"]: float(r["p50_ms"]) for r in by_threads[n] if r["p50_ms"]} for n in (few, many))
    both = [shape for shape in alone if shape in together]
    if few == many or not both:
        return "-"
    return f"{few} to {many}: {alone[both[-1]] / together[both[-1]]:.2f}x at {shape_label(both[-1])}"


def standing(device: str) -> str:
    """In how many rows of forward + backward or whole steps fastloss is faster than all others, level, or slower.

    Level: the medians are within 5 %, whichever is less. A row that only fastloss has counts in none of them.
    """
    gains = []  # the time of the fastest other over fastloss's, row by row
    for group in grouped(rows_of(device, "both", "step")).values():
        others = [time for name, row in group.items() if name != "fastloss" and (time := time_of(row))]
        ours = time_of(group["fastloss"])
        if others and ours:
            gains.append(min(others) / ours)
    faster, slower = sum(gain > 1 + LEVEL for gain in gains), sum(gain < 1 / (1 + LEVEL) for gain in gains)
    return (
        f"of {len(gains)} rows with another to compare with, fastloss is faster than all by more than {LEVEL:.0%} in "
        f"{faster}, within {LEVEL:.0%} of the fastest in {len(gains) - faster - slower}, slower in {slower}"
    )
