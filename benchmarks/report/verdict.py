"""What `fastloss bench` prints: a table of each item and a sentence on it; a warning where the machine is busy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from benchmarks.report.tables import LEVEL, key_of, label
from benchmarks.workloads.providers import version_of

BUSY = 0.25  # load per core from which on times are said to be off
LEAST_LOAD = 0.5
Row = dict[str, Any]


def busy(load: float | None = None, cores: int | None = None) -> str:
    """A warning where others keep the machine busy, or an empty string."""
    try:
        load = os.getloadavg()[0] if load is None else load
    except (AttributeError, OSError):  # not on this system
        return ""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if load <= max(LEAST_LOAD, BUSY * cores):
        return ""
    return (
        f"warning: the machine is busy (load average {load:.1f} on {cores} cores): the times are longer than those of "
        "an idle one, and the ratios are uncertain too"
    )


def table_of(rows: Sequence[Row]) -> list[str]:
    """A line per provider: milliseconds of each pass, how many times ours both are, memory, error, or why not timed."""
    both = {r["provider"]: r for r in rows if r["mode"] == "both"}
    ours = _time(both.get("fastloss"))
    lines = [
        f"  {'provider':26}{'forward':>9}{'backward':>10}{'both, ms':>10}{'of ours':>9}{'peak MiB':>10}{'error':>9}"
    ]
    for name, row in both.items():
        if not row.get("p50_ms"):
            lines.append(f"  {name:26}{row.get('note') or 'not timed'}")
            continue
        parts = {r["mode"]: _ms(r) for r in rows if r["provider"] == name}
        times = f"{_time(row) / ours:.2f}x" if ours else "-"
        lines.append(
            f"  {name:26}{parts.get('forward', '-'):>9}{parts.get('backward', '-'):>10}{parts['both']:>10}{times:>9}"
            f"{row.get('peak_mib') or '-':>10}{row.get('error') or '-':>9}"
        )
    return lines


def verdict(rows: Sequence[Row]) -> str:
    """`pixel_loss p=1, 8x3x512x512, float32: 5.1 ms, 1.9x as fast as eager, level with torchmetrics 1.8.2`."""
    both = {r["provider"]: r for r in rows if r["mode"] == "both"}
    name = label(key_of(rows[0])).replace("`", "")
    ours = both.get("fastloss")
    if not ours or not ours.get("p50_ms"):
        why = (ours or next(iter(both.values()))).get("note")
        return f"{name}: fastloss has no time" + (f", {why}" if why else "")
    others = [r for who, r in both.items() if who != "fastloss" and r.get("p50_ms")]
    said = [_against(ours, r) for r in sorted(others, key=_time, reverse=True)]
    return f"{name}: fastloss takes {_ms(ours)} ms" + (f", {', '.join(said)}" if said else "; nothing to compare with")


def _against(ours: Row, theirs: Row) -> str:
    times, who = _time(theirs) / _time(ours), with_version(theirs["provider"])
    near = 1 / (1 + LEVEL) <= times <= 1 + LEVEL
    if near and float(ours["p20_ms"]) <= float(theirs["p80_ms"]) and float(theirs["p20_ms"]) <= float(ours["p80_ms"]):
        return f"level with {who}"
    return f"{times:.1f}x as fast as {who}" if times >= 1.05 else f"slower than {who} ({times:.2f}x as fast)"


def with_version(provider: str) -> str:
    """A library with its version."""
    return f"{provider} {version_of(provider)}".strip()


def _time(row: Row | None) -> float:
    return float(row["p50_ms"]) if row and row.get("p50_ms") else 0.0


def _ms(row: Row) -> str:
    return f"{float(row['p50_ms']):.3g}" if row.get("p50_ms") else "-"
