"""Writing text: a character at a time, each drawn from the model's prediction."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from charlm.errors import NOT_FINITE, CharlmError
from charlm.nn.kernels.native import kernels
from charlm.nn.model import CharLM
from charlm.nn.stepper import Quantize, Stepper
from charlm.text.vocab import Vocab

PREFIX_CHUNK = 4096  # characters of a long prefix that are read at once: bounds the memory
_CHANCES = 256  # characters for which the numbers by chance are made at once


def generate(
    model: CharLM,
    vocab: Vocab,
    prefix: Tensor,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str = "",
    generator: torch.Generator | None = None,
    quantize: Quantize | None = None,
) -> Iterator[str]:
    """Yield up to `length` characters that go on from `prefix`, one at a time.

    prefix: ids (N,) that the model reads first; where it is empty the text begins as after a line end.
    temperature: what the logits are divided by; 0 always takes the most probable character.
    top_k, top_p: draw among the k most probable characters, among the fewest that hold p together.
    stop: end once this text has been written.
    generator: the source of chance, on the CPU.
    quantize: write with the weights in fewer bits, as `Stepper` has it; the prefix is read with all.
    """
    tail = ""
    for (choice,) in _choices(model, vocab, prefix, length, temperature, top_k, top_p, [generator], quantize):
        character = vocab.characters[choice]
        yield character
        tail = (tail + character)[-len(stop) :] if stop else ""
        if stop and tail == stop:
            return


def generate_batch(
    model: CharLM,
    vocab: Vocab,
    prefix: Tensor,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str = "",
    generators: Sequence[torch.Generator | None] = (None,),
    quantize: Quantize | None = None,
) -> list[str]:
    """As many texts as there are `generators`, side by side: each as `generate` writes it with its own.

    With compiled kernels the predictions are the same to the bit; without, they are to rounding.
    """
    texts, ended = [""] * len(generators), [False] * len(generators)
    for choices in _choices(model, vocab, prefix, length, temperature, top_k, top_p, generators, quantize):
        for k, choice in enumerate(choices):
            if not ended[k]:
                texts[k] += vocab.characters[choice]
                ended[k] = bool(stop) and texts[k].endswith(stop)
        if all(ended):
            break
    return texts


@torch.inference_mode()
def _choices(
    model: CharLM,
    vocab: Vocab,
    prefix: Tensor,
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generators: Sequence[torch.Generator | None],
    quantize: Quantize | None,
) -> Iterator[list[int]]:
    """Yield the ids that come next, one for each of the generators, up to `length` times."""
    device, B = model.head.weight.device, len(generators)
    if not len(prefix):
        prefix = torch.tensor([max(vocab.characters.find("\n"), 0)], device="cpu")
    was_training = model.training
    model.eval()
    try:
        if length:
            logits, state = _read(model, prefix.long()[None].to(device))
            logits, state = logits.repeat(B, 1), tuple(tensor.repeat(1, B, 1) for tensor in state)
            stepper = Stepper(model, quantize)
        for n in range(length):
            if n % _CHANCES == 0 and (temperature or not n):
                chances = torch.stack([_random(_CHANCES, each) for each in generators], 1).unbind()
            choices = choose(logits.cpu(), chances[n % _CHANCES], temperature, top_k, top_p)
            yield choices.tolist()
            if n < length - 1:
                logits, state = stepper.step(choices.to(device), state)
    finally:
        model.train(was_training)


def _read(model: CharLM, prefix: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The logits (1, V) after the ids `prefix` (1, N), and the state."""
    state = model.initial_state(1)
    for part in torch.split(prefix, PREFIX_CHUNK, dim=1):
        logits, state = model(part, state)
    return logits[:, -1], state


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draw an id from logits (V,), as `choose` does."""
    return int(choose(logits[None], _random(1, generator), temperature, top_k, top_p))


def _random(count: int, generator: torch.Generator | None) -> Tensor:
    """Numbers (count,) drawn evenly from [0, 1)."""
    return torch.rand(count, dtype=torch.float64, generator=generator, device="cpu")


def choose(
    logits: Tensor,
    chances: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw ids (B,) from logits (B, V): first cut to the `top_k` best, then to the fewest that hold `top_p`.

    chances: numbers (B,) drawn evenly from [0, 1), in float64: they alone decide.
    top_p is applied to the probabilities at `temperature` (nucleus sampling, Holtzman et al. 2020).
    Raises `CharlmError` for logits that are not finite.
    """
    ids = None
    if temperature and (top_k is not None or top_p is not None):
        logits, ids = logits.sort(stable=True, dim=-1, descending=True)
    kept = min(top_k or logits.shape[1], logits.shape[1])
    drawn = _drawn(logits, kept, temperature, 1.0 if top_p is None else top_p, chances)
    if drawn is None:
        raise CharlmError(NOT_FINITE)
    return drawn if ids is None else ids.gather(1, drawn[:, None])[:, 0]


def _drawn(logits: Tensor, kept: int, temperature: float, top_p: float, chances: Tensor) -> Tensor | None:
    """`native.Kernels.draw`, also without kernels."""
    compiled = kernels(logits.dtype) if temperature else None
    if compiled and compiled.multiplies:
        return compiled.draw(logits.contiguous(), kept, temperature, top_p, chances.contiguous())
    logits = logits.double()
    if not math.isfinite(logits.sum()):
        return None
    if temperature == 0:
        return logits.argmax(-1)
    # In float64 with the largest at 0, no temperature overflows.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities = logits[:, :kept].softmax(-1)
    up_to = probabilities.cumsum(-1)
    if top_p < 1:
        up_to = (probabilities * (up_to - probabilities < top_p)).cumsum(-1)
    # A chance is at most 1 - 2⁻⁵³: times the last sum it is always rounded to less than that sum.
    return torch.searchsorted(up_to, (chances * up_to[:, -1])[:, None], right=True)[:, 0]
