"""The model file: weights and all that is needed to use them, in one safetensors file.

The header's ``charlm`` entry is JSON: format version, checksums, configuration, vocabulary and figures.
``header_sha256`` is of the header's bytes with zeros in its own place, ``data_sha256`` of the tensors' bytes
behind it: the header is checked whenever it is read, the tensors when they are loaded. Nothing in a
safetensors file can run code. Files are written whole or not at all, and read through one open file: a
training may put a newer one in its place meanwhile.
"""

import ctypes
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from charlm import config as configuration
from charlm.config import Config
from charlm.device import Uninitialised
from charlm.errors import CharlmError, ConfigError, one_line
from charlm.files import write_atomically
from charlm.model import CharLM, make_model
from charlm.vocab import Vocab

FORMAT = 2  # 1 had no checksums, and was never released

_NO_DIGEST = "0" * 64
_MAX_HEADER = 2**24  # bytes: all of Unicode as a vocabulary takes 15.6 MB, escaped
_CHUNK = 2**22  # bytes that are read and summed at once


@dataclass(frozen=True)
class Header:
    """What a model file says of itself.

    figures: what training knew when it was saved: step, epoch, val_loss and so on.
    tensors: name to shape, in the order of their bytes.
    data_sha256: of those bytes, in hexadecimal.
    """

    config: Config
    vocab: str
    figures: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    data_sha256: str = _NO_DIGEST


def save_model(path: Path, model: CharLM, vocab: Vocab, config: Config, figures: dict[str, Any]) -> None:
    """Write `model` and what belongs to it to `path`, atomically; the bytes depend on the arguments alone."""
    text = {
        "format": FORMAT,
        "header_sha256": _NO_DIGEST,
        "data_sha256": _NO_DIGEST,
        "config": config.model_dump(mode="json"),
        "vocab": vocab.characters,
        "figures": figures,
    }
    # named_parameters gives a tied weight once.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()}
    whole = memoryview(save(tensors, {"charlm": json.dumps(text)}))
    begin = 8 + int.from_bytes(whole[:8], "little")
    zeros, data = _NO_DIGEST.encode(), whole[begin:]
    first, second, third = bytes(whole[8:begin]).split(zeros, 2)
    second += hashlib.sha256(data).hexdigest().encode()
    digest = hashlib.sha256(first + zeros + second + third).hexdigest().encode()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(bytes(whole[:8]) + first + digest + second + third)
            file.write(data)

    write_atomically(path, write)


def read_header(path: Path) -> Header:
    """What the file at `path` holds, without its weights, which are not looked at.

    Raises `CharlmError` for what is no model file of charlm's, is damaged, or is of a newer format.
    """
    with _opened(path) as file:
        return _read_header(file, path)


@dataclass(frozen=True)
class Loaded:
    """A model file in memory, ready to use."""

    model: CharLM
    vocab: Vocab
    config: Config
    figures: dict[str, Any]


def load_model(path: Path, implementation: str | None = None, device: str | torch.device = "cpu") -> Loaded:
    """Read a model file, in its own or another implementation.

    Raises `CharlmError` as `read_header` does, for tensors that are missing, left over or of wrong shape, and
    for weights that are not those that were saved.
    """
    with _opened(path) as file:
        header = _read_header(file, path)
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
        with Uninitialised():
            model = make_model(len(header.vocab), config.model, torch.device(device))
        parameters = dict(model.named_parameters())
        digest = hashlib.sha256()
        for name in header.tensors:
            _read_tensor(file, parameters[name], digest)
    if digest.hexdigest() != header.data_sha256:
        raise _damaged(path, "the checksum of its weights does not match")
    return Loaded(model.to(device).eval(), Vocab(header.vocab), config, header.figures)


@torch.no_grad()
def load_weights(model: CharLM, weights: dict[str, Tensor]) -> None:
    """Copy `weights`, by parameter name, into `model`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise CharlmError(f"cannot read the model {path}: {error.strerror}") from None
    with file:
        yield file


def _read_tensor(file: io.BufferedReader, tensor: Tensor, digest: Any) -> None:
    """Fill `tensor`, float32, contiguous and on the CPU, from `file`; its bytes go into `digest`."""
    place = (ctypes.c_ubyte * (4 * tensor.numel())).from_address(tensor.data_ptr())
    view = memoryview(place).cast("B")
    for start in range(0, len(view), _CHUNK):
        chunk = view[start : start + _CHUNK]
        digest.update(chunk[: file.readinto(chunk)])


def _read_header(file: io.BufferedReader, path: Path) -> Header:
    """The header of the model in `file`, checked; `file` is then where the tensors' bytes begin."""
    raw = _raw_header(file, path)
    try:
        entries = json.loads(raw, object_pairs_hook=_once)
        metadata = entries.pop("__metadata__", {})
        if "charlm" not in metadata:
            raise CharlmError(f"{path} was not written by charlm: its header has no 'charlm' entry")
        text = json.loads(metadata["charlm"], object_pairs_hook=_once)
        version = text["format"]
        if type(version) is not int or version < 1:
            raise ValueError("its format is no number")
        if version != FORMAT:
            raise _other_format(path, version)
        claimed = text["header_sha256"].encode()
        before, _, after = raw.partition(claimed)
        if hashlib.sha256(before + _NO_DIGEST.encode() + after).hexdigest().encode() != claimed:
            raise _damaged(path, "the checksum of its header does not match")
        tensors, vocab, figures = _shapes(entries), text["vocab"], text["figures"]
        expected = file.tell() + 4 * sum(map(prod, tensors.values()))
        found = os.fstat(file.fileno()).st_size
        if found != expected:
            cut = "it is cut short: " if found < expected else ""
            raise _damaged(path, f"{cut}it has {found:,} bytes, not {expected:,}")
        if not (
            isinstance(vocab, str) and vocab and len(set(vocab)) == len(vocab) and isinstance(figures, dict)
        ):
            raise ValueError("its vocabulary or its figures are malformed")
        config = configuration.from_data(text["config"], str(path))
        return Header(config, vocab, figures, tensors, str(text["data_sha256"]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise CharlmError(
            f"{path} is damaged: its header does not make sense ({one_line(str(error))})"
        ) from None


def _raw_header(file: io.BufferedReader, path: Path) -> bytes:
    """The header's JSON, once its length is known to be right for a file of charlm's."""
    start = file.read(9)
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{":
        raise CharlmError(
            f"{path} is a pickle or a torch.save file, which can run code when it is read; "
            "charlm reads safetensors model files only"
        )
    if start[8:] != b"{":
        raise CharlmError(
            f"{path} is no model file, or it is damaged: it does not begin as a safetensors file"
        )
    size, found = int.from_bytes(start[:8], "little"), os.fstat(file.fileno()).st_size
    if size > _MAX_HEADER:
        raise _damaged(path, f"its header would take {size:,} bytes, and no more than {_MAX_HEADER:,} may be")
    if 8 + size > found:
        raise _damaged(path, f"it is cut short: it has {found:,} bytes, and its header ends at {8 + size:,}")
    file.seek(8)
    return file.read(size)


def _shapes(entries: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes, in the order of their bytes; `ValueError` where these leave gaps or overlap."""
    shapes, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, stop) = entry["shape"], entry["data_offsets"]
        numbers = [begin, stop, *shape]
        if entry["dtype"] != "F32" or len(numbers) > 4 or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{one_line(name)} is no matrix or vector of float32")
        if begin != end or stop - begin != 4 * prod(shape):
            raise ValueError(
                f"the bytes of {one_line(name)} are not as many as its shape needs, or misplaced"
            )
        shapes[name], end = tuple(shape), stop
    return shapes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, no key of which may stand twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in it")
    return found


def _damaged(path: Path, why: str) -> CharlmError:
    return CharlmError(f"{path} is damaged: {why}; restore it or train again")


def _other_format(path: Path, version: int) -> CharlmError:
    if version > FORMAT:
        why = f"newer than this charlm reads ({FORMAT}); upgrade charlm"
    else:
        why = "of a charlm before its first release, whose files had no checksums; train again"
    return CharlmError(f"{path} has format {version}, {why}")
