"""Files that other programs wrote with ``torch.save``, read without running what they might hold.

``torch.load(weights_only=True)`` alone builds the objects. Every pickle is first spelled anew, opcode by
opcode, without being carried out: in protocol 2, as torch reads no newer ones, such as Flair's; and with no
names but those that a state dict needs: with the others on torch's list a file of a few bytes could take any
memory.
"""

import io
import os
import pickle
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from charlm.errors import CharlmError, one_line


class FlairDictionary:
    """What stands for `flair.data.Dictionary` in a pickle: attributes and nothing else."""

    def __init__(self) -> None:
        self.idx2item: list[bytes] = []
        self.item2idx: dict[bytes, int] = {}
        self.add_unk, self.multi_label, self.span_labels = True, False, False


FlairDictionary.__module__, FlairDictionary.__qualname__ = "flair.data", "Dictionary"


def _defaultdict(*_: Any) -> dict[Any, Any]:
    """What stands for `collections.defaultdict`, which a dictionary that Flair has used holds."""
    return {}


def _latin1(text: str, _: str) -> bytes:
    """What stands for `_codecs.encode`, which makes the bytes of protocol 2; other codecs could make many."""
    return text.encode("latin-1")


_MAX_OPCODES = 2**20  # thirty a tensor, four a character of a vocabulary
_MAX_SPELLED = 2**26  # bytes of a pickle that is spelled in protocol 2

_STAND_INS: list[Any] = [
    FlairDictionary,
    (_defaultdict, "collections.defaultdict"),
    (_latin1, "charlm.latin1"),
    int,
]

TENSOR_NAMES = (  # what a pickle names for tensors and plain values: "module name"
    r"torch (\w+Storage|Size|device|u?int\d+|b?float\d+|bool)"
    r"|torch\._utils _rebuild_(tensor(_v2)?|parameter(_with_state)?)"
    r"|collections (OrderedDict|Counter|defaultdict)"
)
_NAMES = re.compile(
    TENSOR_NAMES + r"|flair\.data Dictionary|_codecs encode|(__builtin__|builtins) (int|long|set)"
)


def read_torch_file(path: Path) -> Any:
    """What ``torch.save`` put into the file at `path`: tensors, on the CPU, and plain values.

    Raises `CharlmError` for what is no such file, is damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(0)
            if start not in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6))):
                raise CharlmError(f"{path} was not written by torch.save: it begins with {start!r}")
            readable = _readable_zip(file) if start == b"PK" else _readable_sequence(file)
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(readable, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CharlmError(f"cannot read {path}: {error.strerror or error}") from None
    except (CharlmError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes torch, pickletools and zipfile raise many kinds
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise CharlmError(
                f"{path} asks for {one_line(wanted[1])}, which is no part of a state dict; it was not read, "
                "as charlm runs no code that files name: if it is yours, save the model's state_dict() alone"
            ) from None
        why = one_line(str(error)) or type(error).__name__
        raise CharlmError(f"{path} is damaged or holds no model: {why}") from None


def check_parts(archive: zipfile.ZipFile, size: int) -> None:
    """Raise `ValueError` for an archive of `size` bytes that would take more memory than that."""
    entries = archive.infolist()
    if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
        raise ValueError("parts of it are compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its parts overlap")


def _readable_zip(file: BinaryIO) -> io.BytesIO:
    """A ``torch.save`` archive with its pickle spelled anew."""
    with zipfile.ZipFile(file) as archive:
        check_parts(archive, os.fstat(file.fileno()).st_size)
        names = [name for name in archive.namelist() if Path(name).name == "data.pkl"]
        if len(names) != 1:
            raise zipfile.BadZipFile(f"it holds {len(names)} files data.pkl where torch.save puts one")
        text = archive.read(names[0])
        copy = io.BytesIO()
        with zipfile.ZipFile(copy, "w") as other:
            for name in archive.namelist():
                same = name != names[0]
                other.writestr(name, archive.read(name) if same else in_protocol_2(io.BytesIO(text)))
    copy.seek(0)
    return copy


def _readable_sequence(file: BinaryIO) -> io.BytesIO:
    """The same of the older format: five pickles one after the other, then the tensors' bytes."""
    whole = io.BytesIO(file.read())  # which gives no more than it has, whatever length a pickle claims
    return io.BytesIO(b"".join(in_protocol_2(whole) for _ in range(5)) + whole.read())


_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_PUT = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}
_GET = {"BINGET", "LONG_BINGET"}


def in_protocol_2(file: BinaryIO) -> bytes:
    """The pickle that begins where `file` stands, its opcodes spelled in protocol 2; nothing is carried out.

    Opcodes that have no such spelling stay: whoever reads the result refuses them. Raises
    `pickle.UnpicklingError` for the name of a class or function that no state dict needs.
    """
    start = file.tell()
    operations: list[tuple[Any, Any, int | None]] = []
    for operation in pickletools.genops(file):
        operations.append(operation)
        if len(operations) > _MAX_OPCODES:
            raise ValueError(f"its pickle has more than {_MAX_OPCODES:,} opcodes")
    positions = [at for _, _, at in operations if at is not None] + [file.tell()]
    file.seek(start)
    data = file.read(positions[-1] - start)
    spelled: list[bytes] = []
    texts: list[str | None] = []  # for each of them, the text that it puts on the stack, if it does
    memo: dict[int, str | None] = {}
    size = 0
    for (opcode, argument, _), at, end in zip(operations, positions, positions[1:], strict=False):
        name, text = opcode.name, None
        if name in ("PROTO", "FRAME"):
            continue
        if name in _PUT:
            index = len(memo) if name == "MEMOIZE" else argument
            memo[index] = texts[-1] if texts else None
            if memo[index] is not None:
                continue  # a text is spelled out wherever it is got, so that STACK_GLOBAL finds it
            spelling = pickle.LONG_BINPUT + struct.pack("<I", index)
        elif name in _TEXT or (name in _GET and memo.get(argument) is not None):
            text = argument if name in _TEXT else memo[argument]
            spelling = _text(str(text))
        elif name in _BYTES:
            latin = _text(argument.decode("latin-1")) + _text("latin-1")
            spelling = _global("_codecs encode") + latin + pickle.TUPLE2 + pickle.REDUCE
        elif name == "STACK_GLOBAL" and len(texts) > 1 and None not in texts[-2:]:
            spelling = _global(f"{texts[-2]} {texts[-1]}")
            del spelled[-2:], texts[-2:]
        elif name == "GLOBAL":
            spelling = _global(argument)
        else:
            spelling = data[at - start : end - start]
        size += len(spelling)
        if size > _MAX_SPELLED:  # a text may be got from the memo again and again
            raise ValueError(f"its pickle takes more than {_MAX_SPELLED:,} bytes")
        spelled.append(spelling)
        texts.append(text)
    return pickle.PROTO + b"\x02" + b"".join(spelled)


def _global(name: str) -> bytes:
    """The opcode that gets the class or function `name`, "module name", where a state dict may need it."""
    if not _NAMES.fullmatch(name):
        raise pickle.UnpicklingError("GLOBAL " + name.replace(" ", "."))
    module, name = ("charlm latin1" if name == "_codecs encode" else name).split(" ")
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
