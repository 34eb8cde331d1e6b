"""The model file: weights and all that is needed to use them, in the container of `header`.

Files are written whole or not at all, and read through one open file: a training may replace it meanwhile.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import one_line
from charlm.nn.device import Uninitialised
from charlm.nn.model import CharLM, make_model
from charlm.storage.header import damaged, model_header, opened, read_container, read_tensors, save_container
from charlm.text.vocab import Vocab


def save_model(
    path: Path, model: CharLM, vocab: Vocab, config: Config, figures: dict[str, Any], fingerprint: str = ""
) -> None:
    """Write `model` and what it needs to `path`, atomically; the bytes depend on the arguments alone.

    figures: JSON values; floats that are not finite become null.
    fingerprint: SHA-256 of the training text, if it is known.
    """
    content: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "vocab": vocab.characters,
        "figures": figures,
        "fingerprint": fingerprint,
    }
    if vocab.unknown:
        content["unknown_kinds"] = vocab.unknown.kinds
    save_container(path, "model", content, dict(model.named_parameters()))  # a tied weight occurs once


@dataclass(frozen=True)
class Loaded:
    """A model file in memory, ready to use."""

    model: CharLM
    vocab: Vocab
    config: Config
    figures: dict[str, Any]


def load_model(path: Path, implementation: str | None = None, device: str | torch.device = "cpu") -> Loaded:
    """Read a model file, in its own or another implementation.

    Raises `CharlmError` as `header.read_header` does, for tensors that are missing, unknown or of the wrong
    shape, and for weights whose checksum does not match.
    """
    with opened(path) as file:
        container = read_container(file, path, "model")
        header = model_header(container, path)
        config = header.config
        if implementation:
            data = config.model_dump(mode="json")
            data["model"]["implementation"] = implementation
            config = configuration.from_data(data, str(path))
        with Uninitialised(), torch.device("meta"):  # check the shapes before memory is allocated
            model = make_model(len(header.vocab), config.model, torch.device(device))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        if shapes != header.tensors:
            names = sorted(shapes.keys() | header.tensors)
            wrong = [name for name in names if shapes.get(name) != header.tensors.get(name)]
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            found = ", ".join(map(one_line, wrong[:4])) + more
            raise damaged(path, f"its tensors do not fit its configuration ({found})")
        with Uninitialised(), torch.device("cpu"):  # whatever torch's default device is
            model = make_model(len(header.vocab), config.model, torch.device(device)).float()
        read_tensors(file, path, container, dict(model.named_parameters()))
    vocab = Vocab(header.vocab, header.unknown_kinds)
    model.unknown = vocab.unknown
    return Loaded(model.to(device).eval(), vocab, config, header.figures)


@torch.no_grad()
def load_weights(model: CharLM, weights: dict[str, Tensor]) -> None:
    """Copy `weights`, by parameter name, into `model`; raises `ValueError` for a tensor of another shape."""
    for name, parameter in model.named_parameters():
        if weights[name].shape != parameter.shape:
            raise ValueError(f"{name} has the shape {tuple(weights[name].shape)}")
        parameter.copy_(weights[name])
