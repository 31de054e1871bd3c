"""Global batches: the same samples for any number of ranks and after resuming on another, from arrays and shards."""

from __future__ import annotations

import tarfile
from itertools import islice

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("webdataset")

from fastloss.recipes.data.batches import open_dataset  # noqa: E402
from fastloss.recipes.data.global_batches import global_batches  # noqa: E402
from fastloss.recipes.data.lanes import Lanes, lanes_of  # noqa: E402
from fastloss.recipes.training.noise import RowDropout, RowNoise  # noqa: E402
from fastloss.recipes.training.world import World  # noqa: E402
from tests.recipes.test_data import add_file, image_file  # noqa: E402
from tests.recipes.test_shards import write_shards  # noqa: E402


def global_ids(spec, world, steps, start=0, batch_size=24, counts=None):
    """The ids of each global batch, put together from the ranks' rows."""
    ranks = []
    for rank in range(world):
        data = open_dataset(spec, "train", 8, 1)
        if counts is not None:
            data.counts = dict(counts)
        own = World(rank, world).own(batch_size)
        found = list(islice(global_batches(data, batch_size, 5, start, own=own), steps))
        assert all(batch["row"].tolist() == list(own) and len(batch["image"]) == len(own) for batch in found)
        ranks.append([batch["id"] for batch in found])
    return [[i for ids in step for i in ids] for step in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    spec = write_shards(folder, [40, 7, 23, 31, 12, 30])
    whole = (folder / "train-3.tar").read_bytes()
    (folder / "train-3.tar").write_bytes(whole[: len(whole) // 2])
    return spec


@pytest.mark.parametrize("kind", ["digits", "shards"])
def test_ids_of_the_next_20_batches_follow_from_seed_and_step(kind, shards):
    spec = "digits" if kind == "digits" else shards
    one = global_ids(spec, 1, 20, start=7)
    for world in (2, 4):
        assert global_ids(spec, world, 20, start=7) == one
    assert global_ids(spec, 3, 3, start=9) == one[2:5]
    assert global_ids(spec, 2, 12) == global_ids(spec, 1, 7) + one[:5]  # 2 -> 1 -> 4
    assert global_ids(spec, 1, 5, start=12) + global_ids(spec, 4, 10, start=17) == one[5:]
    assert len({tuple(ids) for ids in one}) == 20


def test_a_truncated_shard_ends_no_rank_and_every_sample_comes(shards):
    data = open_dataset(shards, "train", 8, 1)
    usable = len(list(data))
    assert 60 < usable < 133 and any("train-3.tar" in name for name in data.skipped)
    ids = [i for batch in global_ids(shards, 3, 20) for i in batch]
    assert len(set(ids)) == usable  # 480 samples of some 110, from six lanes


def test_a_resumed_lane_reads_one_shard_and_decodes_nothing_before_its_place(shards, monkeypatch):
    data = open_dataset(shards, "train", 8, 1)
    assert lanes_of(data) == 6
    lanes = Lanes(data, 5)
    there = [lanes.sample(g)["id"] for g in range(0, 600, 6)]
    again = open_dataset(shards, "train", 8, 1)
    again.counts = dict(data.counts)
    opened, decoded = [], []
    shard, load = again.shuffled_shard, again.load
    monkeypatch.setattr(again, "shuffled_shard", lambda url, *rest: opened.append(url) or shard(url, *rest))
    monkeypatch.setattr(again, "load", lambda raw: decoded.append(raw[0]) or load(raw))
    assert Lanes(again, 5).sample(594)["id"] == there[99]
    assert len(opened) == 1 and decoded == [there[99]]
    assert global_ids(shards, 2, 1, start=40, counts=data.counts) == global_ids(shards, 1, 1, start=40)


def test_an_image_that_cannot_be_decoded_is_replaced_alike_on_all_ranks(tmp_path):
    png = image_file(tmp_path / "x.png").read_bytes()
    for split in ("train", "val", "test"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for i in range(30 if split == "train" else 0):
                add_file(tar, f"{i:02}.png", b"no image" if i % 5 == 2 else png)
                add_file(tar, f"{i:02}.txt", f"image {i}".encode())
    spec = f"wds:{tmp_path}/{{train,val,test}}-0.tar"
    one = global_ids(spec, 1, 5)
    assert global_ids(spec, 2, 5) == global_ids(spec, 4, 5) == one
    assert len({i for ids in one for i in ids}) == 24
    assert global_ids(spec, 1, 3, start=2) == one[2:]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size: expected at most the number of samples, 1397, got 2000"):
        global_batches(open_dataset("digits", "train", 8, 1), 2000, 0)


def test_own_rows_are_the_batch():
    for world in (1, 3, 5):
        ranks = [World(rank, world) for rank in range(world)]
        assert [i for rank in ranks for i in rank.own(13)] == list(range(13))
        assert ranks[0].counts(13) == [len(rank.own(13)) for rank in ranks]


# noise


def test_noise_of_a_row_follows_from_its_place_seed_and_step():
    rows = torch.arange(40)
    noise = RowNoise.of(0, 7, rows)
    part = RowNoise.of(0, 7, rows[13:20])
    for of in (RowNoise.uniform, RowNoise.normal):
        assert torch.equal(of(noise, 3, 4, 5)[13:20], of(part, 3, 4, 5))
        others = (of(RowNoise.of(1, 7, rows), 3, 4, 5), of(RowNoise.of(0, 8, rows), 3, 4, 5), of(noise, 4, 4, 5))
        assert all((other != of(noise, 3, 4, 5)).float().mean() > 0.999 for other in others)
    dropout = RowDropout(0.25, stream=1)
    x = torch.ones(40, 300)
    kept = dropout(x, noise)
    assert torch.equal(kept[13:20], dropout(x[13:20], part)) and torch.equal(dropout.eval()(x, noise), x)
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3]) and abs(kept.mean() - 1) < 0.02


def test_noise_is_uniform_normal_and_independent():
    noise = RowNoise.of(2, 0, torch.arange(512))
    uniform = noise.uniform(1, 512)
    assert 0 < uniform.min() and uniform.max() < 1
    counts = torch.histc(uniform.flatten(), 64, 0, 1)
    expected = 512 * 512 / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # chi squared of 63 degrees: 1 in 20,000
    for matrix in (uniform, uniform.T):  # neither rows nor columns are correlated: 512 numbers each, 131,000 pairs
        assert torch.corrcoef(matrix).triu(1).abs().max() < 0.25
    normal = noise.normal(2, 256).flatten().double()
    moments = [normal.mean(), normal.var() - 1, (normal**4).mean() - 3]
    assert all(abs(moment) < bound for moment, bound in zip(moments, (0.015, 0.02, 0.15), strict=True))
