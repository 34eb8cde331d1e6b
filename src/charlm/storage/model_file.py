"""The model file: weights and all that is needed to use them, in one safetensors file.

What stands in its header, and how that is read and checked, is `header`'s; the tensors' checksum is checked
when they are loaded. Nothing in a safetensors file can run code. Files are written whole or not at all, and
read through one open file: a training may put a newer one in its place meanwhile.
"""

import ctypes
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, one_line
from charlm.files import write_atomically
from charlm.nn.device import Uninitialised
from charlm.nn.model import CharLM, make_model
from charlm.storage.header import FORMAT, NO_DIGEST, damaged, opened, read_opened
from charlm.text.vocab import Vocab

_CHUNK = 2**22  # bytes that are read and summed at once


def save_model(path: Path, model: CharLM, vocab: Vocab, config: Config, figures: dict[str, Any]) -> None:
    """Write `model` and what belongs to it to `path`, atomically; the bytes depend on the arguments alone."""
    text = {
        "format": FORMAT,
        "header_sha256": NO_DIGEST,
        "data_sha256": NO_DIGEST,
        "config": config.model_dump(mode="json"),
        "vocab": vocab.characters,
        "figures": figures,
    }
    # named_parameters gives a tied weight once.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()}
    whole = memoryview(save(tensors, {"charlm": json.dumps(text)}))
    begin = 8 + int.from_bytes(whole[:8], "little")
    zeros, data = NO_DIGEST.encode(), whole[begin:]
    first, second, third = bytes(whole[8:begin]).split(zeros, 2)
    second += hashlib.sha256(data).hexdigest().encode()
    digest = hashlib.sha256(first + zeros + second + third).hexdigest().encode()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(bytes(whole[:8]) + first + digest + second + third)
            file.write(data)

    write_atomically(path, write)


@dataclass(frozen=True)
class Loaded:
    """A model file in memory, ready to use."""

    model: CharLM
    vocab: Vocab
    config: Config
    figures: dict[str, Any]


def load_model(path: Path, implementation: str | None = None, device: str | torch.device = "cpu") -> Loaded:
    """Read a model file, in its own or another implementation.

    Raises `CharlmError` as `header.read_header` does, for tensors that are missing, left over or of wrong
    shape, and for weights that are not those that were saved.
    """
    with opened(path) as file:
        header = read_opened(file, path)
        config = header.config
        if implementation:
            data = config.model_dump(mode="json")
            data["model"]["implementation"] = implementation
            config = configuration.from_data(data, str(path))
        with Uninitialised(), torch.device("meta"):  # sizes are checked before memory is taken
            model = make_model(len(header.vocab), config.model, torch.device(device))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        if shapes != header.tensors:
            wrong = [
                name
                for name in sorted(shapes.keys() | header.tensors)
                if shapes.get(name) != header.tensors.get(name)
            ]
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise CharlmError(
                f"{path} is damaged: its tensors do not fit its configuration "
                f"({', '.join(map(one_line, wrong[:4]))}{more})"
            )
        with Uninitialised(), torch.device("cpu"):  # the file's bytes go there, whatever torch's defaults are
            model = make_model(len(header.vocab), config.model, torch.device(device)).float()
        parameters = dict(model.named_parameters())
        digest = hashlib.sha256()
        for name in header.tensors:
            _read_tensor(file, parameters[name], digest)
    if digest.hexdigest() != header.data_sha256:
        raise damaged(path, "the checksum of its weights does not match")
    return Loaded(model.to(device).eval(), Vocab(header.vocab), config, header.figures)


@torch.no_grad()
def load_weights(model: CharLM, weights: dict[str, Tensor]) -> None:
    """Copy `weights`, by parameter name, into `model`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def _read_tensor(file: io.BufferedReader, tensor: Tensor, digest: Any) -> None:
    """Fill `tensor`, float32, contiguous and on the CPU, from `file`; its bytes go into `digest`."""
    place = (ctypes.c_ubyte * (4 * tensor.numel())).from_address(tensor.data_ptr())
    view = memoryview(place).cast("B")
    for start in range(0, len(view), _CHUNK):
        chunk = view[start : start + _CHUNK]
        digest.update(chunk[: file.readinto(chunk)])
