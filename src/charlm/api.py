"""`LanguageModel`: a trained model in Python, as `charlm.load` returns it.

The tests run the examples below, with a run named ``first`` in ``runs/``.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from charlm.config import Config
from charlm.errors import CharlmError, ConfigError
from charlm.inference import fill, sample
from charlm.inference.evaluate import CHUNK, evaluate, text_surprisals
from charlm.inference.sampling import Sampling
from charlm.inference.score import score_records
from charlm.metrics import Score
from charlm.nn.cells import State
from charlm.nn.model import CharLM, FillLM, evaluating, num_parameters
from charlm.nn.stepper import Quantize
from charlm.storage.model_file import Loaded
from charlm.text.clean import clean_input
from charlm.text.vocab import Unknown, Vocab

DEFAULTS = Sampling()


class LanguageModel:
    """A trained model that writes, scores, fills in and embeds texts.

    >>> import charlm
    >>> model = charlm.load("runs/first")
    >>> model
    <charlm LanguageModel: lstm 1 × 12, forward, 10 characters, 1,092 parameters>

    Texts are cleaned like the training text (Unicode normal form, lower case, kept characters). The argument
    `unknown` of the methods selects how characters that the model does not know are treated: ``error`` raises
    `UnknownCharactersError`, which names them, or, for a model trained with ``corpus.min_count``, reads each
    as the model's unknown; ``skip`` leaves them out; ``replace`` replaces each by a space, or by the most
    frequent character if the model does not know the space.

    model: the network, a `torch.nn.Module` that maps ids and a state to logits and a state.
    vocab: the characters that the model knows.
    config: the configuration that the model was trained with.
    figures: metrics at the time the model was saved: step, epoch, val_loss and so on.
    """

    def __init__(self, loaded: Loaded):
        self.model: CharLM = loaded.model
        self.vocab: Vocab = loaded.vocab
        self.config: Config = loaded.config
        self.figures: dict[str, Any] = loaded.figures

    def __repr__(self) -> str:
        shape = self.config.model
        return (
            f"<charlm LanguageModel: {shape.cell} {shape.num_layers} × {shape.hidden_size}, "
            f"{shape.direction}, {len(self.vocab)} characters, {num_parameters(self.model):,} parameters>"
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
        A model of ``corpus.records`` writes one record, which ends before `length` characters where the model
        ends it.

        seed: the same seed gives the same text; by default each call gives another text.
        unknown: how characters that the model does not know are treated (see the class).
        quantize: ``bf16`` or ``int8``: hold the weights in fewer bits, on the CPU.
        changes: fields of `sampling` by name: ``temperature``, ``top_k``, ``top_p``, ``min_p`` or ``stop``.

        Raises `ConfigError` for a value that is not allowed, and `CharlmError` for a model of
        ``model.direction: both``, for which there is `fill`.
        """
        parts = self.stream(
            prefix, length, sampling, seed=seed, unknown=unknown, quantize=quantize, **changes
        )
        return "".join(parts)

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
        known_prefix, start, sampling = self._read(prefix, replace(sampling, **changes), unknown)
        written = sample.generate(self.model, self.vocab, start, length, sampling, _generator(seed), quantize)
        if boundary := self.config.corpus.boundary:
            return itertools.chain(
                [known_prefix], itertools.takewhile(lambda part: part != boundary, written)
            )

        def reversed_parts() -> Iterator[str]:
            end = ""
            for part in written:
                end += part
                yield ""  # the caller can stop here
            yield end[::-1] + known_prefix

        return reversed_parts() if self._backward else itertools.chain([known_prefix], written)

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
        known_prefix, start, sampling = self._read(prefix, replace(sampling, **changes), unknown)
        generators = [_generator(None if seed is None else (seed + k) % 2**63) for k in range(n)]
        texts = sample.generate_batch(self.model, self.vocab, start, length, sampling, generators, quantize)
        if boundary := self.config.corpus.boundary:
            texts = [text.removesuffix(boundary) for text in texts]
        return [text[::-1] + known_prefix if self._backward else known_prefix + text for text in texts]

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
        known_prefix, ids = self._encode(prefix, unknown, "the prefix")
        stop = clean_input(sampling.stop, self.config.corpus.model_copy(update={"keep": None}))
        if never := sorted(set(stop) - set(self.vocab.decode(self.vocab.writable))):
            raise ConfigError(f"stop {stop!r} can never be written: the model does not know {never}")
        if boundary := self.config.corpus.boundary:
            _require(not stop, f"stop {stop!r}", "empty: each record ends where the model ends it")
            _require(boundary not in known_prefix, f"prefix {prefix!r}", "the beginning of one record")
            start = torch.tensor([self.vocab.characters.index(boundary)], device="cpu")
            return known_prefix, torch.cat([start, ids]), replace(sampling, stop=boundary)
        if self._backward:
            ids, stop = ids.flip(0), stop[::-1]
        return known_prefix, ids, replace(sampling, stop=stop)

    def fill(
        self, text: str, *, blank: str = "_", best: int = 5, unknown: Unknown = "error"
    ) -> list[tuple[str, float]]:
        """Return the `best` most probable fillings of the blanks in `text`, with their probabilities.

        >>> filling = charlm.load("runs/filling")
        >>> [(text, probability), *_] = filling.fill("ab_de")
        >>> len(text), 0 < probability < 1
        (5, True)

        Raises `CharlmError` for a model that was not trained with ``model.direction: both``.
        """
        _require(len(blank) == 1, f"blank {blank!r}", "one character")
        _require(best >= 1, f"best {best}", "1 or more")
        parts = [self._clean(part, unknown) for part in text.split(blank)]
        answers = fill.fill(self.model, self.vocab, parts, best, unknown=unknown)
        return [(fill.joined(parts, chars), probability) for chars, probability in answers]

    def score(self, text: str, *, unknown: Unknown = "error") -> list[tuple[str, float]]:
        """Return the characters of `text` with their surprisals, -log2 p given all before them, in bits.

        >>> scored = model.score("abcab")
        >>> [character for character, bits in scored]
        ['b', 'c', 'a', 'b']
        >>> bits_per_character = sum(bits for _, bits in scored) / len(scored)
        >>> abs(2**bits_per_character - model.perplexity("abcab")) < 1e-3
        True

        The first character has no prediction and is left out; for a model of ``model.direction: backward``,
        which reads from the end, the last is. A model of ``both`` scores every character given all the
        others: their sum is a pseudo-likelihood, which must not be compared with a likelihood.

        A model of ``corpus.records`` reads each record of `text` alone, and scores its first character and
        the boundary after it too.
        """
        corpus = self.config.corpus
        if corpus.records:
            pieces = [self._clean(text, unknown)]
            units = score_records(self.model, self.vocab, pieces, corpus, "char", unknown)
            return [(unit.text, unit.bits or 0.0) for unit in units]
        known_text, ids = self._encode(text, unknown)
        bits = text_surprisals(self.model, ids) / math.log(2)
        direction = self.config.model.direction
        scored = {"forward": slice(1, None), "backward": slice(None, -1), "both": slice(None)}[direction]
        return list(zip(known_text[scored], bits[scored].tolist(), strict=True))

    def perplexity(self, text: str, *, unknown: Unknown = "error") -> float:
        """Return the perplexity of `text`: e to the mean surprisal, in nats, of its characters.

        >>> model.perplexity("abcab") < len(model.vocab) * 2
        True

        Raises `CharlmError` for a text of fewer than two characters, and for a model of
        ``model.direction: both``, whose score is not a perplexity.
        """
        if isinstance(self.model, FillLM):
            raise CharlmError(
                "a model of model.direction: both has no perplexity; the mean of the bits of score() is its "
                "pseudo-score, which must not be compared with one"
            )
        if self.config.corpus.records:
            bits = [bits for _, bits in self.score(text, unknown=unknown)]
            if not bits:
                raise CharlmError("the text has no record to score")
            return Score(math.fsum(bits) * math.log(2), len(bits)).perplexity
        _, ids = self._encode(text, unknown)
        if len(ids) < 2:
            raise CharlmError(f"the text has {len(ids)} characters to score; two or more are needed")
        return evaluate(self.model, ids).perplexity

    def embed(self, text: str, *, unknown: Unknown = "error") -> Tensor:
        """Return the hidden state h of the last layer after each character: float32 (N, H), on the CPU.

        >>> model.embed("abcab").shape
        torch.Size([5, 12])

        Row t is the state after character t, read from the beginning, or for a model of ``model.direction:
        backward`` from the end. For a model of ``both`` the shape is (N, 2 H): the state of the left-to-right
        stack after character t, then that of the right-to-left stack.
        """
        _, ids = self._encode(text, unknown)
        model, state = self.model, self.model.initial_state(1)
        if isinstance(model, FillLM):
            half = len(state) // 2
            left = _hidden(model, model.recurrent, ids, state[:half])
            return torch.cat([left, _hidden(model, model.reverse, ids.flip(0), state[half:]).flip(0)], 1)
        if self._backward:
            return _hidden(model, model.recurrent, ids.flip(0), state).flip(0)
        return _hidden(model, model.recurrent, ids, state)

    def _clean(self, text: str, unknown: Unknown) -> str:
        _require(unknown in get_args(Unknown), f"unknown {unknown!r}", "error, skip or replace")
        return clean_input(text, self.config.corpus)

    def _encode(self, text: str, unknown: Unknown, name: str = "the text") -> tuple[str, Tensor]:
        """Return the clean text, without skipped and with replaced characters, and its ids (N,)."""
        text = self._clean(text, unknown)
        ids = self.vocab.encode(text, unknown, name)
        return text if unknown == "error" else self.vocab.decode(ids), ids


def _check(length: int, seed: int | None, quantize: Quantize | None) -> None:
    _require(length >= 0, f"length {length}", "0 or more")
    _require(seed is None or 0 <= seed < 2**63, f"seed {seed}", "from 0 to 2**63 - 1, or None")
    _require(quantize in (None, *get_args(Quantize)), f"quantize {quantize!r}", "bf16, int8 or None")


def _require(fine: bool, what: str, allowed: str) -> None:
    if not fine:
        raise ConfigError(f"{what} must be {allowed}")


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return generator


def _hidden(model: CharLM, stack: nn.Module, ids: Tensor, state: State) -> Tensor:
    """Return the output of `stack` of `model` for ids (N,) from `state`: float32 (N, H), on the CPU."""
    outputs = [torch.empty(0, model.config.hidden_size, dtype=torch.float32, device="cpu")]
    with evaluating(model):
        for part in torch.split(ids.long().to(model.head.weight.device), CHUNK) if len(ids) else ():
            y, state = stack(model.embed(part[None]), state)
            outputs.append(y[0].float().cpu())
    return torch.cat(outputs)
