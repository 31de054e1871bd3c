"""The result files: a CSV per loss, a row per item, mode and provider."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Iterable, Sequence

RESULTS = pathlib.Path(__file__).parents[1] / "results"
COLUMNS = (
    "loss,options,shape,dtype,mode,provider,p20_ms,p50_ms,p80_ms,cost,rate,unit,share,ceiling,peak_mib,error,note,"
    "device,threads,commit,torch,triton,headline,checked,saved_mib,launches,host_ms,"
    "version"  # of the library that the provider is; empty in files from before it was kept
).split(",")


ERROR_COLUMNS = (
    "loss,options,shape,dtype,inputs,provider,value_error,gradient_error,note,device,threads,commit,torch,triton"
).split(",")
RENAMED = {"info_nce": "info-nce-pytorch"}  # providers that some files and rows have by the name of their import


def read(path: pathlib.Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """The rows of one file; a column that an older file has not is empty."""
    with path.open(newline="", encoding="utf8") as file:
        rows = [dict.fromkeys(columns, "") | row for row in csv.DictReader(file)]
    return [row | {"provider": RENAMED.get(row["provider"], row["provider"])} for row in rows]


def read_all(folder: pathlib.Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    return [row for path in sorted(folder.glob("*.csv")) for row in read(path, columns)]


def write(path: pathlib.Path, rows: Iterable[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Rewritten whole, and atomically: an interrupted run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    os.replace(new, path)
