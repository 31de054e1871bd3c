"""Captioned images from WebDataset shards: order and resuming, which files are a sample, and what is skipped."""

from __future__ import annotations

import logging
import tarfile

import numpy as np
import pytest
import webdataset

from fastloss.recipes.data.batches import open_dataset
from fastloss.recipes.data.samples import SPLITS, split_of
from tests.recipes.test_data import add_file, captions, image_file, same, stream


def write_shards(root, counts, prefix="train"):
    number = 0
    root.mkdir(parents=True, exist_ok=True)
    for i, count in enumerate(counts):
        with webdataset.TarWriter(str(root / f"{prefix}-{i}.tar")) as writer:
            for _ in range(count):
                caption = {"txt": f"image {number}"} if number % 2 else {"json": {"text": f"image {number}"}}
                picture = np.full((12, 20, 3), number, dtype=np.uint8)
                writer.write({"__key__": f"{number:04}", "png": picture / 255.0, **caption})
                number += 1
    return f"wds:{root}/{prefix}-{{0..{len(counts) - 1}}}.tar"


def test_shards_are_read_back_in_order_and_resume(tmp_path):
    spec = write_shards(tmp_path, [10, 5, 8])
    data = open_dataset(spec, "train", 16, 3)
    in_order = stream(data, shuffle=False, drop_last=False)
    # there is no shard called val or test, so that a few samples of train are theirs
    own = {f"image {i}" for i in range(23) if split_of(_name(i), "train", {"train"}) == "train"}
    assert set(captions(in_order)) == own and len(own) > 18
    assert captions(in_order) == sorted(own, key=lambda c: int(c.split()[1]))
    for sample in data:
        assert sample["image"].shape == (3, 16, 16)
        assert sample["image"].mean().item() == pytest.approx(int(sample["caption"].split()[1]) / 255, abs=1e-6)

    found = stream(data)
    assert len(found) == len(own) // 4 and captions(found) != captions(in_order)[: 4 * len(found)]
    assert same(found, stream(data)) and same(found[2:], stream(data, skip=2))
    assert same(found, stream(data, num_workers=3)) and captions(found) != captions(stream(data, epoch=1))
    with pytest.raises(ValueError, match="batch_size"):
        stream(data, batch_size=64)
    assert data.skipped == {}


def _name(number):
    shard = 0 if number < 10 else 1 if number < 15 else 2
    return f"train-{shard}.tar/{number:04}"


def test_shards_named_after_splits_and_hashed_ones(tmp_path):
    for split, count in zip(SPLITS, (6, 2, 3), strict=True):
        write_shards(tmp_path, [count], split)
    for split, count in zip(SPLITS, (6, 2, 3), strict=True):
        assert len(list(open_dataset(f"wds:{tmp_path}/{{train,val,test}}-0.tar", split, 8, 1))) == count

    spec = write_shards(tmp_path / "plain", [150], "part")
    parts = [{sample["caption"] for sample in open_dataset(spec, split, 8, 1)} for split in SPLITS]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 150 and len(parts[0]) > 120


def test_shards_skip_count_and_name_what_they_cannot_use(tmp_path, caplog):
    spec = write_shards(tmp_path, [3, 2], "part")
    png = image_file(tmp_path / "x.png").read_bytes()
    keys = [f"k{i}" for i in range(60) if split_of(f"part-2.tar/k{i}", None, ()) == "train"]
    bad = {"corrupt": (b"junk", b"text"), "blank": (png, b" "), "only": (png, None), "words": (None, b"text")}
    names = {}
    with tarfile.open(tmp_path / "part-2.tar", "w") as tar:
        for (kind, (image, text)), key in zip(bad.items(), keys, strict=False):
            names[f"part-2.tar/{key}"] = kind
            if image is not None:
                add_file(tar, f"{key}.png", image)
            if text is not None:
                add_file(tar, f"{key}.txt", text)
        add_file(tar, f"{keys[4]}.png", png)
        add_file(tar, f"{keys[4]}.json", b'{"text": ')
        names[f"part-2.tar/{keys[4]}"] = "json"
        add_file(tar, f"{keys[5]}.png", png)
        add_file(tar, f"{keys[5]}.txt", b"good")
    whole = (tmp_path / "part-0.tar").read_bytes()
    (tmp_path / "part-3.tar").write_bytes(whole[:1000])  # ends inside its first sample
    (tmp_path / "part-4.tar").write_bytes(b"no archive at all")
    spec = spec.replace("0..1", "0..5")  # 5 does not exist
    data = open_dataset(spec, "train", 16, 3)
    with caplog.at_level(logging.WARNING, logger="fastloss"):
        found = captions(stream(data, drop_last=False, shuffle=False))
    own = [i for i in range(5) if split_of(f"part-{int(i > 2)}.tar/{i:04}", None, ()) == "train"]
    assert found == [f"image {i}" for i in own] + ["good"]
    broken = {str(tmp_path / f"part-{i}.tar") for i in (3, 4, 5)}
    assert set(names) | broken <= set(data.skipped)
    assert all(any(name in record.getMessage() for record in caplog.records) for name in (*names, *broken))
    with pytest.raises(ValueError, match=r"no usable sample in its train split, shards: 2 in all, 2 skipped"):
        open_dataset(f"wds:{tmp_path}/part-{{4..5}}.tar", "train", 16, 3)


def _shard(root, *files):
    """A shard of a split of its own, so that no hash of a name takes samples out of it."""
    for split in SPLITS:
        with tarfile.open(root / f"{split}-0.tar", "w") as tar:
            for name, content in files if split == "train" else ():
                add_file(tar, name, content)
    return f"wds:{root}/{{train,val,test}}-0.tar"


def _read(spec):
    """Captions in order, and what was skipped."""
    data = open_dataset(spec, "train", 8, 1)
    found = captions(stream(data, drop_last=False, shuffle=False))
    return found, {name.split("train-0.tar/")[1]: reason for name, reason in data.skipped.items()}


def test_shards_of_a_folder_a_glob_and_braces_are_the_same(tmp_path):
    braces = write_shards(tmp_path / "deep", [3, 2, 4])
    (tmp_path / "deep" / "notes.txt").write_text("no shard")
    own = captions(stream(open_dataset(braces, "train", 8, 1), shuffle=False, drop_last=False))
    specs = ("", "/deep", "/deep/train-*.tar", "/**/*.tar", "/deep/train-{0,1,2}.tar", "/{deep,none}/train-[0-2].tar")
    for spec in specs:
        data = open_dataset(f"wds:{tmp_path}{spec}", "train", 8, 1)
        assert len(data.urls) == 3
        assert captions(stream(data, shuffle=False, drop_last=False)) == own
    for spec in (f"wds:{tmp_path}/deep/val-*.tar", f"wds:{tmp_path}/empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="data: expected shards, a folder .*, which matches none$"):
            open_dataset(spec, "train", 8, 1)


def test_captions_of_shards_under_common_names(tmp_path):
    png = image_file(tmp_path / "x.png").read_bytes()
    kinds = {"txt": b"txt", "text": b"text", "caption": b"caption", "prompt": b"prompt", "json": b'{"prompt": "json"}'}
    files = [file for kind, content in kinds.items() for file in ((f"{kind}.png", png), (f"{kind}.{kind}", content))]
    files += [("wrong.png", png), ("wrong.json", b'{"title": "a", "label": 3}')]
    found, skipped = _read(_shard(tmp_path, *files))
    assert found == list(kinds)
    said = """expected one of "text", "caption", "prompt" among the keys, got 'title', 'label'"""
    assert skipped == {"wrong": f"no caption (its .json: {said})"}


def test_dots_in_the_names_of_a_shard_do_not_merge_its_samples(tmp_path):
    png = image_file(tmp_path / "x.png").read_bytes()
    numbered = [(f"photo.{i:03}.{kind}", content) for i in range(50) for kind, content in
                (("png", png), ("txt", f"photo {i}".encode()))]  # fmt: skip
    dated = [("IMG_2024.05.01.JPG", png), ("IMG_2024.05.01.json", b'{"caption": "may"}'), ("v1.2/a.b.png", png),
             ("v1.2/a.b.txt", b"in a folder")]  # fmt: skip
    found, skipped = _read(_shard(tmp_path, *numbered, *dated))
    assert found == [f"photo {i}" for i in range(50)] + ["may", "in a folder"]
    assert skipped == {}


def test_more_samples_of_one_first_name_than_wait_at_a_time(tmp_path):
    png = image_file(tmp_path / "x.png").read_bytes()
    files = [("p.png", png), ("p.txt", b"plain")]
    files += [(f"p.{i}.{kind}", content) for i in range(150) for kind, content in (("png", png), ("txt", b"own"))]
    files += [(f"p.only{i}.png", png) for i in range(150)]
    found, skipped = _read(_shard(tmp_path, *files))
    assert found == ["own"] * 150 + ["plain"]
    assert len(skipped) == 150
    assert set(skipped.values()) == {"further images of samples that have one (1 images)"}


def test_webdatasets_own_extensions_stay_fields_of_their_sample(tmp_path):
    png = image_file(tmp_path / "x.png").read_bytes()
    keys = [f"{i:05}" for i in range(40)]
    files = []
    for key in keys:  # in the order in which tar sorts them: the text after the fields
        files += [("__meta__/x.png", png), (f"{key}.cls", b"3"), (f"{key}.depth.exr", b"?"), (f"{key}.jpg", png)]
        files += [(f"{key}.json", b'{"text": "json"}'), (f"{key}.meta.json", b"{}"), (f"{key}.seg.png", png)]
        files += [(f"{key}.txt", key.encode())]
    found, skipped = _read(_shard(tmp_path, *files))
    assert found == keys  # the .txt comes before the .json
    reason = "further images of samples that have one (40 images)"
    assert skipped == {"*.seg.png": reason, "*.depth.exr": reason}


def test_shards_count_every_image_that_they_do_not_use(tmp_path, caplog):
    png = image_file(tmp_path / "x.png").read_bytes()
    files = [("good.png", png), ("good.txt", b"good")]
    files += [(f"photo.{i:03}.png", png) for i in range(50)]  # not one has a caption
    files += [("both.jpg", png), ("both.png", png), ("both.txt", b"both")]
    files += [("gif.gif", png), ("gif.txt", b"gif"), ("empty.png", png), ("empty.txt", b" ")]
    files += [("again.png", png), ("again.txt", b"first"), ("z.png", png), ("z.txt", b"z"), ("again.png", png)]
    files += [("again.txt", b"second"), ("bad.png", b"no image"), ("bad.txt", b"bad"), ("null.png", png)]
    files += [("null.json", b'{"text": null}')]
    spec = _shard(tmp_path, *files)
    with tarfile.open(tmp_path / "train-0.tar", "a") as tar:
        for name, kind in (("sym.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "good.png"
            tar.addfile(link)
            add_file(tar, name.replace("png", "txt"), b"linked")
    with caplog.at_level(logging.WARNING, logger="fastloss"):
        found, skipped = _read(spec)
    assert found == ["good", "both", "first", "z"]
    named = {f"photo.{i:03}": "no caption: no .txt or .json of its name" for i in range(50)}
    named |= {"*.png": "further images of samples that have one (1 images)", "gif": "an image format that is not read"}
    named |= {"empty": "its caption is empty", "again (2)": "a sample of this name came before"}
    named |= {"bad": "unreadable image", "null": 'no caption (its .json: expected a string under "text", got null)'}
    named |= dict.fromkeys(("sym", "hard"), "a link in the archive")
    assert set(skipped) == set(named) and all(skipped[name].startswith(reason) for name, reason in named.items())
    assert "4 train images, 58 skipped: 51 x no caption, 2 x a link in the archive" in caplog.text


def test_shards_of_one_name_in_two_folders_are_counted_apart(tmp_path):
    png = image_file(tmp_path / "x.png").read_bytes()
    files = [("k.png", png), ("l.png", png), ("l.txt", b"l"), ("m.png", png), ("m.txt", b"m")]
    for folder in "ab":
        (tmp_path / folder).mkdir()
        _shard(tmp_path / folder, *files)
    data = open_dataset(f"wds:{tmp_path}/{{a,b}}/{{train,val,test}}-0.tar", "train", 8, 1)
    assert captions(stream(data, drop_last=False, shuffle=False)) == ["l", "m", "l", "m"]
    assert set(data.skipped) == {f"{tmp_path}/{folder}/train-0.tar/k" for folder in "ab"}
