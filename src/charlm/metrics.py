"""Nats and counts in; loss, perplexity and bits per character out."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A sum of surprisals and how many characters it is over; sums add, means do not.

    nats: sum over the characters of -ln p(character | those before it).
    characters: how many were scored.
    """

    nats: float = 0.0
    characters: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.characters + other.characters)

    @property
    def loss(self) -> float:
        """Nats per character; NaN when nothing was scored."""
        return self.nats / self.characters if self.characters else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats per character): as unsure as among so many equally likely characters."""
        return perplexity(self.loss)

    @property
    def bits_per_character(self) -> float:
        """Nats per character / ln 2."""
        return self.loss / math.log(2)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits over the `num_bytes` that the scored characters take in UTF-8."""
        return self.nats / math.log(2) / num_bytes if num_bytes else math.nan


def perplexity(loss: float) -> float:
    """exp(`loss` in nats per character), infinity where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
