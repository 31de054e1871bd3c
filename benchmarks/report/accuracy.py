"""What `benchmarks.accuracy` found, in tables and in a line; the rows in which fastloss is not the most exact."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable

from benchmarks.harness.results import ERROR_COLUMNS, RESULTS, read_all
from benchmarks.report.explanations import why_inexact
from benchmarks.report.tables import BASE, DEVICES, Footnotes, Group, shape_label, short

MEASURES = {"gradient": "gradient_error", "value": "value_error"}
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
LEVEL = 0.05  # an error so much larger, or within the rounding of the result, is level
UNKNOWN = "not explained"
Key = tuple[str, str, str, str, str]  # loss, options, shape, dtype, inputs


@functools.cache
def rows_of(device: str) -> tuple[dict[str, str], ...]:
    return tuple(read_all(RESULTS / device / "accuracy", ERROR_COLUMNS))


def grouped(rows: Iterable[dict[str, str]]) -> dict[Key, Group]:
    """Rows by what was computed, then by provider; the groups where fastloss has an error."""
    groups: dict[Key, Group] = {}
    for r in rows:
        groups.setdefault((r["loss"], r["options"], r["shape"], r["dtype"], r["inputs"]), {})[r["provider"]] = r
    return {key: found for key, found in groups.items() if found.get("fastloss", {}).get("value_error")}


def error_of(row: dict[str, str] | None, measure: str) -> float | None:
    """None where there is none; infinite where value or gradient are not finite."""
    if not row or not row[MEASURES[measure]]:
        return None
    found = float(row[MEASURES[measure]])
    return found if math.isfinite(found) else math.inf


def best(found: Group, measure: str, libraries: bool) -> tuple[str, float] | None:
    """(name, error) of the most exact other; of libraries alone, or of everybody."""
    left_out = (*BASE, "fastloss") if libraries else ("fastloss",)
    errors = {name: error_of(row, measure) for name, row in found.items() if name not in left_out}
    known = {name: error for name, error in errors.items() if error is not None}
    name = min(known, key=known.__getitem__, default=None)
    return None if name is None else (name, known[name])


def rounding(dtype: str, measure: str) -> float:
    """What rounding the exact result may cost; the loss is a float32 number in every dtype."""
    return EPS["float32" if measure == "value" else dtype] / 2


def behind(device: str) -> list[tuple[Key, str, str, float, float]]:
    """(key, measure, who, their error, ours) where another is more exact, by more than 5 % and a rounding."""
    found = []
    for measure in MEASURES:
        for key, group in grouped(rows_of(device)).items():
            other, ours = best(group, measure, libraries=False), error_of(group["fastloss"], measure)
            if other and ours is not None and ours > max((1 + LEVEL) * other[1], rounding(key[3], measure)):
                found.append((key, measure, *other, ours))
    return found


def percent(error: float | None) -> str:
    """`0.24 %`; small ones as `2e-8`, large ones as multiples."""
    if error is None:
        return "-"
    if not math.isfinite(error):
        return "not finite"
    if error == 0:
        return "0"
    if error < 1e-4:
        mantissa, exponent = f"{error:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{100 * error:.2g} %" if error < 1 else f"{100 * error:,.0f} %"


def label(key: Key) -> str:
    loss, options, shape, *_ = key
    return f"`{loss}`{' ' + short(options) if short(options) else ''}, {shape_label(shape)}"


def table(device: str, dtype: str) -> list[str]:
    """A line per loss and inputs."""
    head = [f"{measure}: {who}" for measure in MEASURES for who in ("ours", "eager", "torch.compile", "best library")]
    lines = [f"| loss | inputs | {' | '.join(head)} |", "|---|---|" + "--:|" * len(head)]
    for key, found in grouped(rows_of(device)).items():
        if key[3] != dtype:
            continue
        cells = []
        for measure in MEASURES:
            cells += [percent(error_of(found.get(who), measure)) for who in ("fastloss", "eager", "torch.compile")]
            library = best(found, measure, libraries=True)
            cells.append(f"{library[0]} {percent(library[1])}" if library else "-")
        lines.append(f"| {label(key)} | {key[4]} | {' | '.join(cells)} |")
    return lines


def behind_table(device: str) -> list[str]:
    rows = behind(device)
    if not rows:
        return ["In no row is another more exact."]
    lines = ["| loss | inputs | dtype | what | against | ours | theirs | times | why |",
             "|---|---|---|---|---|--:|--:|--:|---|"]  # fmt: skip
    notes = Footnotes()
    for key, measure, name, theirs, ours in rows:
        text = why_inexact(device, key, measure)
        times = f"{ours / theirs:.2f}" if theirs else "-"
        reason = notes.mark(text) if text else UNKNOWN
        lines.append(
            f"| {label(key)} | {key[4]} | {key[3]} | {measure} | {name} | {percent(ours)} | {percent(theirs)} "
            f"| {times} | {reason} |"
        )
    return lines + notes.lines()


def without_error(device: str) -> list[str]:
    """Who failed, and where."""
    seen: dict[tuple[str, str], list[str]] = {}
    for r in rows_of(device):
        if r["note"]:
            where = seen.setdefault((r["provider"], r["note"]), [])
            place = " ".join(filter(None, (r["loss"], short(r["options"]), r["dtype"])))
            where += [place] if place not in where else []
    return [f"- {provider}: {note} ({', '.join(where)})" for (provider, note), where in seen.items()]


def standing(device: str) -> str:
    """In how many rows nobody is more exact."""
    rows = behind(device)
    counts = {m: sum(measure == m for _, measure, *_ in rows) for m in MEASURES}
    total = len(grouped(rows_of(device)))
    parts = (f"the {m} is the most exact or level in {total - counts[m]}" for m in MEASURES)
    return f"of {total} rows {' and '.join(parts)}"


def largest(device: str, dtype: str) -> str:
    """The largest and the median gradient error of each kind of provider."""
    groups = [g for key, g in grouped(rows_of(device)).items() if key[3] == dtype]
    texts = []
    for who in ("fastloss", "eager", "torch.compile", "the best library of each row"):
        if who.startswith("the best"):
            found = [other[1] for g in groups if (other := best(g, "gradient", libraries=True))]
        else:
            found = [e for g in groups if (e := error_of(g.get(who), "gradient")) is not None]
        if found:
            count = "" if len(found) == len(groups) else f", of {len(found)} rows"
            texts.append(f"{who} {percent(max(found))} ({percent(statistics.median(found))}{count})")
    return f"{len(groups)} rows, largest error of the gradient (median): {', '.join(texts)}"


def late(device: str, loss: str = "clip_loss", dtype: str = "bfloat16") -> str:
    """One row in words: positives at cosine 0.99."""
    for key, found in grouped(rows_of(device)).items():
        if (key[0], key[3], key[4]) == (loss, dtype, "late"):
            errors = ((name, error_of(row, "gradient")) for name, row in found.items())
            known = sorted((n != "fastloss", n, percent(e)) for n, e in errors if e is not None)
            return (
                f"Late in training, with pairs at cosine 0.99, the gradient of `{loss}`: "
                f"{', '.join(f'{n} {e}' for _, n, e in known)}."
            )
    return ""


def summary() -> str:
    """The list of the README, of the first device that has errors: its length does not grow with the devices."""
    device = next(filter(rows_of, DEVICES), None)
    if device is None:
        return "* Not measured."
    lines = [f"* In bfloat16, {DEVICES[device]}, inputs as training has them: {largest(device, 'bfloat16')}."]
    lines += [f"* {late(device)}"] if late(device) else []
    return "\n".join([*lines, f"* In all dtypes together: {standing(device)}."])


def section(device: str) -> list[str]:
    """The part of REPORT.md."""
    name = DEVICES[device]
    if not rows_of(device):
        return ["", f"## Accuracy, {name}", "", "Not measured."]
    first = rows_of(device)[0]
    about = (
        "Relative errors against eager PyTorch in float64 of the same inputs: of the value, and of the gradient as a "
        "vector. What the inputs are, and what an error is: [METHOD](METHOD.md). Level: within 5 %, or within what "
        f"rounding the exact result may cost. {standing(device).capitalize()}."
    )
    commits = ", ".join(sorted({r["commit"] for r in rows_of(device)}))
    where = f"{first['device']}, torch {first['torch']}, commit {commits}."
    parts = ["", f"## Accuracy, {name}", "", about, "", where]
    parts += ["", f"### Where another is more exact, {name}", "", *behind_table(device)]
    for dtype in EPS:
        parts += ["", f"### Errors in {dtype}, {name}", "", largest(device, dtype) + ".", "", *table(device, dtype)]
    failed = without_error(device)
    return [*parts, "", f"### No error known, {name}", "", *failed] if failed else parts
