"""The container of model and state files, and the header of a model file; nothing here imports torch.

The container is a safetensors file: the length of the header in eight bytes, the header in JSON, and the
bytes of the tensors. The header's ``__metadata__`` has one entry, ``charlm``: JSON in a string, with the
version of the format, the kind of file ("model" or "state"), two checksums and the content. ``data_sha256``
is the checksum of the tensors' bytes. ``header_sha256`` is the checksum of the header with zeros in its own
place.

The header is read and checked before any tensor is allocated. A file whose size is not exactly what its
header says is refused, so that the tensors take no more memory than the file has bytes.
"""

import ctypes
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, ConfigError, one_line
from charlm.files import json_text, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 3  # 1 and 2 were never released
NO_DIGEST = "0" * 64  # in place of a checksum that is not known yet

_MAX_HEADER = 2**24  # bytes: a vocabulary of all of Unicode takes 15.6 MB, escaped
_MAX_DIMENSIONS = 4
_MAX_KINDS = 0x110000  # code points
_UNKNOWN = "\ufffd"  # as in `charlm.text.vocab`, which imports torch
_CHUNK = 2**22  # bytes that are read and hashed at a time
_TYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "I64": ("int64", 8), "U8": ("uint8", 1)}
_CODES = {f"torch.{name}": code for code, (name, _) in _TYPES.items()}


@dataclass(frozen=True)
class Container:
    """The header of a model or state file.

    content: the JSON that was saved.
    tensors: the type of each tensor, as in torch ("float32"), and its shape, in the order of their bytes.
    data_sha256: the checksum of those bytes, in hexadecimal.
    """

    content: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    data_sha256: str


@dataclass(frozen=True)
class Header:
    """The header of a model file.

    unknown_kinds: the number of rare characters for which U+FFFD, one of `vocab`, stands; 0 if it stands for
        itself. Absent from files without such a class.
    figures: what the training had measured when it saved the model: step, epoch, val_loss and so on.
    fingerprint: SHA-256 of the training text; empty where it is not known, as for an imported model.
    tensors: the shape of each tensor, by name.
    """

    config: Config
    vocab: str
    figures: dict[str, Any]
    fingerprint: str
    tensors: dict[str, tuple[int, ...]]
    unknown_kinds: int = 0

    @property
    def parameters(self) -> int:
        """The number of trainable numbers."""
        return sum(prod(shape) for shape in self.tensors.values())


def read_header(path: Path) -> Header:
    """Read and check the header of the model file at `path`; its weights are not read.

    Raises `CharlmError` for a file that is not a charlm model, is damaged, or has another format.
    """
    with opened(path) as file:
        return model_header(read_container(file, path, "model"), path)


def model_header(container: Container, path: Path) -> Header:
    """Return the model header that `container` holds; raises as `read_header` does."""
    with checking(path):
        content = container.content
        vocab, figures, fingerprint = content["vocab"], content["figures"], content["fingerprint"]
        if not (isinstance(vocab, str) and vocab and len(set(vocab)) == len(vocab)):
            raise ValueError("invalid vocabulary")
        kinds = content.get("unknown_kinds", 0)
        if type(kinds) is not int or not 0 <= kinds <= _MAX_KINDS:
            raise ValueError("invalid unknown_kinds")
        if kinds and (_UNKNOWN not in vocab or len(vocab) < 2):
            raise ValueError("invalid vocabulary: it has no U+FFFD, or nothing else")
        if not (isinstance(figures, dict) and isinstance(fingerprint, str)):
            raise ValueError("invalid figures or fingerprint")
        for name, (dtype, _) in container.tensors.items():
            if dtype != "float32":
                raise ValueError(f"the tensor {one_line(name)} is not float32")
        config = configuration.from_data(content["config"], str(path))
        shapes = {name: shape for name, (_, shape) in container.tensors.items()}
        return Header(config, vocab, figures, fingerprint, shapes, kinds)


def is_container(path: Path) -> bool:
    """Return whether the file at `path` begins as a container does, and no text."""
    with opened(path) as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open the file at `path` for reading; raises `CharlmError` where that fails."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise CharlmError(f"cannot read {path}: {error.strerror}") from None
    with file:
        yield file


def save_container(path: Path, kind: str, content: dict[str, Any], tensors: Mapping[str, "Tensor"]) -> None:
    """Write a file of this `kind` to `path`, atomically; the arguments are those of `write_container`."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write_container(file, kind, content, tensors)

    write_atomically(path, write)


def write_container(
    file: BinaryIO, kind: str, content: dict[str, Any], tensors: Mapping[str, "Tensor"]
) -> None:
    """Write a file of this `kind` to `file`; its bytes depend on the arguments alone.

    content: JSON values; floats that are not finite become null.
    tensors: float64, float32, int64 or uint8, not empty.
    """
    # Larger types first, so that each tensor is aligned, as the safetensors library does it.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    on_cpu = [tensors[name].detach().cpu().contiguous() for name in names]
    entries: dict[str, Any] = {"__metadata__": {}}
    digest, end = hashlib.sha256(), 0
    for name, tensor in zip(names, on_cpu, strict=True):
        digest.update(_memory(tensor))
        begin, end = end, end + tensor.nbytes
        code = _CODES[str(tensor.dtype)]
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    about = {"format": FORMAT, "kind": kind, "header_sha256": NO_DIGEST, "data_sha256": digest.hexdigest()}
    entries["__metadata__"]["charlm"] = json_text({**about, **content})
    header = json_text(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = header.replace(NO_DIGEST.encode(), hashlib.sha256(header).hexdigest().encode(), 1)
    file.write(len(header).to_bytes(8, "little") + header)
    for tensor in on_cpu:
        file.write(_memory(tensor))


def read_container(file: BinaryIO, path: Path, kind: str) -> Container:
    """Read and check the header of a file of this `kind`; `file` is then at the tensors' bytes.

    Raises `CharlmError` as `read_header` does.
    """
    raw = _raw_header(file, path)
    with checking(path):
        entries = _parse(raw)
        metadata = entries.pop("__metadata__", {})
        if "charlm" not in metadata:
            raise CharlmError(f"{path} was not written by charlm: its header has no 'charlm' entry")
        content = _parse(metadata["charlm"])
        _check_format(path, content.pop("format"))
        claimed = content.pop("header_sha256").encode()
        before, _, after = raw.partition(claimed)
        if hashlib.sha256(before + NO_DIGEST.encode() + after).hexdigest().encode() != claimed:
            raise damaged(path, "the checksum of its header does not match")
        if (found_kind := content.pop("kind")) != kind:
            raise CharlmError(f"{path} is a {one_line(str(found_kind))} file, not a {kind} file")
        tensors, size = _layouts(entries)
        expected, found = file.tell() + size, _size(file)
        if found != expected:
            cut = "it is cut short: " if found < expected else ""
            raise damaged(path, f"{cut}it has {found:,} bytes, not {expected:,}")
        return Container(content, tensors, str(content.pop("data_sha256")))


def read_tensors(file: BinaryIO, path: Path, container: Container, tensors: Mapping[str, "Tensor"]) -> None:
    """Fill `tensors`, which have the layouts of `container` and are on the CPU, and check their checksum."""
    digest = hashlib.sha256()
    for name in container.tensors:
        view = _memory(tensors[name])
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            digest.update(chunk[: file.readinto(chunk)])  # type: ignore[attr-defined]
    if digest.hexdigest() != container.data_sha256:
        raise damaged(path, "the checksum of its tensors does not match")


@contextmanager
def checking(path: Path) -> Iterator[None]:
    """Raise `CharlmError` for what an invalid header makes its readers raise."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise damaged(path, f"its header is invalid ({one_line(str(error))})") from None
    except ConfigError as error:
        raise damaged(path, f"its configuration is invalid ({one_line(str(error))})") from None


def damaged(path: Path, why: str) -> CharlmError:
    """Return the error for a file that is not as it was saved."""
    return CharlmError(f"{path} is damaged: {why}; restore it or train again")


def _raw_header(file: BinaryIO, path: Path) -> bytes:
    """Read the JSON of the header, once its length is known to be possible."""
    start = file.read(9)
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{":
        raise CharlmError(
            f"{path} is a torch.save file, which can run code when it is read; charlm reads safetensors "
            "files, and other programs' models with charlm import"
        )
    if start[8:] != b"{":
        raise CharlmError(f"{path} is not a safetensors file, or its beginning is damaged")
    size, found = int.from_bytes(start[:8], "little"), _size(file)
    if size > _MAX_HEADER:
        raise damaged(path, f"its header would take {size:,} bytes; the limit is {_MAX_HEADER:,}")
    if 8 + size > found:
        raise damaged(path, f"it is cut short: it has {found:,} bytes, and its header ends at {8 + size:,}")
    file.seek(8)
    return file.read(size)


def _layouts(entries: dict[str, Any]) -> tuple[dict[str, tuple[str, tuple[int, ...]]], int]:
    """Return the tensors' types and shapes and the number of their bytes; refuse gaps and overlaps."""
    layouts, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, stop) = entry["shape"], entry["data_offsets"]
        if len(shape) > _MAX_DIMENSIONS or any(type(n) is not int or n < 1 for n in (stop, *shape)):
            raise ValueError(f"the shape or the place of {one_line(name)} is invalid")
        dtype, itemsize = _TYPES[entry["dtype"]]
        if type(begin) is not int or begin != end or stop - begin != itemsize * prod(shape):
            raise ValueError(f"the bytes of {one_line(name)} do not fit its shape, or are misplaced")
        layouts[name], end = (dtype, tuple(shape)), stop
    return layouts, end


def _parse(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: no key twice, no NaN or Infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _check_format(path: Path, version: Any) -> None:
    if type(version) is not int or version < 1:
        raise ValueError("invalid format")
    if version > FORMAT:
        raise CharlmError(f"{path} has format {version}, newer than this charlm reads; upgrade charlm")
    if version < FORMAT:
        raise CharlmError(f"{path} has format {version}, of a charlm before its first release; train again")


def _size(file: BinaryIO) -> int:
    """Return the size of `file`, whose position stays."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size


def _memory(tensor: "Tensor") -> memoryview:
    """Return the bytes of `tensor`, contiguous and on the CPU; they are valid as long as the tensor is."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
