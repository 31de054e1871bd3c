"""Captioned images from folders and shards: their splits, order and resuming, and what is skipped."""

from __future__ import annotations

import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastloss.recipes.data.batches import batches, open_dataset
from fastloss.recipes.data.digits import load_digits
from fastloss.recipes.data.samples import SPLITS, fault_of, split_of, splits_of


def image_file(path, value=128, size=(20, 12), mode="RGB"):
    fill = value if mode == "L" else (value,) * len(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, fill).save(path)
    return path


def noise_file(path, seed=0, size=64):
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def captioned(root, count, split="train", extension="png"):
    """`count` grey images, of value i, captioned "image i"."""
    for i in range(count):
        image_file(root / split / f"{i:03}.{extension}", i).with_suffix(".txt").write_text(f"image {i}\n")
    return root


def stream(dataset, **options):
    options = {"batch_size": 4, "seed": 1, "epoch": 0, **options}
    return list(batches(dataset, **options))


def captions(found):
    return [caption for batch in found for caption in batch["caption"]]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x["image"], y["image"]) and x["caption"] == y["caption"] for x, y in zip(a, b, strict=True)
    )


def add_file(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# Order and resuming


def test_digit_batches_repeat_for_seed_and_epoch_and_resume():
    data = open_dataset("digits", "train", 32, 1)
    first = stream(data, batch_size=100)
    assert len(first) == 13 and len(set(captions(first))) == 90
    assert same(first, stream(data, batch_size=100))
    assert same(first[5:], stream(data, batch_size=100, skip=5))
    assert stream(data, batch_size=100, skip=13) == []
    assert captions(first) != captions(stream(data, batch_size=100, epoch=1))
    assert captions(first) != captions(stream(data, batch_size=100, seed=2))
    image = first[0]["image"]
    assert image.shape == (100, 1, 32, 32) and 0 <= image.min() and image.max() <= 1

    val = open_dataset("digits", "val", 32, 3)
    found = stream(val, batch_size=64)
    assert [len(batch["caption"]) for batch in found] == [64, 64, 64, 8]
    assert captions(found) == load_digits("val").captions and found[0]["image"].shape[1] == 3


def test_bad_arguments_are_named(tmp_path):
    data = open_dataset("digits", "val", 32, 1)
    for options, name in (
        ({"batch_size": 0}, "batch_size"),
        ({"skip": -1}, "skip"),
        ({"epoch": 0.5}, "epoch"),
        ({"batch_size": 201, "drop_last": True}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=name):
            stream(data, **options)
    for spec in ("mnist", "folder:", "wds", f"folder:{tmp_path / 'none'}"):
        with pytest.raises(ValueError, match="data|folder"):
            open_dataset(spec, "train", 32, 3)
    for arguments, name in ((("all", 32, 3), "split"), (("train", 4, 3), "size"), (("train", 32, 2), "channels")):
        with pytest.raises(ValueError, match=name):
            open_dataset("digits", *arguments)


# Folders


def test_folder_reads_metadata_and_sidecars_in_order(tmp_path):
    for split in ("val", "test"):  # so that all images in the folder "train" are of that split
        (tmp_path / split).mkdir()
    captioned(tmp_path, 10)
    image_file(tmp_path / "train" / "sub" / "x.JPG", 255, size=(64, 32)).with_suffix(".txt").write_text("not used")
    rows = [{"file_name": "sub/x.JPG", "text": " a  white\nimage "}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = open_dataset(f"folder:{tmp_path}", "train", 16, 3)
    assert len(data) == 11 and data.skipped == {}
    assert data.captions == [f"image {i}" for i in range(10)] + ["a white image"]
    assert data[10]["image"].shape == (3, 16, 16) and data[10]["image"].min() > 0.98
    assert data[3]["image"].unique().tolist() == pytest.approx([3 / 255])

    found = stream(data)
    assert same(found, stream(data)) and same(found[1:], stream(data, skip=1))
    assert same(found, stream(data, num_workers=2))
    assert len(found) == 2 and len(set(captions(found))) == 8
    assert captions(found) != captions(stream(data, epoch=1))
    for batch in found:  # each caption stays with its image
        for image, caption in zip(batch["image"], batch["caption"], strict=True):
            value = 255 if "white" in caption else int(caption.split()[1])
            assert image.mean().item() == pytest.approx(value / 255, abs=0.01)
    assert open_dataset(f"folder:{tmp_path}", "train", 16, 1)[10]["image"].shape == (1, 16, 16)


def test_folder_splits(tmp_path):
    captioned(tmp_path, 200, "pictures")
    parts = [set(open_dataset(f"folder:{tmp_path}", split, 8, 1).names) for split in SPLITS]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 200
    assert len(parts[0]) > 160 and min(map(len, parts)) >= 3
    assert split_of("pictures/000.png", None, ()) == "test" and split_of("cat.png", None, ()) == "train"

    captioned(tmp_path, 3, "val")  # without a folder "train" it is one like any other
    assert "val" in {n.split("/")[0] for n in open_dataset(f"folder:{tmp_path}", "train", 8, 1).names}
    captioned(tmp_path, 40, "train")
    train, val, test = (set(open_dataset(f"folder:{tmp_path}", split, 8, 1).names) for split in SPLITS)
    assert val == {f"val/{i:03}.png" for i in range(3)}
    assert len(train) + len(test) == 240 and not train & test  # test is taken out of the rest
    captioned(tmp_path, 2, "test")
    assert len(open_dataset(f"folder:{tmp_path}", "train", 8, 1)) == 240


def test_folder_skips_counts_and_names_what_it_cannot_use(tmp_path, caplog):
    train = captioned(tmp_path, 4) / "train"
    for split in ("val", "test"):  # so that all images in the folder "train" are of that split
        (tmp_path / split).mkdir()
    (train / "000.png").write_bytes(b"no image")
    noise = noise_file(train / "cut.png")
    noise.write_bytes(noise.read_bytes()[:3000])
    noise = noise_file(train / "cut.jpg")
    noise.write_bytes(noise.read_bytes()[:1000])
    for name in ("cut.png", "cut.jpg"):
        (train / name).with_suffix(".txt").write_text("cut")
    image_file(train / "none.png")
    image_file(train / "blank.png").with_suffix(".txt").write_text(" \n")
    image_file(train / "latin.png").with_suffix(".txt").write_bytes(b"\xe9t\xe9")
    image_file(train / "listed.png")
    image_file(train / "number.png")
    lines = [
        '{"file_name": "listed.png", "text": "fine"}',
        '{"file_name": "listed.png", "text": ',
        "",
        '["listed.png"]',
        '{"text": "no file"}',
        '{"file_name": "number.png", "text": 5}',
        '{"file_name": "../../gone.png", "text": "gone"}',
    ]
    (train / "metadata.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING, logger="fastloss"):
        data = open_dataset(f"folder:{tmp_path}", "train", 16, 3)
    assert data.captions == ["image 1", "image 2", "image 3", "fine"]
    skipped = {"000.png", "cut.png", "cut.jpg", "none.png", "blank.png", "latin.png", "number.png", "../../gone.png"}
    skipped |= {"metadata.jsonl:2", "metadata.jsonl:4", "metadata.jsonl:5"}
    assert set(data.skipped) == {f"train/{name}" for name in skipped}
    assert len(caplog.records) == len(skipped) + 1  # each once, and their sum
    assert "4 train images, 11 skipped: 3 x names no image, 3 x unreadable image, 2 x no caption" in caplog.text
    assert all(any(name in record.getMessage() for record in caplog.records) for name in skipped)
    assert captions(stream(data, shuffle=False)) == data.captions


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_that_breaks_later_is_replaced_and_counted(tmp_path, num_workers):
    for split in ("val", "test"):  # so that all images in the folder "train" are of that split
        (tmp_path / split).mkdir()
    data = open_dataset(f"folder:{captioned(tmp_path, 4)}", "train", 16, 3)
    (tmp_path / "train" / "001.png").write_bytes(b"damaged since")
    found = stream(data, shuffle=False, num_workers=num_workers)
    assert captions(found) == ["image 0", "image 2", "image 2", "image 3"]
    assert set(data.skipped) == {"train/001.png"}
    for i in (0, 2, 3):
        (tmp_path / "train" / f"{i:03}.png").unlink()
    with pytest.raises(ValueError, match="none of its 4 train images can be decoded"):
        stream(data, num_workers=num_workers)


def test_folder_with_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no usable image in its train split, 0 images found"):
        open_dataset(f"folder:{tmp_path}", "train", 16, 3)
    (captioned(tmp_path, 1) / "train" / "000.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 skipped: 1 x unreadable image \(train/000.png: unreadable image \(Unid"):
        open_dataset(f"folder:{tmp_path}", "train", 16, 3)


def test_captions_lose_their_byte_order_mark(tmp_path):
    mark = "\ufeff"
    for i, text in enumerate((f"{mark}marked", "plain", f"{mark}", f"{mark}\u00e9t\u00e9 \u65e5\u672c")):
        image_file(tmp_path / "train" / f"{i}.png").with_suffix(".txt").write_bytes(text.encode())
    image_file(tmp_path / "train" / "listed.png")
    image_file(tmp_path / "train" / "second.png")
    rows = [{"file_name": "listed.png", "text": "listed"}, {"file_name": "second.png", "text": "second"}]
    lines = mark + "\r\n".join(json.dumps(row) for row in rows)
    (tmp_path / "train" / "metadata.jsonl").write_bytes(lines.encode())
    for split in ("val", "test"):
        (tmp_path / split).mkdir()
    data = open_dataset(f"folder:{tmp_path}", "train", 16, 3)
    assert data.captions == ["marked", "plain", "\u00e9t\u00e9 \u65e5\u672c", "listed", "second"]
    assert data.skipped == {"train/2.png": "its caption is empty"}

    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        png = image_file(tmp_path / "x.png").read_bytes()
        for key, kind, text in (("a", "txt", "text"), ("b", "json", '{"text": "json"}'), ("c", "txt", "")):
            add_file(tar, f"{key}.png", png)
            add_file(tar, f"{key}.{kind}", f"{mark}{text}".encode())
    shards = open_dataset(f"wds:{tmp_path}/train-0.tar", "train", 16, 3)
    in_train = [key for key in "abc" if split_of(f"train-0.tar/{key}", "train", {"train"}) == "train"]
    found = {"a": "text", "b": "json"}
    assert captions(stream(shards, drop_last=False, shuffle=False)) == [found[key] for key in in_train if key in found]
    assert shards.skipped == {f"train-0.tar/{key}": "its caption is empty" for key in in_train if key not in found}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"file_name": "a.png"}, """expected one of "text", "caption", "prompt" among the keys, got 'file_name'"""),
        ({"file_name": "a.png", "label": 3, "txt": "dog"}, "got 'file_name', 'label', 'txt'"),
        ({"file_name": "a.png", "text": None}, 'expected a string under "text", got null'),
        ({"file_name": "a.png", "text": ["one", "two"]}, 'expected a string under "text", got a list of 2'),
        ({"file_name": "a.png", "caption": {"en": "x"}}, 'expected a string under "caption", got an object of 1'),
        ({"file_name": "a.png", "text": 5, "caption": True}, 'under "text", got 5; expected a string under "caption"'),
        ({"file_name": "a.png", "text": " "}, "its caption is empty"),
        ({"file_name": "a.png", "prompt": 3}, 'expected a string under "prompt", got 3'),
    ],
)
def test_a_caption_that_is_none_is_said_as_it_came(tmp_path, row, said):
    image_file(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"1 skipped: 1 x (no caption|its caption is empty) \(train/a.png") as error:
        open_dataset(f"folder:{tmp_path}", "train", 16, 3)
    assert said in str(error.value)
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        key = next(k for k in "abcdef" if split_of(f"train-0.tar/{k}", "train", {"train"}) == "train")
        add_file(tar, f"{key}.png", (tmp_path / "train" / "a.png").read_bytes())
        add_file(tar, f"{key}.json", json.dumps(row).encode())
    with pytest.raises(ValueError, match="1 skipped") as error:
        open_dataset(f"wds:{tmp_path}/train-0.tar", "train", 16, 3)
    assert said in str(error.value)


def test_a_null_text_gives_way_to_the_caption(tmp_path):
    image_file(tmp_path / "train" / "a.png")
    row = {"file_name": "a.png", "text": None, "caption": "a dog"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    assert open_dataset(f"folder:{tmp_path}", "train", 16, 3).captions == ["a dog"]


def test_a_prompt_is_a_caption(tmp_path):
    image_file(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "prompt": "a cat"}))
    assert open_dataset(f"folder:{tmp_path}", "train", 16, 3).captions == ["a cat"]


def test_few_images_give_every_split_one_and_shares_are_an_option(tmp_path):
    few = captioned(tmp_path / "few", 3, "pictures")
    parts = {split: open_dataset(f"folder:{few}", split, 8, 1).names for split in SPLITS}
    assert sorted(name for part in parts.values() for name in part) == [f"pictures/{i:03}.png" for i in range(3)]
    assert all(len(part) == 1 for part in parts.values())
    names = [f"{i}" for i in range(5000)]
    for held_out in ((5, 5), (10, 20), (1, 40)):
        found = splits_of(names, [None] * len(names), (), held_out)
        shares = [list(found.values()).count(split) / len(names) for split in SPLITS]
        wanted = [1 - sum(held_out) / 100, held_out[0] / 100, held_out[1] / 100]
        assert shares == pytest.approx(wanted, abs=0.02)
    assert splits_of(["a"], [None], (), (5, 5)) == {"a": split_of("a", None, ())}


def test_folder_counts_every_image_that_it_does_not_use(tmp_path):
    root = captioned(tmp_path / "data", 3)
    train = root / "train"
    for split in ("val", "test"):
        (root / split).mkdir()
    for name in ("a.gif", "b.tiff"):
        image_file(train / name).with_suffix(".txt").write_text("a format that is not read")
    image_file(train / "photo.001.png").with_suffix(".txt").write_text("dots in its name")
    image_file(train / "listed.gif")
    image_file(train / "twice.png")
    (train / "linked").symlink_to(captioned(tmp_path / "elsewhere", 1))
    rows = [("listed.gif", "x"), ("twice.png", "first"), ("twice.png", "second"), ("notes.xyz", "x")]
    (train / "notes.xyz").write_text("")
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (train / "metadata.jsonl").write_text("\n".join(lines))
    data = open_dataset(f"folder:{root}", "train", 16, 3)
    assert data.captions == ["image 0", "image 1", "image 2", "dots in its name", "second"]
    reasons = {name.removeprefix("train/"): reason for name, reason in data.skipped.items()}
    assert set(reasons) == {"a.gif", "b.tiff", "listed.gif", "linked", "metadata.jsonl:2", "notes.xyz"}
    for name in ("a.gif", "b.tiff", "listed.gif"):
        assert reasons[name].startswith("an image format that is not read (.")
    assert reasons["metadata.jsonl:2"] == "its image is named again (in train/metadata.jsonl:3, which counts)"
    assert "link to a folder" in reasons["linked"] and "format that is not read (.xyz" in reasons["notes.xyz"]
    assert data.skipped.summary().startswith("6 skipped: 3 x an image format that is not read, 1 x ")


def test_pictures_of_all_kinds_are_read(tmp_path):
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    image_file(tmp_path / "clear.png", 0, mode="RGBA")  # fully transparent black: white
    turned = Image.new("RGB", (20, 10))
    turned.paste((255, 255, 255), (0, 0, 10, 10))  # left half white; turned by 90 degrees it is the top
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    for path in tmp_path.glob("*.*g"):
        path.with_suffix(".txt").write_text(path.stem)
    for split in SPLITS:
        (tmp_path / split).mkdir()
    for path in list(tmp_path.glob("*.*")):
        path.rename(tmp_path / "train" / path.name)
    data = open_dataset(f"folder:{tmp_path}", "train", 8, 1)
    clear, deep, turned = (data[i]["image"] for i in range(3))
    assert data.captions == ["clear", "deep", "turned"]
    assert clear.min() == 1
    assert deep.mean().item() == pytest.approx(40_000 / 65_535, abs=0.01)
    assert turned[0, :3].min() > 0.9 and turned[0, -3:].max() < 0.1


def test_sound_jpeg_with_bytes_after_its_end_is_kept(tmp_path):
    path = noise_file(tmp_path / "a.jpg")
    assert fault_of(path) is None
    path.write_bytes(path.read_bytes() + b"trailer")
    assert fault_of(path) is None
