"""The arithmetic of losses across many GPUs: the simulated ring against its closed form, and the document's table."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import timeline

SIZES = list(itertools.product((1, 2, 8, 64), (128, 1024, 8192), (512, 1152)))


@pytest.mark.parametrize(("compute", "hop"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_a_lap_of_the_ring_is_its_closed_form(ranks, compute, hop):
    line = timeline.Timeline()
    line.free = {"gpu": 5.0, "link": 4.0}  # what was before does not overlap
    assert timeline.lap(line, ranks, compute, hop) == compute + (ranks - 1) * max(compute, hop)


@pytest.mark.parametrize(("ranks", "rows", "width"), SIZES)
def test_nothing_is_faster_than_its_products_or_its_bytes(ranks, rows, width):
    cluster, batch = timeline.CLUSTER, ranks * rows
    products = (timeline.FORWARD + timeline.BACKWARD) * 2 * rows * batch * width / cluster.rate
    bytes_home = (ranks - 1) * rows * width * (timeline.ELEMENT + timeline.GRADIENT) / (cluster.inside * cluster.share)
    for seconds in (
        timeline.gather(ranks, rows, width), timeline.chunked(ranks, rows, width, 4), timeline.ring(ranks, rows, width),
    ):  # fmt: skip
        assert seconds >= max(products, bytes_home)


def test_chunks_hide_the_link_behind_the_products():
    one, pieces = timeline.gather(64, 8192, 768), timeline.chunked(64, 8192, 768, 8)
    assert pieces < 0.92 * one
    assert timeline.chunked(8, 1024, 768, 8) > timeline.gather(8, 1024, 768)  # too little to compute


def test_a_chunked_exchange_keeps_its_memory():
    for ranks, rows in itertools.product((8, 64, 1024), (1024, 8192)):
        chunks = timeline.best_chunks(ranks, rows, 768)
        assert 2 * ranks * rows // chunks * 768 * 6 <= timeline.MEMORY


def test_the_document_has_the_table(capsys):
    text = timeline.DOCUMENT.read_text(encoding="utf8")
    assert timeline.written(text, timeline.table()) == text, "python -m benchmarks.timeline --write"
    assert timeline.main(["--ranks", "8", "--rows", "1024", "--width", "512"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(SystemExit):
        timeline.main(["--ranks", "0"])
