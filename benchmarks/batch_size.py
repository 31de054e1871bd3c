"""What batch size buys, shown with `fastloss train-clip`: `python -m benchmarks.batch_size [--samples N] [--write]`.

Trains on the glyphs once for each batch size and learning rate, all on the same number of pairs, so that a larger batch
has fewer steps; of the learning rates the one with the best validation score counts. The default rate grows with the
root of the batch size, as Adam's step does not with the gradient. `--write` puts table and picture into
docs/large-batch.md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
DOCUMENT, PICTURE = DOCS / "large-batch.md", DOCS / "images" / "batch_size.png"
MARKS = "<!-- batch size: written by python -m benchmarks.batch_size --write -->", "<!-- end of batch size -->"
BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192)
RATE, RATE_AT = 2e-3, 1024  # the recipe's own, and the batch size it is for
FIGURES = ("top1", "top5", "caption_recall1", "image_recall1")


class Run(NamedTuple):
    """A training that is done."""

    batch: int
    steps: int
    rate: float
    score: float  # of the validation split
    test: dict[str, float]
    seconds: float  # of the processor

    def row(self) -> str:
        figures = " | ".join(f"{self.test[name]:.1%}" for name in FIGURES)
        return f"| {self.batch:,} | {self.steps:,} | {self.rate:.2g} | {figures} | {self.seconds:.0f} |"


def train(batch: int, samples: int, factor: float, data: str) -> Run:
    """The best model of one training, judged on the test split."""
    from fastloss.recipes.clip.config import Config
    from fastloss.recipes.clip.evaluation import evaluate
    from fastloss.recipes.clip.train import Trainer, load_model

    steps, rate = max(1, samples // batch), factor * RATE * math.sqrt(batch / RATE_AT)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(data=data, batch_size=batch, steps=steps, learning_rate=rate, val_every=steps, out=folder)
        trainer = Trainer(config, quiet=True)
        trainer.run()
        seconds = time.process_time() - start
        model, config = load_model(Path(folder), trainer.device)
        test = evaluate(model, config, trainer.splits["test"])
    return Run(trainer.config.batch_size, steps, rate, trainer.best, test, seconds)


def best_of_each(runs: Sequence[Run]) -> list[Run]:
    """Of each batch size the run with the best validation score."""
    sizes = sorted({run.batch for run in runs})
    return [max((run for run in runs if run.batch == size), key=lambda run: run.score) for size in sizes]


def table(runs: Sequence[Run], samples: int, data: str) -> str:
    first = runs[0].test
    lines = [
        f"{samples:,} pairs of {data} seen by each; {first['n']:,.0f} test images, "
        f"{first['classes']:,.0f} classes, {first['captions']:,.0f} captions; one seed.",
        "",
        f"| batch | steps | learning rate | {' | '.join(FIGURES)} | processor seconds |",
        f"|--:|--:|--:|{'--:|' * len(FIGURES)}--:|",
        *(run.row() for run in runs),
    ]
    return "\n".join(lines)


def draw(runs: Sequence[Run], samples: int, data: str, path: Path) -> None:
    """The figures against the batch size, with 95 % intervals from the number of test images or captions."""
    from fastloss.recipes.imagen.figures import interval
    from fastloss.recipes.training.pictures import pyplot, save_figure

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2))
    sizes = [run.batch for run in runs]
    for name in FIGURES:
        values = [run.test[name] for run in runs]
        bounds = [interval(run.test[name], int(run.test.get(f"n_{name}", run.test["n"]))) for run in runs]
        (line,) = axis.plot(sizes, values, marker="o", markersize=4, label=name)
        axis.fill_between(sizes, *zip(*bounds, strict=True), alpha=0.15, color=line.get_color(), linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set(xlabel="batch size", ylabel="share of test images or captions", ylim=(0, 1))
    axis.set_title(f"{data}, test split; {samples:,} pairs seen at every batch size", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=len(FIGURES), frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)


def written(text: str, content: str) -> str:
    """The document with the content between its marks."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{content}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="pairs each training sees")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--factors", type=float, nargs="+", default=(1.0,), help="of the learning rate, to choose from")
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--runs", type=Path, help="a file to add each run to, as a line of JSON, and to go on from")
    parser.add_argument("--picture", type=Path, help="where to draw, in place of the document's picture")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/large-batch.md")
    given = parser.parse_args(argv)
    lines = given.runs.read_text().splitlines() if given.runs and given.runs.exists() else []
    done = {tuple(key): Run(*run) for key, run in map(json.loads, lines)}
    for batch in given.batches:
        for factor in given.factors:
            key = (given.data, given.samples, batch, factor)
            if key not in done:
                done[key] = train(batch, given.samples, factor, given.data)
                if given.runs:
                    with open(given.runs, "a", encoding="utf8") as file:
                        file.write(json.dumps([key, done[key]]) + "\n")
            print(done[key].row(), flush=True)
    keys = [(given.data, given.samples, batch, factor) for batch in given.batches for factor in given.factors]
    runs = best_of_each([done[key] for key in keys])
    print(table(runs, given.samples, given.data))
    if given.picture or given.write:
        draw(runs, given.samples, given.data, given.picture or PICTURE)
    if given.write:
        content = f"{table(runs, given.samples, given.data)}\n\n![retrieval by batch size](images/{PICTURE.name})"
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf8"), content), encoding="utf8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
