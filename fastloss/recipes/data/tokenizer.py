"""Tokenizers without downloads: bytes for any text, words for a small vocabulary. Both close a caption with END."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

PAD, END = 0, 1  # END also keeps an empty caption from being masked out entirely, which attention cannot take


class ByteTokenizer:
    """UTF-8 bytes, shifted past PAD and END; longer captions are cut to `max_length - 1` bytes and END.

    Example:
        >>> ids, mask = ByteTokenizer(max_length=4).encode(["ab"])
        >>> ids.tolist(), mask.tolist()
        ([[99, 100, 1, 0]], [[True, True, True, False]])
    """

    kind = "byte"
    vocab_size = 2 + 256

    def __init__(self, max_length: int = 64):
        self.max_length = _check_length(max_length)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids `[N, max_length]` int64 and the mask of real tokens, bool."""
        return _pack([[byte + 2 for byte in text.encode()] for text in _check_captions(captions)], self.max_length)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_length": self.max_length}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ByteTokenizer:
        return cls(state["max_length"])


class WordTokenizer:
    """Lower-case words and punctuation marks of a fixed vocabulary; any other word becomes UNKNOWN.

    Example:
        >>> tokenizer = WordTokenizer.from_captions(["a bold seven", "a thin one"], max_length=5)
        >>> tokenizer.words
        ['a', 'bold', 'one', 'seven', 'thin']
        >>> tokenizer.encode(["A bold dog"])[0].tolist()
        [[3, 4, 2, 1, 0]]
    """

    kind = "word"
    UNKNOWN = 2

    def __init__(self, words: Sequence[str], max_length: int = 16):
        self.words = list(words)
        self.max_length = _check_length(max_length)
        self._ids = {word: i for i, word in enumerate(self.words, start=3)}
        if len(self._ids) < len(self.words):
            raise ValueError("words: expected no word twice")

    @classmethod
    def from_captions(cls, captions: Iterable[str], max_length: int = 16, max_words: int = 30_000) -> WordTokenizer:
        """The `max_words` most frequent words of the captions, in alphabetical order."""
        counts = Counter(word for text in captions for word in _words(text))
        if not counts:
            raise ValueError("captions: expected at least one word, got none")
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(sorted(ranked[:max_words]), max_length)

    @property
    def vocab_size(self) -> int:
        return 3 + len(self.words)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids `[N, max_length]` int64 and the mask of real tokens, bool."""
        rows = [[self._ids.get(word, self.UNKNOWN) for word in _words(text)] for text in _check_captions(captions)]
        return _pack(rows, self.max_length)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "words": list(self.words), "max_length": self.max_length}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> WordTokenizer:
        return cls(state["words"], state["max_length"])


def from_state_dict(state: dict[str, Any]) -> ByteTokenizer | WordTokenizer:
    """The tokenizer that `state_dict()` describes, of whichever kind."""
    kind = state.get("kind")
    if kind == ByteTokenizer.kind:
        return ByteTokenizer.from_state_dict(state)
    if kind == WordTokenizer.kind:
        return WordTokenizer.from_state_dict(state)
    raise ValueError(f"state: expected a tokenizer of kind 'byte' or 'word', got {kind!r}")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _check_captions(captions: Sequence[str]) -> Sequence[str]:
    if isinstance(captions, str):
        raise TypeError("captions: expected a list of strings, got one string")
    return captions


def _check_length(max_length: int) -> int:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length: expected an integer >= 1, got {max_length!r}")
    return max_length


def _pack(rows: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Rows cut to `length - 1`, closed with END and padded: one static shape, which torch.compile wants."""
    closed = [row[: length - 1] + [END] for row in rows]
    padded = [row + [PAD] * (length - len(row)) for row in closed]
    ids = torch.tensor(padded, dtype=torch.int64).view(len(rows), length)
    return ids, ids != PAD
