"""Writing text: a character at a time, each drawn from the model's prediction."""

from collections.abc import Iterator

import torch
from torch import Tensor

from charlm.errors import CharlmError
from charlm.model import CharLM
from charlm.vocab import Vocab

PREFIX_CHUNK = 4096  # characters of a long prefix that are read at once: bounds the memory


@torch.inference_mode()
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
) -> Iterator[str]:
    """Yield up to `length` characters that go on from `prefix`, one at a time.

    prefix: ids (N,) that the model reads first; where it is empty the text begins as after a line end.
    temperature: what the logits are divided by; 0 always takes the most probable character.
    top_k, top_p: draw among the k most probable characters, among the fewest that hold p together.
    stop: end once this text has been written.
    generator: the source of chance, on the CPU.
    """
    device = model.head.weight.device
    if not len(prefix):
        prefix = torch.tensor([max(vocab.characters.find("\n"), 0)])
    was_training = model.training
    model.eval()
    try:
        state, tail = model.initial_state(1), ""
        *read, x = torch.split(prefix.long()[None].to(device), PREFIX_CHUNK, dim=1)
        for part in read:
            _, state = model(part, state)
        for _ in range(length):
            logits, state = model(x, state)
            choice = draw(logits[0, -1].float().cpu(), temperature, top_k, top_p, generator)
            character = vocab.characters[choice]
            yield character
            tail = (tail + character)[-len(stop) :] if stop else ""
            if stop and tail == stop:
                return
            x = torch.tensor([[choice]], device=device)
    finally:
        model.train(was_training)


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draw an id from logits (V,): first cut to the `top_k` best, then to the fewest that hold `top_p`.

    top_p is applied to the probabilities at `temperature` (nucleus sampling, Holtzman et al. 2020).
    Raises `CharlmError` for logits that are not finite.
    """
    if not logits.isfinite().all():
        raise CharlmError(
            "the model's predictions are not finite: its training diverged; train with a smaller lr"
        )
    if temperature == 0:
        return int(logits.argmax())
    # In float64 with the largest at 0, no temperature overflows.
    logits, ids = ((logits.double() - logits.max()) / temperature).sort(descending=True, stable=True)
    probabilities = logits[:top_k].softmax(0)
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities[before < top_p]
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
