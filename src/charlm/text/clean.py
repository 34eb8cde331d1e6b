"""Text as the model sees it: begun at given words, normalised, reduced to kept characters, in lower case.

A piece at a time: what a piece's last characters become can depend on what follows them, so they wait for it.
"""

import functools
import re
import unicodedata
from typing import Literal, cast

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

_SIGMA = "Σ"  # the one character whose lower case depends on its neighbours: ς ends a word
_LAST_PAIRS = 0x20000  # planes 2 and up have no character that is composed of two


def clean(text: str, normalize: str = "NFC", lowercase: bool = False, keep: str | None = None) -> str:
    """`text` as the model sees it.

    normalize: the Unicode normal form, or ``none``.
    keep: the inside of a regular expression's character class; each run of other characters becomes a space.
    """
    cleaner = Cleaner(normalize, lowercase, keep)
    return cleaner.feed(text) + cleaner.finish()


class Cleaner:
    """What `clean` does, for a text that comes in pieces; a shallow copy goes on from where it was made.

    start: leave out what is before these words.
    max_chars: give so many characters at most.
    missed: whether `start` has not come yet.
    full: whether there are `max_chars`.
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
        self._before_start = ""  # the last characters read, too few for `start`
        self._unsettled: tuple[str, ...] = ()  # what normalisation may still join to what follows
        self._in_others = False  # whether the last character was one of a run that became a space
        self._in_word = False  # whether a Σ that came now would end a word, were there no more
        self._sigma: tuple[str, ...] = ()  # a Σ that may end a word, and what cannot tell

    def feed(self, text: str) -> str:
        """What is settled when `text` has come."""
        return self._clean(text, last=False)

    def finish(self) -> str:
        """The rest, when all has come."""
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
        goes_on = self._in_others and others.match(text)
        self._in_others = others.match(text, len(text) - 1) is not None
        kept = others.sub(" ", text)
        return kept[1:] if goes_on else kept

    def _lower(self, text: str, last: bool) -> str:
        if self._sigma:
            self._sigma += (text,)
            if not last and _cannot_tell(text):
                return ""
            text, self._sigma = "".join(self._sigma), ()
        sigma = -1 if last else text.rfind(_SIGMA)
        if sigma >= 0 and _cannot_tell(text[sigma + 1 :]):
            text, self._sigma = text[:sigma], (text[sigma:],)
        # A letter in front stands for the word that was begun before, a Σ behind for the one that waits.
        word, waits = ("a" if self._in_word else ""), (_SIGMA if self._sigma else "")
        lower = (word + text + waits).lower()
        self._in_word = _ends_in_word(text, self._in_word)
        return lower[len(word) : len(lower) - len(waits)]


def _settled(text: str) -> int | None:
    """The last place in `text` from which on nothing joins what is before it; None where there is none."""
    if text.endswith((" ", "\n")):  # which nothing joins: what is typed does not wait for the next line
        return len(text)
    return next((place for place in range(len(text) - 1, -1, -1) if _begins_anew(text[place])), None)


@functools.lru_cache(maxsize=2**12)
def _begins_anew(char: str) -> bool:
    """Whether no normal form joins `char` to what is before it, or puts it before that."""
    if char.isascii():
        return True
    firsts = {char, unicodedata.normalize("NFD", char)[0], unicodedata.normalize("NFKD", char)[0]}
    return not any(unicodedata.combining(first) or first in _joining() for first in firsts)


@functools.cache
def _joining() -> frozenset[str]:
    """The characters that are the second of two that compose one."""
    pairs = (unicodedata.decomposition(chr(point)).split() for point in range(_LAST_PAIRS))
    hangul = (chr(point) for point in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)))
    seconds = (chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<")
    return frozenset((*seconds, *hangul))


def _cannot_tell(after: str) -> bool:
    """Whether what comes after `after` decides if a Σ before it ends its word."""
    return ("aΣ" + after).lower()[1] == "ς" != ("aΣ" + after + "a").lower()[1]


def _ends_in_word(text: str, before: bool) -> bool:
    """Whether a Σ behind `text` would end a word; `before`: whether it would have in front of it."""

    def ends(letter: str, text: str) -> bool:
        return (letter + text + _SIGMA).lower()[-1] == "ς"

    tail = text[-99:]
    if ends("a", tail) == ends("", tail):  # which most often tells
        return ends("", tail)
    return ends("a" if before else "", text)
