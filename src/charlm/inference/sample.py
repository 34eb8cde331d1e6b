"""Writing text: one character at a time, each drawn from the model's prediction.

B texts side by side, V vocabulary, N characters of the prefix.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from charlm.errors import NOT_FINITE, CharlmError
from charlm.inference.sampling import Sampling as Sampling
from charlm.nn.kernels.native import DrawOptions, kernels
from charlm.nn.model import CharLM, evaluating
from charlm.nn.stepper import Quantize, Stepper
from charlm.text.vocab import Vocab

PREFIX_CHUNK = 4096  # characters of the prefix read in one forward pass: bounds the memory
_RANDOM_BLOCK = 256  # characters for which the random numbers are made at once


def generate(
    model: CharLM,
    vocab: Vocab,
    prefix: Tensor,
    length: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    quantize: Quantize | None = None,
) -> Iterator[str]:
    """Yield up to `length` characters that continue `prefix`, one at a time.

    prefix: ids (N,) that the model reads first; an empty prefix is read as a line end.
    generator: the source of random numbers, on the CPU.
    quantize: write with the weights in fewer bits (see `Stepper`); the prefix is read with all bits.
    """
    tail, stop = "", sampling.stop
    for (id_,) in _next_ids(model, vocab, prefix, length, sampling, [generator], quantize):
        character = vocab.characters[id_]
        yield character
        tail = (tail + character)[-len(stop) :] if stop else ""
        if stop and tail == stop:
            return


def generate_batch(
    model: CharLM,
    vocab: Vocab,
    prefix: Tensor,
    length: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator | None],
    quantize: Quantize | None = None,
) -> list[str]:
    """Write a text for each of `generators`, side by side: the text that `generate` writes with it alone.

    With compiled kernels the predictions are the same to the bit; without, to rounding.
    """
    texts, ended, stop = [""] * len(generators), [False] * len(generators), sampling.stop
    for ids in _next_ids(model, vocab, prefix, length, sampling, generators, quantize):
        for k, id_ in enumerate(ids):
            if not ended[k]:
                texts[k] += vocab.characters[id_]
                ended[k] = bool(stop) and texts[k].endswith(stop)
        if all(ended):
            break
    return texts


def sample(
    model: CharLM,
    vocab: Vocab,
    boundary: int | None,
    length: int,
    generator: torch.Generator,
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
) -> str:
    """Return a text of `length` characters, for a `sampling` without ``stop``.

    boundary: as in `Corpus`. With it, the text is records, each from a zero state, with a line end after it;
        the last one is cut.
    """
    start = torch.tensor([] if boundary is None else [boundary], dtype=torch.int32, device="cpu")
    if boundary is not None:
        sampling = replace(sampling, stop=vocab.characters[boundary])
    text = ""
    while len(text) < length:
        written = "".join(generate(model, vocab, start, length - len(text), sampling, generator))
        text += written.replace(sampling.stop, "\n") if sampling.stop else written
    return text


@torch.inference_mode()
def _next_ids(
    model: CharLM,
    vocab: Vocab,
    prefix: Tensor,
    length: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator | None],
    quantize: Quantize | None,
) -> Iterator[list[int]]:
    """Yield the next ids, one for each of `generators`, up to `length` times."""
    device, B = model.head.weight.device, len(generators)
    if not len(prefix):
        prefix = torch.tensor([max(vocab.characters.find("\n"), 0)], device="cpu")
    if not length:
        return
    with evaluating(model):
        state = model.initial_state(1)
        for part in torch.split(prefix.long()[None].to(device), PREFIX_CHUNK, dim=1):
            logits, state = model(part, state)
        logits, state = logits[:, -1].repeat(B, 1), tuple(tensor.repeat(1, B, 1) for tensor in state)
    stepper = Stepper(model, quantize)
    for n in range(length):
        if n % _RANDOM_BLOCK == 0 and (sampling.temperature or not n):
            drawn = (
                torch.rand(_RANDOM_BLOCK, dtype=torch.float64, generator=each, device="cpu")
                for each in generators
            )
            uniforms = torch.stack([*drawn], 1).unbind()
        logits = logits.cpu()
        if vocab.unknown:  # never drawn: it is a class of characters
            logits = logits.index_select(1, vocab.writable)
        ids = choose(logits, uniforms[n % _RANDOM_BLOCK], sampling)
        if vocab.unknown:
            ids = vocab.writable[ids]
        yield ids.tolist()
        if n < length - 1:
            logits, state = stepper.step(ids.to(device), state)


def choose(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw ids (B,) from logits (B, V) on the CPU.

    uniforms: numbers (B,) drawn uniformly from [0, 1), in float64: the only source of randomness.
    Raises `CharlmError` for logits that are not finite.
    """
    ids = None
    if sampling.temperature and sampling.has_filters:
        logits, ids = logits.sort(stable=True, dim=-1, descending=True)
    compiled = kernels(logits.dtype) if sampling.temperature else None
    if compiled and compiled.writes:
        drawn = compiled.draw(logits.contiguous(), uniforms.contiguous(), _draw_options(sampling))
    else:
        drawn = _drawn_by_torch(logits, uniforms, sampling)
    if drawn is None:
        raise CharlmError(NOT_FINITE)
    return drawn if ids is None else ids.gather(1, drawn[:, None])[:, 0]


@functools.lru_cache
def _draw_options(sampling: Sampling) -> DrawOptions:
    return DrawOptions(*(getattr(sampling, name) or 0 for name, _ in DrawOptions._fields_))


def _drawn_by_torch(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor | None:
    """Do the same as `native.Kernels.draw`, and at temperature 0 return the most probable ids."""
    logits = logits.double()
    if not math.isfinite(logits.sum()):
        return None
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # In float64 and with the largest logit at 0, no temperature overflows.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    probabilities = logits[:, : sampling.top_k].softmax(-1)
    top_p = sampling.top_p or 1
    if top_p < 1:
        probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < top_p)
    if sampling.min_p is not None:
        probabilities = probabilities * (logits[:, : sampling.top_k].exp() >= sampling.min_p)
    up_to = probabilities.cumsum(-1)
    # A number below 1 is at most 1 - 2⁻⁵³: its product with the last sum is rounded to less than that sum.
    return torch.searchsorted(up_to, (uniforms * up_to[:, -1])[:, None], right=True)[:, 0]
