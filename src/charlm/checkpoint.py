"""The model file: weights and all that is needed to use them, in one safetensors file.

What stands in its header, and how it is read, is `header`'s. Nothing in a safetensors file can run code.
Files are written whole or not at all.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from charlm import config as configuration
from charlm.config import Config
from charlm.device import Uninitialised
from charlm.errors import CharlmError
from charlm.files import write_atomically
from charlm.header import FORMAT, read_header
from charlm.model import CharLM, make_model
from charlm.vocab import Vocab


def save_model(path: Path, model: CharLM, vocab: Vocab, config: Config, figures: dict[str, Any]) -> None:
    """Write `model` and what belongs to it to `path`, atomically; the bytes depend on the arguments alone."""
    text = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "vocab": vocab.characters,
        "figures": figures,
    }
    # named_parameters gives a tied weight once.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()}
    data = save(tensors, {"charlm": json.dumps(text)})
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


@dataclass(frozen=True)
class Loaded:
    """A model file in memory, ready to use."""

    model: CharLM
    vocab: Vocab
    config: Config
    figures: dict[str, Any]


def load_model(path: Path, implementation: str | None = None, device: str | torch.device = "cpu") -> Loaded:
    """Read a model file, in its own or another implementation.

    Raises `CharlmError` as `read_header` does, and where tensors are missing, left over or of wrong shape.
    """
    header = read_header(path)
    config = header.config
    if implementation:
        data = config.model_dump(mode="json")
        data["model"]["implementation"] = implementation
        config = configuration.from_data(data, str(path))
    with Uninitialised(), torch.device("meta"):  # sizes are checked before memory is taken
        model = make_model(len(header.vocab), config.model, torch.device(device))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    if shapes != header.tensors:
        wrong = sorted(
            name for name in shapes.keys() | header.tensors if shapes.get(name) != header.tensors.get(name)
        )
        raise CharlmError(f"{path} is damaged: its tensors do not fit its configuration ({', '.join(wrong)})")
    with Uninitialised():
        model = make_model(len(header.vocab), config.model, torch.device(device))
    try:
        with safe_open(path, framework="pt") as file:
            load_weights(model, {name: file.get_tensor(name) for name in shapes})
    except (SafetensorError, OSError) as error:
        raise CharlmError(f"{path} is damaged or cut short: {error}; restore it or train again") from None
    return Loaded(model.to(device).eval(), Vocab(header.vocab), config, header.figures)


@torch.no_grad()
def load_weights(model: CharLM, weights: dict[str, Tensor]) -> None:
    """Copy `weights`, by parameter name, into `model`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
