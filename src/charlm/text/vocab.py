"""`Vocab`: character to id and back, as tensors."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from charlm.errors import CharlmError, UnknownCharactersError

Unknown = Literal["error", "skip", "replace"]

UNKNOWN = "\ufffd"  # stands in a vocabulary for the class of all characters outside it

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


class UnknownClass(NamedTuple):
    """A class of characters that a model predicts as one.

    id: of the class. kinds: the number of different characters in it, each as probable as the others.
    """

    id: int
    kinds: int

    def nats(self, targets: Tensor) -> Tensor:
        """Return -ln p of the character given its class: ln kinds where ids `targets` (…) are `id`, else 0.

        float64 on the CPU, of the shape of `targets`.
        """
        return (targets == self.id).cpu().double() * math.log(self.kinds)


class Vocab:
    """The characters that a model knows; a character's id is its index in `characters`.

    kinds: the number of rare characters of the training text for which `UNKNOWN`, one of `characters`,
        stands; 0 if it stands for itself.
    unknown: the class of these characters, or None. All characters outside the vocabulary belong to it.
    writable: the ids of all other characters (V,) or (V - 1,), int64.
    """

    def __init__(self, characters: str, kinds: int = 0):
        assert len(set(characters)) == len(characters), "a character occurs twice"
        self.characters = characters
        self.unknown = UnknownClass(characters.index(UNKNOWN), kinds) if kinds else None
        self._points = code_points(characters)
        # By code point; the last entry is that of all larger ones.
        rows = max(map(ord, characters), default=0) + 2
        self._ids = torch.full((rows,), -1, dtype=torch.int32, device="cpu")
        self._ids[self._points] = torch.arange(len(characters), dtype=torch.int32, device="cpu")
        self.writable = torch.arange(len(characters), device="cpu")
        if self.unknown:
            self._ids[ord(UNKNOWN)] = -1  # in a text, it is one of the characters outside the vocabulary
            self.writable = self.writable[self.writable != self.unknown.id]

    @classmethod
    def from_counts(
        cls,
        points: Tensor,
        counts: Tensor,
        known: "Vocab | None" = None,
        min_count: int = 1,
        fixed: bool = False,
    ) -> "Vocab":
        """Return the vocabulary of distinct code points (N,) that occur `counts` (N,) times.

        First come the characters of `known`, then the others; the most frequent one is the first of them, and
        ties are in the order of code points. With ``min_count > 1``, or if `known` has the unknown class, the
        others that occur fewer than `min_count` times belong to this class, which comes last; its number of
        kinds is that of `known`, or counted here.

        fixed: no character is added to `known`; with ``min_count > 1`` there is always an unknown class.
        Raises `CharlmError` if no character occurs, or none often enough.
        """
        present = counts > 0
        if not present.any():
            raise CharlmError("the corpus is empty: it has no characters")
        known = known or cls("")
        points, by_point = points[present].sort()
        counts, order = counts[present][by_point].sort(descending=True, stable=True)
        points = points[order]
        added = known.look_up(points.clone()) < 0
        kinds = 0
        if min_count > 1 or known.unknown:
            rare = added & ((counts < min_count) | (points == ord(UNKNOWN)) | fixed)
            kinds = known.unknown.kinds if known.unknown else max(int(rare.sum()), int(fixed))
            added &= ~rare
        new = [] if fixed else map(chr, points[added].tolist())
        vocab = cls("".join(dict.fromkeys([*known.characters, *new, *(UNKNOWN if kinds else "")])), kinds)
        if not len(vocab.writable):
            raise CharlmError(
                f"no character occurs {min_count} times in train (corpus.min_count); use a smaller number"
            )
        return vocab

    def __len__(self) -> int:
        return len(self.characters)

    @property
    def replacement(self) -> str:
        """The character that replaces unknown ones: a space, or the most frequent one that ends no record."""
        found = (char for char in self.characters if char not in f"\n\x1e{UNKNOWN}")
        return " " if " " in self.characters else next(found, self.characters[:1])

    def encode(
        self,
        text: str,
        unknown: Unknown = "error",
        name: str = "the text",
        dtype: torch.dtype = torch.int32,
        begin: int = 0,
    ) -> Tensor:
        """Return the ids of `text`: `dtype` of shape (N,), N the number of characters that are not skipped.

        unknown: how characters outside the vocabulary are treated. ``error`` encodes the unknown class for
            each; without one, it raises `UnknownCharactersError`, which names each with its position.
            ``skip`` leaves them out; ``replace`` encodes `replacement` for each.
        name: the name of the text in the error.
        begin: the position of `text` in a longer text, for the error.
        """
        ids, kept = torch.empty(len(text), dtype=dtype, device="cpu"), 0
        for points in _chunks(text):
            chunk = self.look_up(points)
            if chunk.min() < 0:
                missing = chunk < 0
                if unknown == "error" and self.unknown:
                    chunk = chunk.masked_fill(missing, self.unknown.id)
                elif unknown == "error":
                    raise UnknownCharactersError(self._describe(text, name, begin))
                elif unknown == "skip":
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

    def look_up(self, points: Tensor) -> Tensor:
        """Return the ids of code points (N,), -1 outside the vocabulary; `points` is overwritten."""
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
