"""The state file: what training goes on from, as a file of torch.save's with a seal at its end.

`torch.load` reads it as any other: the seal is the comment that a ZIP archive may end with. It names the
format, the size of what stands before it, and the SHA-256 of that. Here it is looked at before torch sees a
byte; then the archive must be as torch.save writes it, with nothing compressed, and its pickle must name
nothing but what holds tensors and plain values. (torch's own ``weights_only`` lets a file of a few bytes ask
for a bytearray of any size.)
"""

import hashlib
import io
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from charlm.errors import CharlmError, one_line
from charlm.files import sha256, write_atomically
from charlm.interop.torchfile import TENSOR_NAMES, check_parts

FORMAT = 1

_SEAL = re.compile(rb"charlm state (\d{1,9}), (\d{1,18}) bytes, sha256 ([0-9a-f]{64})\n\Z")
_NEWER = re.compile(rb"charlm state (\d{1,9})\b[^\n]*\n\Z")
_MAX_SEAL = 200  # bytes
_MAX_PICKLE = 2**23  # bytes: 1,000 layers take 4 MB; the tensors' numbers stand outside


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, tensors and plain values, to `path`, atomically; the bytes depend on `state` alone."""
    buffer = io.BytesIO()  # torch.save, writing to a full disk, would not say that it is full
    torch.save(state, buffer)
    # The last two bytes are the length of the archive's comment.
    data = buffer.getbuffer()[:-2]
    seal = f"charlm state {FORMAT}, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}\n".encode()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(data)
            file.write(len(seal).to_bytes(2, "little") + seal)

    write_atomically(path, write)


def load_state(path: Path) -> dict[str, Any]:
    """The state in the file at `path`, its tensors on the CPU.

    Raises `CharlmError` for what is damaged, of a newer format, or asks for more than a state may, and
    `FileNotFoundError`.
    """
    try:
        with path.open("rb") as file:
            _check_seal(file, path)
            file.seek(0)
            _check_archive(file, path)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (CharlmError, FileNotFoundError):
        raise
    except OSError as error:
        raise CharlmError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # what is no pickle makes pickletools, zipfile and torch raise many kinds
        raise _damaged(path, one_line(str(error)) or type(error).__name__) from None
    if not isinstance(state, dict):
        raise CharlmError(f"{path} is not a state that charlm wrote")
    return state


def _check_seal(file: io.BufferedReader, path: Path) -> None:
    """Refuse what is not, byte for byte, what `save_state` wrote."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _MAX_SEAL, 0))
    end = file.read()
    newer = _NEWER.search(end)
    if newer and int(newer[1]) > FORMAT:
        raise CharlmError(
            f"{path} has format {int(newer[1])}, newer than this charlm reads ({FORMAT}); upgrade charlm"
        )
    seal = _SEAL.search(end)
    if not seal:
        raise _damaged(path, "it is cut short, or charlm did not write it: the seal at its end is missing")
    if int(seal[1]) != FORMAT:
        raise CharlmError(f"{path} has format {int(seal[1])}, which this charlm does not read ({FORMAT})")
    sealed, length = int(seal[2]), len(seal[0])
    if sealed + 2 + length != size:
        raise _damaged(path, f"it has {size:,} bytes, not {sealed + 2 + length:,}")
    file.seek(0)
    if sha256(file, sealed) != seal[3].decode() or file.read(2) != length.to_bytes(2, "little"):
        raise _damaged(path, "its checksum does not match")


def _check_archive(file: io.BufferedReader, path: Path) -> None:
    """Refuse an archive that would take more memory than it has bytes, or that names more than it needs."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        try:
            check_parts(archive, size)
        except ValueError as error:
            raise _refused(path, str(error)) from None
        entries = archive.infolist()
        names = [entry.filename.partition("/")[2] for entry in entries]
        if len(set(names)) < len(names):
            raise _refused(path, "its parts overlap")
        if "data.pkl" not in names:
            raise _refused(path, "it has no data.pkl")
        program = entries[names.index("data.pkl")]
        if program.file_size > _MAX_PICKLE:
            raise _refused(path, f"its data.pkl has {program.file_size:,} bytes, more than {_MAX_PICKLE:,}")
        for opcode, argument, _ in pickletools.genops(archive.read(program)):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise _refused(path, f"its data.pkl has the opcode {opcode.name}")
            if opcode.name == "GLOBAL" and not re.fullmatch(TENSOR_NAMES, str(argument)):
                raise _refused(path, f"it asks for {one_line(str(argument))!r}")


def _damaged(path: Path, why: str) -> CharlmError:
    return CharlmError(f"{path} is damaged and cannot be resumed from: {why}")


def _refused(path: Path, why: str) -> CharlmError:
    return CharlmError(f"{path} is refused, as no state that charlm wrote: {why}")
