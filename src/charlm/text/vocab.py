"""`Vocab`: character to id and back, as tensors."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from charlm.errors import CharlmError, UnknownCharactersError

Unknown = Literal["error", "skip", "replace"]

_CHUNK = 2**18  # characters encoded together: the tensors made for them stay in the processor's cache
_NAMED = 8  # unknown characters that an error names


def code_points(text: str) -> Tensor:
    """Return the Unicode code points of `text`: int32 of shape (len(text),)."""
    if not text:
        return torch.empty(0, dtype=torch.int32, device="cpu")
    # Command-line arguments can hold lone surrogates.
    return torch.frombuffer(bytearray(text, "utf-32-le", "surrogatepass"), dtype=torch.int32)


def _chunks(text: str) -> Iterator[Tensor]:
    """Yield the code points of `text` in chunks."""
    return (code_points(text[start : start + _CHUNK]) for start in range(0, len(text), _CHUNK))


class Vocab:
    """The characters that a model knows; a character's id is its index in `characters`."""

    def __init__(self, characters: str):
        assert len(set(characters)) == len(characters), "a character occurs twice"
        self.characters = characters
        sizes = [len(char.encode("utf-8", "surrogatepass")) for char in characters]
        self._sizes = torch.tensor(sizes, dtype=torch.uint8, device="cpu")  # in UTF-8
        self._points = code_points(characters)
        # By code point; the last entry is that of all larger ones.
        rows = max(map(ord, characters), default=0) + 2
        self._ids = torch.full((rows,), -1, dtype=torch.int32, device="cpu")
        self._ids[self._points] = torch.arange(len(characters), dtype=torch.int32, device="cpu")

    @classmethod
    def from_counts(cls, points: Tensor, counts: Tensor, known: str = "") -> "Vocab":
        """Return the vocabulary of distinct code points (N,) that occur `counts` (N,) times.

        First come the characters of `known`, then the others; the most frequent one is the first of them, and
        ties are in the order of code points.
        Raises `CharlmError` if none occurs.
        """
        present = counts > 0
        if not present.any():
            raise CharlmError("the corpus is empty: it has no characters")
        points, by_point = points[present].sort()
        order = torch.argsort(counts[present][by_point], descending=True, stable=True)
        return cls("".join(dict.fromkeys([*known, *map(chr, points[order].tolist())])))

    def __len__(self) -> int:
        return len(self.characters)

    @property
    def replacement(self) -> str:
        """The character that replaces unknown ones: a space, or the most frequent if the space is unknown."""
        return " " if " " in self.characters else self.characters[:1]

    def encode(
        self,
        text: str,
        unknown: Unknown = "error",
        name: str = "the text",
        dtype: torch.dtype = torch.int32,
        begin: int = 0,
    ) -> Tensor:
        """Return the ids of `text`: `dtype` of shape (N,), N the number of characters that are not skipped.

        unknown: how characters outside the vocabulary are treated. ``error`` raises
            `UnknownCharactersError`, which names each with its position; ``skip`` leaves them out;
            ``replace`` encodes `replacement` for each.
        name: the name of the text in the error.
        begin: the position of `text` in a longer text, for the error.
        """
        ids, kept = torch.empty(len(text), dtype=dtype, device="cpu"), 0
        for points in _chunks(text):
            chunk = self.look_up(points)
            if chunk.min() < 0:
                missing = chunk < 0
                if unknown == "error":
                    raise UnknownCharactersError(self._describe(text, name, begin))
                if unknown == "skip":
                    chunk = chunk[~missing]
                else:
                    chunk = chunk.masked_fill(missing, self.characters.index(self.replacement))
            ids[kept : kept + len(chunk)] = chunk
            kept += len(chunk)
        return ids[:kept]

    def count_unknown(self, text: str) -> int:
        """Return the number of characters of `text` that are not in the vocabulary."""
        return sum(int((self.look_up(points) < 0).sum()) for points in _chunks(text))

    def decode(self, ids: Tensor) -> str:
        """Return the text of `ids`, integers of shape (N,)."""
        return "".join(self.characters[i] for i in ids.tolist())

    def num_bytes(self, ids: Tensor) -> int:
        """Return the number of bytes of the text of `ids` (N,) in UTF-8."""
        return int(self._sizes.index_select(0, ids).sum(dtype=torch.int64))

    def look_up(self, points: Tensor) -> Tensor:
        """Return the ids of code points (N,), -1 for unknown ones; `points` is overwritten."""
        # Ten times as fast as indexing.
        return self._ids.index_select(0, points.clamp_(max=len(self._ids) - 1))

    def _describe(self, text: str, name: str, begin: int) -> str:
        first: dict[str, int] = {}
        missing = self.look_up(code_points(text)) < 0
        for position in missing.nonzero().squeeze(1).tolist():
            first.setdefault(text[position], position)
        named = [f"{ascii_name(char)} at position {begin + at}" for char, at in list(first.items())[:_NAMED]]
        rest = f" and {len(first) - _NAMED} more" if len(first) > _NAMED else ""
        return (
            f"{name} has characters that the model does not know: {', '.join(named)}{rest}; "
            f"--unknown skip leaves them out, --unknown replace writes {self.replacement!r} for each "
            "(in Python: unknown='skip', unknown='replace')"
        )


def ascii_name(char: str) -> str:
    """Return `char` as a Python literal, with its code point."""
    return f"{char!r} (U+{ord(char):04X})"
