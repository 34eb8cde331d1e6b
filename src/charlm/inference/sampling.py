"""`Sampling`: the options that decide which characters of the model's prediction can be drawn.

This module imports no torch, so that the command line can show the options without it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, get_args

from charlm.errors import ConfigError

_TYPES: dict[type, type] = {float: Real, int: Integral, str: str}  # NumPy's numbers are accepted too


_Check = tuple[str, Callable[[Any], bool]]  # the allowed values in words, and whether a value is one
_SHARE: _Check = ("above 0 and up to 1", lambda p: 0 < p <= 1)


def _option(default: Any, check: _Check, help: str) -> Any:  # noqa: A002
    return field(default=default, metadata={"allowed": check[0], "is_allowed": check[1], "help": help})


@dataclass(frozen=True)
class Sampling:
    """The options of drawing characters. The filters are applied in the order of the fields.

    temperature: the divisor of the logits; 0 always takes the most probable character.
    top_k: draw among the k most probable characters.
    top_p: draw among the fewest characters that hold the probability p together, of the probabilities at
        `temperature` after `top_k` (nucleus sampling, Holtzman et al. 2020).
    min_p: draw among the characters at least p times as probable as the most probable one, at `temperature`
        (Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling"); 1 keeps it and its ties.
    stop: end the text once it ends with this text.

    Raises `ConfigError` for a value that is not allowed.
    """

    temperature: float = _option(
        0.7,
        ("a finite number, 0 or more", lambda temperature: 0 <= temperature < math.inf),
        "Divide the logits by this: below 1 the text is plainer, above 1 wilder; 0 always takes the most "
        "probable character.",
    )
    top_k: int | None = _option(
        None, ("1 or more", lambda k: 1 <= k < 2**63), "Draw among this many most probable characters."
    )
    top_p: float | None = _option(
        None, _SHARE, "Draw among the fewest characters that hold this probability together."
    )
    min_p: float | None = _option(
        None,
        _SHARE,
        "Draw among the characters at least this many times as probable as the most probable one.",
    )
    stop: str = _option(
        "",
        ("a text", lambda stop: True),
        "End the text once it ends with this text; on the command line \\n is a line end.",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, kind = getattr(self, option.name), value_type(option.type)
            if value is None and option.default is None:
                continue
            if not (isinstance(value, _TYPES[kind]) and option.metadata["is_allowed"](value)):
                none = ", or None" if option.default is None else ""
                raise ConfigError(
                    f"{option.name} {value!r} is not allowed; it must be {option.metadata['allowed']}{none}"
                )
            object.__setattr__(self, option.name, kind(value))  # as the kernels need it

    @property
    def has_filters(self) -> bool:
        """True if a filter can exclude characters."""
        return (self.top_k, self.top_p, self.min_p) != (None, None, None)


def value_type(annotation: Any) -> type:
    """Return the type of an option's values: float for ``float`` and for ``float | None``."""
    found: type = (get_args(annotation) or (annotation,))[0]
    return found
