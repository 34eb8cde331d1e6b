"""What a model file says of itself, read without its weights and without torch: at once, whatever its size.

A safetensors file is the length of its header in eight bytes, the header in JSON, and the tensors' bytes. The
header's ``charlm`` entry, JSON in a string, has the format version, checksums, the configuration, the
vocabulary and figures. ``header_sha256`` is of the header's bytes with zeros in its own place,
``data_sha256`` of the tensors' bytes: the one is checked here, the other where these are loaded.
"""

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

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, ConfigError, one_line

FORMAT = 2  # 1 had no checksums, and was never released
NO_DIGEST = "0" * 64  # stands for a checksum that is not known yet

_MAX_HEADER = 2**24  # bytes: all of Unicode as a vocabulary takes 15.6 MB, escaped


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
    data_sha256: str = NO_DIGEST


def read_header(path: Path) -> Header:
    """What the file at `path` holds, without its weights, which are not looked at.

    Raises `CharlmError` for what is no model file of charlm's, is damaged, or is of a newer format.
    """
    with opened(path) as file:
        return read_opened(file, path)


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The model file at `path`, open for reading."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise CharlmError(f"cannot read the model {path}: {error.strerror}") from None
    with file:
        yield file


def read_opened(file: io.BufferedReader, path: Path) -> Header:
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
        if hashlib.sha256(before + NO_DIGEST.encode() + after).hexdigest().encode() != claimed:
            raise damaged(path, "the checksum of its header does not match")
        tensors, vocab, figures = _shapes(entries), text["vocab"], text["figures"]
        expected = file.tell() + 4 * sum(map(prod, tensors.values()))
        found = os.fstat(file.fileno()).st_size
        if found != expected:
            cut = "it is cut short: " if found < expected else ""
            raise damaged(path, f"{cut}it has {found:,} bytes, not {expected:,}")
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
        raise damaged(path, f"its header would take {size:,} bytes, and no more than {_MAX_HEADER:,} may be")
    if 8 + size > found:
        raise damaged(path, f"it is cut short: it has {found:,} bytes, and its header ends at {8 + size:,}")
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


def damaged(path: Path, why: str) -> CharlmError:
    """What to raise for a file that is not what was saved."""
    return CharlmError(f"{path} is damaged: {why}; restore it or train again")


def _other_format(path: Path, version: int) -> CharlmError:
    if version > FORMAT:
        why = f"newer than this charlm reads ({FORMAT}); upgrade charlm"
    else:
        why = "of a charlm before its first release, whose files had no checksums; train again"
    return CharlmError(f"{path} has format {version}, {why}")
