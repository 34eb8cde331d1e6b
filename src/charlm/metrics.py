"""`Score`: a sum of nats and a count of characters, and the metrics computed from them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A sum of surprisals over a number of characters. Scores can be added, which means of them cannot.

    nats: the sum of -ln p(character | the characters before it).
    characters: the number of characters scored.
    """

    nats: float = 0.0
    characters: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.characters + other.characters)

    @property
    def loss(self) -> float:
        """Nats per character; NaN if no character was scored."""
        return self.nats / self.characters if self.characters else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats per character): the number of equally likely characters with the same uncertainty."""
        return perplexity(self.loss)

    @property
    def bits_per_character(self) -> float:
        """Nats per character divided by ln 2."""
        return self.loss / math.log(2)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Return the bits per byte, for scored characters that take `num_bytes` bytes in UTF-8."""
        return self.nats / math.log(2) / num_bytes if num_bytes else math.nan


def perplexity(loss: float) -> float:
    """Return exp(loss), for a loss in nats per character; infinity if it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def shown(perplexity: float) -> str:
    """Return a perplexity as text, with two digits after the point, or in scientific form if it is large."""
    return f"{perplexity:.2f}" if perplexity < 1e7 else f"{perplexity:.2e}"
