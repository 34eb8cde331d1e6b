"""What a model file says of itself, read without its weights and without torch: at once, whatever its size.

A safetensors file is the length of its header in eight bytes, the header in JSON, and the tensors' bytes. The
header's ``charlm`` entry, JSON in a string, has the format version, the configuration, the vocabulary and
figures.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, ConfigError

FORMAT = 1
_LARGEST = 100_000_000  # bytes of a header, as the format has it


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


def read_header(path: Path) -> Header:
    """What the file at `path` holds, without its weights.

    Raises `CharlmError` for what is no model file of charlm's, is damaged, or is of a newer format.
    """
    metadata, tensors = _read(path)
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


def _read(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The metadata and the tensors' shapes of a safetensors file that has all its bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
            _refuse_other_files(path, start)
            length, size = int.from_bytes(start[:8], "little"), os.fstat(file.fileno()).st_size
            if length > min(size - 8, _LARGEST):
                raise ValueError("the header is longer than the file")
            header = json.loads(start[8:] + file.read(length - 1))
        metadata = header.pop("__metadata__", {})
        tensors = {name: tuple(header[name]["shape"]) for name in sorted(header)}
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if (needed := 8 + length + max(ends, default=0)) != size:
            raise ValueError(f"it has {size} bytes, and its header tells of {needed}")
    except OSError as error:
        raise CharlmError(f"cannot read the model {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CharlmError(f"{path} is damaged or cut short: {error}; restore it or train again") from None
    return metadata, tensors


def _refuse_other_files(path: Path, start: bytes) -> None:
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{":
        raise CharlmError(
            f"{path} is a pickle or a torch.save file, which can run code when it is read; "
            "charlm reads safetensors model files only"
        )
    if start[8:] != b"{":
        raise CharlmError(
            f"{path} is no model file, or it is damaged: it does not begin as a safetensors file"
        )
