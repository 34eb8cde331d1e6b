"""The model file: weights and all that is needed to use them, in one safetensors file.

The header's ``charlm`` entry is JSON: format version, configuration, vocabulary and figures. Nothing in a
safetensors file can run code. Files are written whole or not at all.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from charlm import config as configuration
from charlm.config import Config
from charlm.device import Uninitialised
from charlm.errors import CharlmError, ConfigError
from charlm.files import write_atomically
from charlm.model import CharLM, make_model
from charlm.vocab import Vocab

FORMAT = 1


@dataclass(frozen=True)
class Header:
    """What a model file says of itself.

    figures: what training knew when it was saved: step, epoch, val_loss and so on.
    tensors: name to shape.
    """

    config: Config
    vocab: str
    figures: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)


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


def read_header(path: Path) -> Header:
    """What the file at `path` holds, without its weights.

    Raises `CharlmError` for what is no model file of charlm's, is damaged, or is of a newer format.
    """
    _refuse_other_files(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise CharlmError(f"{path} is damaged or cut short: {error}; restore it or train again") from None
    if "charlm" not in metadata:
        raise CharlmError(f"{path} was not written by charlm: its header has no 'charlm' entry")
    try:
        text = json.loads(metadata["charlm"])
        version, vocab, figures = text["format"], text["vocab"], text["figures"]
        if version > FORMAT:
            raise CharlmError(
                f"{path} has format {version}, newer than this charlm reads ({FORMAT}); upgrade charlm"
            )
        config = configuration.from_data(text["config"], str(path))
        if not (
            isinstance(vocab, str) and vocab and len(set(vocab)) == len(vocab) and isinstance(figures, dict)
        ):
            raise ValueError("its vocabulary or its figures are malformed")
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise CharlmError(f"{path} is damaged: its header does not make sense ({error})") from None
    return Header(config, vocab, figures, tensors)


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
    with safe_open(path, framework="pt") as file:
        load_weights(model, {name: file.get_tensor(name) for name in shapes})
    return Loaded(model.to(device).eval(), Vocab(header.vocab), config, header.figures)


@torch.no_grad()
def load_weights(model: CharLM, weights: dict[str, Tensor]) -> None:
    """Copy `weights`, by parameter name, into `model`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def _refuse_other_files(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CharlmError(f"cannot read the model {path}: {error.strerror}") from None
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{":
        raise CharlmError(
            f"{path} is a pickle or a torch.save file, which can run code when it is read; "
            "charlm reads safetensors model files only"
        )
    if start[8:] != b"{":
        raise CharlmError(
            f"{path} is no model file, or it is damaged: it does not begin as a safetensors file"
        )
