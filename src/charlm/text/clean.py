"""Cleaning of a text: its start, Unicode normal form, characters to keep, lower case, length limit.

It works piece by piece and gives the same result wherever the pieces end: the last characters of a piece are
held back as long as the characters after them can change the result.
"""

import functools
import re
import unicodedata
from typing import Literal, cast

from charlm.config import CorpusConfig
from charlm.text.decode import with_lf

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

_SIGMA = "Σ"  # the only character whose lower case depends on its neighbours: ς at the end of a word
_LAST_PAIRS = 0x20000  # from plane 2 on, no character is composed of two others


def clean(text: str, normalize: str = "NFC", lowercase: bool = False, keep: str | None = None) -> str:
    """Return the clean text of `text`.

    normalize: the Unicode normal form, or ``none``.
    keep: the inside of a regular expression's character class; each run of others becomes one space.
    """
    cleaner = Cleaner(normalize, lowercase, keep)
    return cleaner.feed(text) + cleaner.finish()


def clean_input(text: str, corpus: CorpusConfig) -> str:
    """Return `text`, which a user typed, as the training text of `corpus` is: with LF line ends, and clean.

    For a model of bytes these are its bytes in UTF-8, one character each.
    """
    if corpus.encoding == "bytes":
        return text.encode("utf-8", "surrogateescape").decode("latin-1")
    return clean(with_lf(text).removeprefix("\ufeff"), **corpus.cleaning)


class Cleaner:
    """`clean` for a text in pieces; a shallow copy continues from the position at which it was made.

    start: leave out the text before these words.
    max_chars: return at most this many characters.
    missed: whether `start` has not occurred yet.
    full: whether `max_chars` characters have been returned.
    """

    def __init__(
        self,
        normalize: str = "NFC",
        lowercase: bool = False,
        keep: str | None = None,
        start: str | None = None,
        max_chars: int | None = None,
    ):
        self.form, self.lowercase, self.start, self.left = normalize, lowercase, start or "", max_chars
        self.others = None if keep is None else re.compile(f"[^{keep}]+")
        self.missed, self.full = bool(start), False
        self._before_start = ""  # the last characters read, which may begin `start`
        self._unsettled: tuple[str, ...] = ()  # characters that normalisation may combine with the next ones
        self._in_others = False  # whether the last character was in a run that became a space
        self._in_word = False  # whether a Σ at this position, at the end of the text, would end a word
        # A Σ that may end a word, and the characters after it that do not decide.
        self._sigma: tuple[str, ...] = ()

    def feed(self, text: str) -> str:
        """Add `text`; return the clean characters that no later text can change."""
        return self._clean(text, last=False)

    def finish(self) -> str:
        """Return the rest, after the last piece."""
        return self._clean("", last=True)

    def _clean(self, text: str, last: bool) -> str:
        if self.full:
            return ""
        if self.missed:
            text = self._begin(text)
        if self.form != "none":
            text = self._normalise(text, last)
        if self.others and text:
            text = self._keep(self.others, text)
        if self.lowercase:
            text = self._lower(text, last)
        if self.left is not None:
            text = text[: self.left]
            self.left -= len(text)
            self.full = self.left == 0
        return text

    def _begin(self, text: str) -> str:
        text = self._before_start + text
        place = text.find(self.start)
        self.missed = place < 0
        if self.missed:
            self._before_start = text[max(len(text) - len(self.start) + 1, 0) :]
            return ""
        return text[place:]

    def _normalise(self, text: str, last: bool) -> str:
        cut = len(text) if last else _settled(text)
        if cut is None:
            self._unsettled += (text,) if text else ()
            return ""
        before = "".join((*self._unsettled, text[:cut]))
        self._unsettled = (text[cut:],) if cut < len(text) else ()
        return before if before.isascii() else unicodedata.normalize(cast(NormalForm, self.form), before)

    def _keep(self, others: re.Pattern[str], text: str) -> str:
        continues = self._in_others and others.match(text)
        self._in_others = others.match(text, len(text) - 1) is not None
        kept = others.sub(" ", text)
        return kept[1:] if continues else kept

    def _lower(self, text: str, last: bool) -> str:
        if self._sigma:
            self._sigma += (text,)
            if not last and _undecided(text):
                return ""
            text, self._sigma = "".join(self._sigma), ()
        sigma = -1 if last else text.rfind(_SIGMA)
        if sigma >= 0 and _undecided(text[sigma + 1 :]):
            text, self._sigma = text[:sigma], (text[sigma:],)
        # A letter before it represents the word begun earlier, a Σ after it the one held back.
        word, waits = ("a" if self._in_word else ""), (_SIGMA if self._sigma else "")
        lower = (word + text + waits).lower()
        self._in_word = _ends_in_word(text, self._in_word)
        return lower[len(word) : len(lower) - len(waits)]


def _settled(text: str) -> int | None:
    """The last index in `text` at which no character combines with those before it, or None."""
    if text.endswith((" ", "\n")):  # nothing combines with these; a typed line need not wait for the next
        return len(text)
    return next((place for place in range(len(text) - 1, -1, -1) if _is_boundary(text[place])), None)


@functools.lru_cache(maxsize=2**12)
def _is_boundary(char: str) -> bool:
    """Whether no normal form combines `char` with characters before it, or moves it before them."""
    if char.isascii():
        return True
    firsts = {char, unicodedata.normalize("NFD", char)[0], unicodedata.normalize("NFKD", char)[0]}
    return not any(unicodedata.combining(first) or first in _joining() for first in firsts)


@functools.cache
def _joining() -> frozenset[str]:
    """The characters that are the second of two in a composition."""
    pairs = (unicodedata.decomposition(chr(point)).split() for point in range(_LAST_PAIRS))
    hangul = (chr(point) for point in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)))
    seconds = (chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<")
    return frozenset((*seconds, *hangul))


def _undecided(after: str) -> bool:
    """Whether the text after `after` decides if a Σ before `after` ends its word."""
    return ("aΣ" + after).lower()[1] == "ς" != ("aΣ" + after + "a").lower()[1]


def _ends_in_word(text: str, before: bool) -> bool:
    """Whether a Σ after `text` would end a word; `before`: whether one before `text` would have."""

    def ends(letter: str, text: str) -> bool:
        return (letter + text + _SIGMA).lower()[-1] == "ς"

    tail = text[-99:]
    if ends("a", tail) == ends("", tail):  # which decides it most often
        return ends("", tail)
    return ends("a" if before else "", text)
