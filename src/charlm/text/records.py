"""Records: the lines of a text, or its parts between delimiters, such as names, questions or poems."""

from collections.abc import Callable, Iterable, Iterator

from charlm.config import CorpusConfig


class Pieces:
    """A clean text that is added in pieces and kept, with the methods of `Encoder` that add to a text."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def add(self, text: str) -> None:
        """Add `text`."""
        self.pieces.append(text)

    def mark(self) -> Callable[[], None]:
        """Return a function that removes all text added after this call."""
        count = len(self.pieces)

        def take_back() -> None:
            del self.pieces[count:]

        return take_back

    @property
    def blank(self) -> bool:
        """Whether the text has no characters other than white space."""
        return not any(piece.strip() for piece in self.pieces)


def in_records(pieces: Iterable[str], config: CorpusConfig) -> Iterator[list[tuple[int, str]]]:
    """Yield, for each of `pieces` of a clean text, the records that it completes, with their positions.

    A record ends where ``corpus.records`` says; text after the last end is not a record. Blank records are
    left out. Records between delimiters are stripped of surrounding white space, and the character that is
    to follow them (U+001E) is replaced by a space.
    """
    separator, boundary = config.separator, config.boundary
    assert separator and boundary
    if config.lowercase:  # as the text
        separator = separator.lower()
    held, begin = list[str](), 0  # the text of the next record in pieces, and its position
    end_of_held = ""  # the characters with which a separator can begin
    for piece in pieces:
        held.append(piece)
        if separator not in end_of_held + piece:
            end_of_held = (end_of_held + piece)[-len(separator) :]
            yield []
            continue
        text, found, start = "".join(held), list[tuple[int, str]](), 0
        end = text.find(separator)
        while end >= 0:
            record, place = text[start:end], begin + start
            if config.records != "line":
                place += len(record) - len(record.lstrip())
                record = record.strip().replace(boundary, " ")
            if record.strip():
                found.append((place, record))
            start = end + len(separator)
            end = text.find(separator, start)
        held, begin = [text[start:]], begin + start
        end_of_held = held[0][-len(separator) :]
        yield found
