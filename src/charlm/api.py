"""`LanguageModel`: a trained model as Python uses it; `charlm.load` gives one.

The examples below are run by the tests, with a run named ``first`` in ``runs/``.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, get_args

import torch
from torch import Tensor, nn

from charlm.config import Config
from charlm.errors import CharlmError, ConfigError
from charlm.inference import fill, sample
from charlm.inference.evaluate import CHUNK, evaluate, text_surprisals
from charlm.inference.sampling import Sampling
from charlm.nn.cells import State
from charlm.nn.device import choose_device
from charlm.nn.model import CharLM, FillLM, evaluating
from charlm.nn.stepper import Quantize
from charlm.storage import run as runs
from charlm.storage.model_file import Loaded, load_model
from charlm.text.clean import clean
from charlm.text.vocab import Unknown, Vocab

DEFAULTS = Sampling()


class LanguageModel:
    """A trained model, ready to write, to score and to embed texts.

    >>> import charlm
    >>> model = charlm.load("runs/first")
    >>> model
    <charlm LanguageModel: lstm 1 × 12, forward, 10 characters, 1,092 parameters>

    Texts are cleaned as the training text was (Unicode normal form, lower case, kept characters). `unknown`
    says what becomes of characters that the model does not know: ``error`` raises `CharlmError` that names
    them, ``skip`` leaves them out, ``replace`` puts a space for each, or where the model knows none its most
    frequent character.

    model: the network itself, a `torch.nn.Module`: ids and a state in, logits and a state out.
    vocab: the characters that it knows.
    config: what it was made from.
    figures: what training knew when it was saved: step, epoch, val_loss and so on.
    """

    def __init__(self, loaded: Loaded):
        self.model: CharLM = loaded.model
        self.vocab: Vocab = loaded.vocab
        self.config: Config = loaded.config
        self.figures: dict[str, Any] = loaded.figures

    @classmethod
    def load(
        cls,
        model: "str | PathLike[str] | None" = None,
        *,
        device: str = "auto",
        implementation: str | None = None,
    ) -> "LanguageModel":
        """What `charlm.load` gives."""
        path = runs.find_model(None if model is None else fspath(model))
        return cls(load_model(path, implementation, choose_device(device)))

    def __repr__(self) -> str:
        shape, count = self.config.model, sum(each.numel() for each in self.model.parameters())
        return (
            f"<charlm LanguageModel: {shape.cell} {shape.num_layers} × {shape.hidden_size}, "
            f"{shape.direction}, {len(self.vocab)} characters, {count:,} parameters>"
        )

    def generate(
        self,
        prefix: str = "",
        length: int = 500,
        sampling: Sampling = DEFAULTS,
        *,
        seed: int | None = None,
        unknown: Unknown = "error",
        quantize: Quantize | None = None,
        **changes: Any,
    ) -> str:
        """Return a text that begins with `prefix` and continues for up to `length` characters.

        >>> text = model.generate("abc", length=20, temperature=0.5, seed=1)
        >>> len(text), text[:3]
        (23, 'abc')
        >>> text == model.generate("abc", length=20, temperature=0.5, seed=1)
        True

        A model of ``model.direction: backward`` writes the text before the prefix: the result ends with it.

        sampling: how characters are drawn.
        seed: the same seed gives the same text; by default each call gives another text.
        unknown: how characters that the model does not know are treated (see the class).
        quantize: ``bf16`` or ``int8``: hold the weights in fewer bits, on the CPU.
        changes: fields of `sampling` by name: ``temperature`` (default 0.7), ``top_k``, ``top_p``, ``min_p``,
            ``stop``.

        Raises `ConfigError` for a value that is not allowed, `TypeError` for a name that `Sampling` does not
        have, and `CharlmError` for a model of ``model.direction: both``, for which there is `fill`.
        """
        options: Any = {"seed": seed, "unknown": unknown, "quantize": quantize, **changes}
        return "".join(self.stream(prefix, length, sampling, **options))

    def stream(
        self,
        prefix: str = "",
        length: int = 500,
        sampling: Sampling = DEFAULTS,
        *,
        seed: int | None = None,
        unknown: Unknown = "error",
        quantize: Quantize | None = None,
        **changes: Any,
    ) -> Iterator[str]:
        """Yield the text that `generate` returns in parts, as they are made: the prefix, then each character.

        >>> "".join(model.stream("abc", 20, seed=1)) == model.generate("abc", 20, seed=1)
        True

        A backward model writes the last character first: its text is the last part, and the parts before it,
        one for each character, are empty.
        """
        _check(length, seed, quantize)
        shown, start, sampling = self._read(prefix, replace(sampling, **changes), unknown)
        written = sample.generate(self.model, self.vocab, start, length, sampling, _generator(seed), quantize)

        def parts() -> Iterator[str]:
            if self._backward:
                end = ""
                for part in written:
                    end += part
                    yield ""  # the caller can stop here
                yield end[::-1] + shown
            else:
                yield shown
                yield from written

        return parts()

    def generate_batch(
        self,
        n: int,
        prefix: str = "",
        length: int = 500,
        sampling: Sampling = DEFAULTS,
        *,
        seed: int | None = None,
        unknown: Unknown = "error",
        quantize: Quantize | None = None,
        **changes: Any,
    ) -> list[str]:
        """Return `n` texts, written side by side, which is faster than one after the other.

        >>> texts = model.generate_batch(3, "abc", length=20, seed=1)
        >>> texts[1] == model.generate("abc", length=20, seed=2)
        True

        seed: text k is the text that `generate` returns with ``seed + k``.
        """
        _check(length, seed, quantize)
        _require(n >= 1, f"n {n}", "1 or more")
        shown, start, sampling = self._read(prefix, replace(sampling, **changes), unknown)
        generators = [_generator(None if seed is None else (seed + k) % 2**63) for k in range(n)]
        texts = sample.generate_batch(self.model, self.vocab, start, length, sampling, generators, quantize)
        return [written[::-1] + shown if self._backward else shown + written for written in texts]

    @property
    def _backward(self) -> bool:
        return self.config.model.direction == "backward"

    def _read(self, prefix: str, sampling: Sampling, unknown: Unknown) -> tuple[str, Tensor, Sampling]:
        """Return the prefix that the model reads, its ids (N,) and `sampling`, both in reading order."""
        if isinstance(self.model, FillLM):
            raise CharlmError(
                "a model of model.direction: both fills in characters between others and cannot continue "
                "a text; use charlm fill (in Python: fill), or a model of another direction"
            )
        ids = self._encode(prefix, unknown, "the prefix")
        stop = clean(sampling.stop, **{**self.config.corpus.cleaning, "keep": None})
        if never := sorted(set(stop) - set(self.vocab.characters)):
            raise ConfigError(f"stop {stop!r} can never be written: the model does not know {never}")
        shown = self.vocab.decode(ids)
        if self._backward:
            ids, stop = ids.flip(0), stop[::-1]
        return shown, ids, replace(sampling, stop=stop)

    def fill(
        self, text: str, *, blank: str = "_", best: int = 5, unknown: Unknown = "error"
    ) -> list[tuple[str, float]]:
        """The likeliest texts without the blanks in `text`, best first, with their probabilities.

        >>> filling = charlm.load("runs/filling")
        >>> [(text, probability), *_] = filling.fill("ab_de")
        >>> len(text), 0 < probability < 1
        (5, True)

        Raises `CharlmError` for a model that was not trained with ``model.direction: both``.
        """
        _require(len(blank) == 1, f"blank {blank!r}", "one character")
        _require(best >= 1, f"best {best}", "1 or more")
        _check_unknown(unknown)
        parts = [self._clean(part) for part in text.split(blank)]
        answers = fill.fill(self.model, self.vocab, parts, best, unknown=unknown)
        return [(fill.joined(parts, chars), probability) for chars, probability in answers]

    def score(self, text: str, *, unknown: Unknown = "error") -> list[tuple[str, float]]:
        """Each character of `text` with its surprisal in bits: -log2 of its probability given all before it.

        >>> scored = model.score("abcab")
        >>> [character for character, bits in scored]
        ['b', 'c', 'a', 'b']
        >>> bits_per_character = sum(bits for _, bits in scored) / len(scored)
        >>> abs(2**bits_per_character - model.perplexity("abcab")) < 1e-3
        True

        The first character has nothing before it and is left out; so is the last of a backward model, which
        reads from the end. A model that fills in characters scores every one, given all the others: their
        sum is a pseudo-likelihood, not to be compared with a likelihood.
        """
        ids = self._encode(text, unknown, "the text")
        bits = text_surprisals(self.model, ids) / math.log(2)
        direction = self.config.model.direction
        scored = {"forward": slice(1, None), "backward": slice(None, -1), "both": slice(None)}[direction]
        return list(zip(self.vocab.decode(ids[scored]), bits[scored].tolist(), strict=True))

    def perplexity(self, text: str, *, unknown: Unknown = "error") -> float:
        """The perplexity of `text`: e to the power of the mean surprisal, in nats, of its characters.

        >>> model.perplexity("abcab") < len(model.vocab) * 2
        True

        Raises `CharlmError` for a text of fewer than two characters and a model that fills in characters,
        whose score is no perplexity.
        """
        if isinstance(self.model, FillLM):
            raise CharlmError(
                "a model that fills in characters has no perplexity; the mean of score's bits is its "
                "pseudo-score, which does not compare with one"
            )
        ids = self._encode(text, unknown, "the text")
        if len(ids) < 2:
            raise CharlmError(f"the text has {len(ids)} characters to score; it takes two or more")
        return evaluate(self.model, ids).perplexity

    def embed(self, text: str, *, unknown: Unknown = "error") -> Tensor:
        """The hidden state h of the last recurrent layer after each character: float32 (N, H), on the CPU.

        >>> model.embed("abcab").shape
        torch.Size([5, 12])

        Row t has read `text` up to and with character t; of a backward model, from the end down to it. A
        model that fills in characters gives (N, 2 H): what the left-to-right stack has read up to and with
        character t, then what the right-to-left stack has.
        """
        ids = self._encode(text, unknown, "the text")
        model, state = self.model, self.model.initial_state(1)
        if isinstance(model, FillLM):
            half = len(state) // 2
            left = _hidden(model, model.recurrent, ids, state[:half])
            return torch.cat([left, _hidden(model, model.reverse, ids.flip(0), state[half:]).flip(0)], 1)
        if self._backward:
            return _hidden(model, model.recurrent, ids.flip(0), state).flip(0)
        return _hidden(model, model.recurrent, ids, state)

    def _clean(self, written: str) -> str:
        return clean(written, **self.config.corpus.cleaning)

    def _encode(self, written: str, unknown: Unknown, name: str) -> Tensor:
        _check_unknown(unknown)
        return self.vocab.encode(self._clean(written), unknown, name)


def _check(length: int, seed: int | None, quantize: Quantize | None) -> None:
    """Raise `ConfigError` for a value that is not allowed."""
    _require(length >= 0, f"length {length}", "0 or more")
    _require(seed is None or 0 <= seed < 2**63, f"seed {seed}", "from 0 to 2**63 - 1, or None")
    _require(quantize in (None, *get_args(Quantize)), f"quantize {quantize!r}", "bf16, int8 or None")


def _check_unknown(unknown: Unknown) -> None:
    _require(unknown in get_args(Unknown), f"unknown {unknown!r}", "error, skip or replace")


def _require(fine: bool, what: str, allowed: str) -> None:
    if not fine:
        raise ConfigError(f"{what} must be {allowed}")


def _parts(ids: Tensor, size: int) -> tuple[Tensor, ...]:
    """`ids` (N,) in parts of up to `size`; no part where there are none."""
    return torch.split(ids, size) if len(ids) else ()


def _generator(seed: int | None) -> torch.Generator:
    """A source of chance on the CPU."""
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return generator


def _hidden(model: CharLM, stack: nn.Module, ids: Tensor, state: State) -> Tensor:
    """What `stack`, one of the model's, gives for ids (N,) from `state` on: float32 (N, H), on the CPU."""
    found = [torch.empty(0, model.config.hidden_size, dtype=torch.float32, device="cpu")]
    with evaluating(model):
        for part in _parts(ids.long().to(model.head.weight.device), CHUNK):
            y, state = stack(model.embed(part[None]), state)
            found.append(y[0].float().cpu())
    return torch.cat(found)
