"""Libraries' own examples before and after `fastloss.patch`: `python -m benchmarks.drop_ins [LIBRARY ...] [--write]`.

Each example of workloads/drop_ins.py is called with the library's class and with what `fastloss.patch` puts in its
place, the two in turn, forward and backward. Ours has a time where value and gradients are those of the library in
float64, as near as another library's must be in the suite, and where fastloss computed them itself. A library that
cannot be imported here is "absent". `--write` puts the table of the CPU's results into docs/migration.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import sys
import warnings

import torch
from torch import Tensor

from benchmarks.harness import measure
from benchmarks.harness.memory import Child
from benchmarks.harness.results import RESULTS, read, write
from benchmarks.harness.session import judge
from benchmarks.workloads.drop_ins import EXAMPLES, Example, example_of, passes_of
from benchmarks.workloads.items import options_text
from fastloss.compat import LIBRARIES

PROVIDERS = ("theirs", "fastloss")
DOCUMENT = measure.ROOT / "docs" / "migration.md"
MARKS = "<!-- drop-ins: written by python -m benchmarks.drop_ins --write -->", "<!-- end of drop-ins -->"


def version_of(library: str) -> str:
    names = importlib.metadata.packages_distributions().get(library, [])
    return importlib.metadata.version(names[0]) if names else ""


def once(row: dict, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Value and gradients; raises where the library computed what fastloss should have."""
    forward, backward, _ = passes_of(row, device, dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value = forward()
    handed = [str(w.message) for w in said if "is computed by the library itself" in str(w.message)]
    if handed:
        raise RuntimeError(handed[0])
    return [value.detach(), *backward(value)]


def measure_example(asked: Example, device: str, seconds: float, child: Child) -> list[dict]:
    """The rows of one example: theirs and ours, each forward, backward and both."""
    columns = dict(loss="drop_in", options=options_text({"library": asked.library, "loss": asked.loss}))
    columns |= dict(
        shape=asked.shape, dtype="float32", headline="1", checked="float64", version=version_of(asked.library)
    )
    theirs, ours = ({**columns, "provider": provider, "note": "", "error": ""} for provider in PROVIDERS)
    passes: dict[str, measure.Pass] = {}
    try:
        exact, own = (once(theirs, device, dtype) for dtype in (torch.float64, torch.float32))
        passes["theirs"] = passes_of(theirs, device)[:2]
        got = once(ours, device, torch.float32)
        ours["error"], ours["note"] = judge("ours", got, own, exact, torch.float32)
        theirs["error"] = judge("theirs", own, own, exact, torch.float32)[0]
        if not ours["note"]:
            passes["fastloss"] = passes_of(ours, device)[:2]
    except ImportError as error:
        return [theirs | {"mode": "both", "note": f"absent: {error}"}]
    except Exception as error:
        (ours if passes else theirs)["note"] = measure.reason(error)
    times, failed = measure.interleaved(passes, measure.Clock(device), seconds)
    found = []
    for mode in ("forward", "backward", "both"):
        for row in (theirs, ours):
            name = row["provider"]
            if name in failed:
                row["note"] = measure.reason(failed[name])
            if name not in times:
                found += [row | {"mode": mode}] if mode == "both" else []
                continue
            of_mode = [{"forward": f, "backward": b, "both": f + b}[mode] for f, b in times[name]]
            p20, p50, p80 = measure.quantiles(of_mode)
            line = row | dict(mode=mode, p20_ms=f"{p20:.4f}", p50_ms=f"{p50:.4f}", p80_ms=f"{p80:.4f}")
            if mode == "both":
                line["peak_mib"] = peak(row, passes[name], device, child)
            found.append(line)
    return found


def peak(row: dict, both: measure.Pass, device: str, child: Child) -> str:
    """MiB beyond the inputs."""
    forward, backward = both
    if device == "cuda":
        return f"{measure.peak_mib(lambda: backward(forward()), device):.1f}"
    return child.peak(row, row["provider"])[0]


def ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2g}" if theirs < 100 * ours else f"{theirs / ours:.0f}"


def table(rows: list[dict[str, str]]) -> str:
    """The result file in Markdown: a line an example."""
    lines = [
        "| library | call | input | theirs ms | ours ms | times as fast | theirs MiB | ours MiB |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["mode"] == "both":
            groups.setdefault(row["options"], {})[row["provider"]] = row
    for options, group in groups.items():
        named, theirs = json.loads(options), group["theirs"]
        asked = example_of(theirs)
        library = f"{named['library']} {theirs['version']}".strip()
        cells = [library, f"`{named['loss']}`", f"{theirs['shape']} ({asked.source})"]
        times = [float(group[p]["p50_ms"]) if group.get(p, {}).get("p50_ms") else None for p in PROVIDERS]
        if times[0] is None or times[1] is None:
            note = next((r["note"] for r in group.values() if r["note"]), "no time")
            lines.append(f"| {' | '.join(cells)} | {note.split(':')[0]} | | | | |")
            continue
        shown = [f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}" for ms in times]
        peaks = [f"{float(group[p]['peak_mib'] or 'nan'):,.1f}" for p in PROVIDERS]
        lines.append(f"| {' | '.join([*cells, *shown, ratio(*times), *peaks])} |")
    seen = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}" for r in rows})
    return "\n".join([f"Medians of forward and backward together; {'; '.join(seen)}.", "", *lines])


def written(text: str, content: str) -> str:
    """The document with the content between its marks."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{content}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def path_of(out: pathlib.Path, device: str) -> pathlib.Path:
    return out / measure.device_folder(device) / "drop_ins" / "drop_in.csv"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.drop_ins", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"default: all of {', '.join(LIBRARIES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on each example")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 1 where others use it; default: torch's")
    parser.add_argument("--write", action="store_true", help="put the CPU's table into docs/migration.md")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.libraries) - set(LIBRARIES))
    if unknown:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(LIBRARIES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    todo = [e for e in EXAMPLES if not args.libraries or e.library in args.libraries]
    path, common = path_of(args.out, args.device), measure.common_columns(args.device)
    again = {options_text({"library": e.library, "loss": e.loss}) for e in todo}
    rows: list[dict] = [r for r in read(path) if r["options"] not in again] if path.exists() else []
    order = [options_text({"library": e.library, "loss": e.loss}) for e in EXAMPLES]
    with Child() as child:
        for asked in todo:
            for row in measure_example(asked, args.device, args.seconds, child):
                rows.append(row | common)
                if row["mode"] == "both":
                    figures = f"{row['p50_ms']} ms, {row['peak_mib'] or '-'} MiB" if row.get("p50_ms") else row["note"]
                    print(f"  {asked.library:24}{asked.loss:40}{row['provider']:10}{figures}", flush=True)
            rows = [r for r in rows if r["options"] in order]  # of an example that is no more
            write(path, sorted(rows, key=lambda r: order.index(r["options"])))
    if args.write:
        found = read(path_of(args.out, "cpu"))
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf8"), table(found)), encoding="utf8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    measure.prepare_process()
    sys.exit(main())
