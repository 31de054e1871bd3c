"""The digits: fixed splits, measurements and the captions made from them; the tokenizers of captions."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from fastloss.recipes.data import tokenizer
from fastloss.recipes.data.digits import NAMES, SLANTS, WEIGHTS, caption_of, load_digits, measure, split_indices
from fastloss.recipes.data.samples import SPLITS


def test_digit_splits_are_disjoint_complete_and_fixed():
    parts = [split_indices(split) for split in SPLITS]
    assert [len(part) for part in parts] == [1397, 200, 200]
    assert sorted(np.concatenate(parts).tolist()) == list(range(1797))
    digest = hashlib.sha256(np.concatenate(parts).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "09b250ae1b820657"


def test_digits_are_images_of_every_size():
    for size in (8, 32, 64):
        data = load_digits("val", size)
        assert data.images.shape == (200, 1, size, size) and data.images.dtype == torch.float32
        assert data.images.min() >= 0 and 0.9 < data.images.max() <= 1
        assert len(data) == len(data.captions) == 200 and data.labels.dtype == torch.int64
    assert load_digits("val", 64).captions == load_digits("val", 32).captions
    with pytest.raises(ValueError, match="size"):
        load_digits("train", 7)
    with pytest.raises(ValueError, match="split"):
        load_digits("all")


def test_digit_captions_match_the_measurements():
    train = load_digits("train")
    for label in range(10):
        own = [i for i in range(len(train)) if train.labels[i] == label]
        for words, values in ((WEIGHTS, train.weight), (SLANTS, train.slant)):
            groups = [
                [values[i].item() for i in own if _words(train.captions[i])[1 if words is WEIGHTS else 2] == word]
                for word in words
            ]
            assert all(abs(len(group) - len(own) / 3) <= 1 for group in groups)  # terciles
            assert max(groups[0]) < min(groups[1]) and max(groups[1]) < min(groups[2])
    for split in SPLITS:
        data = load_digits(split)
        assert [_words(c)[0] for c in data.captions] == [NAMES[label] for label in data.labels]
        assert torch.equal(measure(data.images)[0], data.weight)


def _words(caption):
    """Digit, weight and slant of a caption."""
    first, rest = caption.split(" handwritten ")
    name, slant = rest.split(" ", 1)
    return name, first[2:], slant


def test_every_caption_has_training_images_and_reads_back():
    train = set(load_digits("train").captions)
    every = {caption_of(label, w, s) for label in range(10) for w in WEIGHTS for s in SLANTS}
    assert len(every) == 90 and train == every
    assert caption_of(7, "bold", "leaning right") == "a bold handwritten seven leaning right"
    with pytest.raises(ValueError, match="weight"):
        caption_of(7, "fat")
    with pytest.raises(ValueError, match="label"):
        caption_of(10)


def test_measure_knows_width_and_lean():
    image = torch.zeros(4, 1, 32, 32)
    image[0, 0, 4:28, 14:18] = 1  # 24 x 4: area 96, outline 56
    image[1, 0, 4:28, 12:20] = 0.5  # twice as wide, half as dark
    for y in range(4, 28):  # leans right by half a pixel a row
        x = 22 - y // 2
        image[2, 0, y, x : x + 4] = 1
    weight, slant = measure(image)
    assert weight[0].item() == pytest.approx(2 * 96 / (2 * 24 + 2 * 4) / 32, rel=0.02)
    assert weight[1].item() == pytest.approx(2 * 192 / (2 * 24 + 2 * 8) / 32, rel=0.02)
    assert slant[2].item() == pytest.approx(0.5, abs=0.01)
    assert slant[:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert weight[3] == 0 and slant[3] == 0  # an empty image
    assert measure(image.flip(-1))[1][2].item() == pytest.approx(-slant[2].item(), abs=1e-5)
    small = load_digits("val").images
    for size in (64, 128):  # the same digits at another size measure the same
        for values, others in zip(measure(small), measure(load_digits("val", size).images), strict=True):
            assert torch.allclose(values, others, rtol=0.05, atol=0.01)
    with pytest.raises(ValueError, match="images"):
        measure(torch.zeros(1, 3, 8, 8))


# Tokenizers


def test_tokenizers_encode_cut_pad_and_come_back():
    text = ["a bold seven", "", "Éà " * 40]
    words = tokenizer.WordTokenizer.from_captions(text[:1], max_length=6)
    for tokens in (tokenizer.ByteTokenizer(), words):
        ids, mask = tokens.encode(text)
        assert ids.shape == mask.shape == (3, tokens.max_length)
        assert ids.dtype == torch.int64 and mask.dtype == torch.bool
        assert torch.equal(mask, ids != tokenizer.PAD) and mask.any(1).all()
        assert int(ids.max()) < tokens.vocab_size
        assert ids[2, -1] == tokenizer.END
        again = tokenizer.from_state_dict(json.loads(json.dumps(tokens.state_dict())))
        assert type(again) is type(tokens) and torch.equal(again.encode(text)[0], ids)
        with pytest.raises(TypeError, match="captions"):
            tokens.encode("one string")
    assert words.encode(["a Bold dog"])[0].tolist() == [[3, 4, 2, 1, 0, 0]]
    with pytest.raises(ValueError, match="max_length"):
        tokenizer.ByteTokenizer(0)
    with pytest.raises(ValueError, match="kind"):
        tokenizer.from_state_dict({"kind": "sentencepiece"})
    with pytest.raises(ValueError, match="captions"):
        tokenizer.WordTokenizer.from_captions(["", " "])
