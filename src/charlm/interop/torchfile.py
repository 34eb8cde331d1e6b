"""Files that other programs wrote with ``torch.save``, read without running code.

A pickle is a program for a stack machine. `read_pickle` carries out the opcodes that build texts, numbers,
lists, dictionaries and tensors, and refuses all others. It never imports what a file names: the classes and
functions that occur in state dicts have stand-ins in this module, every other name is refused. Keys of
dictionaries are texts, bytes and integers only: the hash of nested tuples can overflow the stack, and that of
tuples that share their parts can take forever. The memory taken is bounded by the size of the file.
"""

import io
import math
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from charlm.errors import CharlmError, one_line

_MAX_OPCODES = 2**20  # of a pickle: a tensor takes 30, a character of a vocabulary 4
_MAX_COPIED = 2**26  # characters and items that calls copy; a pickle may pass the same text many times
_MAX_DIMENSIONS = 8
_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of the older format


class FlairDictionary:
    """Stands for `flair.data.Dictionary`, both in the pickles that are read and in those that are written."""

    def __init__(self, items: list[bytes]) -> None:
        self.idx2item, self.item2idx = items, {item: number for number, item in enumerate(items)}
        self.add_unk, self.multi_label, self.span_labels = True, False, False


FlairDictionary.__module__, FlairDictionary.__qualname__ = "flair.data", "Dictionary"


def read_torch_file(path: Path) -> Any:
    """Read the tensors, on the CPU, and the plain values that ``torch.save`` wrote to the file at `path`.

    Raises `CharlmError` for a file that is damaged, is of another kind, or contains anything else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(0)
            if start == b"PK":
                return _read_zip(file)
            if start in [bytes([0x80, protocol]) for protocol in range(2, 6)]:
                return _read_sequence(file)
            raise CharlmError(f"{path} was not written by torch.save: it begins with {start!r}")
    except OSError as error:
        raise CharlmError(f"cannot read {path}: {error.strerror or error}") from None
    except (CharlmError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CharlmError(
            f"{path} asks for {one_line(str(error))}, which is not part of a state dict; the file was not "
            "read, because charlm runs no code that a file names: save the model's state_dict() alone"
        ) from None
    except Exception as error:  # a damaged file makes torch, pickletools and zipfile raise many kinds
        why = one_line(str(error)) or type(error).__name__
        raise CharlmError(f"{path} is damaged or contains no model: {why}") from None


def _read_zip(file: BinaryIO) -> Any:
    """Read an archive: a pickle ``data.pkl`` and one file for each storage, all uncompressed."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
            raise ValueError("parts of it are compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts overlap")
        names = archive.namelist()
        folders = [name.removesuffix("data.pkl") for name in names if Path(name).name == "data.pkl"]
        if len(folders) != 1:
            raise ValueError(f"it has {len(folders)} files data.pkl, not one")
        (folder,) = folders
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        builder = Builder(size)
        data = read_pickle(io.BytesIO(archive.read(f"{folder}data.pkl")), builder)
        for key, storage in builder.storages.items():
            _fill(storage, archive.read(f"{folder}data/{key}"))
    return data


def _read_sequence(file: BinaryIO) -> Any:
    """Read the older format: five pickles one after the other, then the storages."""
    whole = io.BytesIO(file.read())  # returns no more than it has, whatever length a pickle claims
    builder = Builder(len(whole.getbuffer()))
    magic, _, _, data, keys = (read_pickle(whole, builder) for _ in range(5))
    if magic != _MAGIC:
        raise ValueError("it does not begin with the number that torch.save writes")
    if not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(builder.storages):
        raise ValueError("its list of storages does not match its tensors")
    for key in keys:
        storage = builder.storages[key]
        whole.read(8)  # the storage's length, known from the pickle
        _fill(storage, whole.read(storage.nbytes))
    return data


class Builder:
    """Makes the tensors of one file, and calls the stand-ins, within limits that follow from its size."""

    def __init__(self, size: int):
        self.storages: dict[str, Tensor] = {}  # vectors, which are filled once their bytes are known
        self.bytes_left = size
        self.copied = 0

    def find_storage(self, reference: Any) -> Tensor:
        """Return the vector that a persistent id refers to; `ValueError` for an invalid id."""
        numbered = type(reference) is tuple and len(reference) in (5, 6) and type(reference[4]) is int
        if not (numbered and isinstance(reference[1], torch.dtype) and isinstance(reference[2], str)):
            raise ValueError("its pickle has an invalid persistent id")
        _, dtype, key, _, length, *view = reference
        if key not in self.storages:
            self.bytes_left -= length * dtype.itemsize
            if length < 0 or self.bytes_left < 0:
                raise ValueError("its tensors take more bytes than it has")
            self.storages[key] = torch.empty(length, dtype=dtype)
        storage = self.storages[key]
        if storage.dtype != dtype:
            raise ValueError("a storage has two types")
        if view and view[0] is not None:  # in files from before 2018
            _, start, length = view[0]
            storage = storage.narrow(0, start, length)
        return storage

    def call(self, function: Any, arguments: Any) -> Any:
        """Return the result of a stand-in; `ValueError` where calls copy too much."""
        _expect(arguments, tuple)
        kinds = (str, bytes, list, tuple, dict)
        self.copied += sum(len(each) for each in (arguments, *arguments) if isinstance(each, kinds))
        if self.copied > _MAX_COPIED:
            raise ValueError(f"its pickle copies more than {_MAX_COPIED:,} characters and items")
        return _expect(function, FunctionType)(*arguments)


def _fill(storage: Tensor, content: bytes) -> None:
    """Copy `content` to `storage`."""
    if len(content) != storage.nbytes:
        raise ValueError(f"a storage takes {storage.nbytes:,} bytes, and the file has {len(content):,}")
    if content:
        storage.copy_(torch.frombuffer(bytearray(content), dtype=storage.dtype))


_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}


def read_pickle(file: BinaryIO, builder: Builder) -> Any:
    """Build the value of the pickle at the position of `file`, and leave `file` after it.

    Raises `pickle.UnpicklingError` with the name of a class or function that has no stand-in, and many kinds
    of errors for a pickle that is damaged or uses other opcodes.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def pop(count: int | None) -> list[Any]:
        """Remove the last `count` values, or those above the last mark."""
        start = marks.pop() if count is None else len(stack) - count
        values = stack[start:]
        del stack[start:]
        return values

    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if number == _MAX_OPCODES:
            raise ValueError(f"its pickle has more than {_MAX_OPCODES:,} opcodes")
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop(int(name[5:]) if name[5:] else None)))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = pop(1 if name == "APPEND" else None)
            _expect(stack[-1], list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = pop(2 if name == "SETITEM" else None)
            _add(_expect(stack[-1], dict), zip(values[::2], values[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_stand_in(*(argument.split(" ") if argument else pop(2))))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(builder.call(*pop(2)))
        elif name == "BUILD":
            (state,) = pop(1)
            if isinstance(stack[-1], FlairDictionary):  # the attributes of other objects are not needed
                stack[-1].idx2item = _expect(state, dict).get("idx2item")
        elif name == "BINPERSID":
            stack.append(builder.find_storage(stack.pop()))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has the opcode {name}")
    raise AssertionError("genops raises where STOP is missing")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its pickle has a {type(value).__name__} where a {kind.__name__} is needed")
    return value


def _add(target: dict[Any, Any], items: Iterable[Any]) -> dict[Any, Any]:
    """Add `items` to `target`; `ValueError` for a key whose hash might take long or overflow the stack."""
    for key, value in items:
        if not (isinstance(key, (str, bytes)) or (isinstance(key, int) and key.bit_length() < 64)):
            kind = type(key).__name__
            raise ValueError(f"a key of a dictionary is a {kind}, not a text, bytes or an int of 64 bits")
        target[key] = value
    return target


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Stands for `torch._utils._rebuild_tensor`, as a view of `storage` that cannot exceed it."""
    numbers = (offset, *size, *stride)
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise ValueError("the shape of a tensor is not made of whole numbers")
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS or any(rest[2:]):
        raise ValueError("a tensor has an invalid shape or is a conjugate or negative view")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.numel() or last >= storage.numel() > 0:
        raise ValueError("a tensor has more numbers than its storage")
    return torch.as_strided(storage, size, stride, storage.storage_offset() + offset)


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, which makes the bytes of protocol 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("it encodes a text in another encoding than Latin-1")
    return text.encode("latin-1")


_SAME_NAMES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Bool")
_STAND_INS = {
    "flair.data Dictionary": lambda *_: FlairDictionary([]),
    "_codecs encode": _latin1,
    "collections OrderedDict": lambda items=(): _add({}, items),
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda data, *_: data,
    "torch._utils _rebuild_parameter_with_state": lambda data, *_: data,
    **{f"torch {name}Storage": getattr(torch, name.lower()) for name in _SAME_NAMES},
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
}
_IGNORED = re.compile(  # a checkpoint may contain them; charlm does not need their values
    r"torch (Size|device|u?int\d{1,2}|b?float\d{1,2}|bool)|collections (Counter|defaultdict)"
    r"|(__builtin__|builtins) (int|long|set)"
)


def _stand_in(module: Any, name: Any) -> Any:
    """Return the stand-in of a class or function; `pickle.UnpicklingError` if it has none."""
    full = f"{_expect(module, str)} {_expect(name, str)}"
    if full in _STAND_INS:
        return _STAND_INS[full]
    if _IGNORED.fullmatch(full):
        return lambda *_: {}
    raise pickle.UnpicklingError(f"{module}.{name}")
