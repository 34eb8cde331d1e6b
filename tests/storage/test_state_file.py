import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

from charlm.errors import CharlmError
from charlm.storage.state_file import load_state, save_state
from corruption import repack, seal_state, unseal_state

STATE = {"a": torch.arange(3.0), "b": [1, "two", None], "c": (torch.ones(2, 2, dtype=torch.bool), 2.5)}


@pytest.fixture
def path(tmp_path):
    save_state(tmp_path / "state.pt", STATE)
    return tmp_path / "state.pt"


def test_what_was_saved_is_read_by_torch_too(path):
    for state in (load_state(path), torch.load(path, weights_only=True)):
        assert state["b"] == STATE["b"] and state["c"][1] == 2.5
        assert torch.equal(state["a"], STATE["a"]) and torch.equal(state["c"][0], STATE["c"][0])


def test_the_same_state_is_the_same_bytes(path):
    first = path.read_bytes()
    save_state(path, STATE)
    assert path.read_bytes() == first


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


class Large:
    """Which weights_only lets pass: it would take a terabyte."""

    def __reduce__(self):
        return bytearray, (10**12,)


def saved(thing):
    out = io.BytesIO()
    torch.save(thing, out)
    return out.getvalue()


def compressed(archive):
    """The archive with a tensor's numbers compressed: a few bytes that would become many."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def pickled(program):
    """An archive whose pickle is `program`."""
    return repack(saved({}), lambda parts: parts.update({"archive/data.pkl": program}))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:100], "cut short"),
        (lambda data: b"", "cut short"),
        (lambda data: data + b"x", "the seal at its end is missing"),
        (lambda data: data[:50] + b"x" + data[50:], "damaged.*bytes, not"),
        (lambda data: data[:50] + b"x" + data[51:], "checksum does not match"),
        (lambda data: saved({"a": 1}), "the seal at its end is missing"),
        (lambda data: re.sub(rb"charlm state 1, .*", b"charlm state 2, all is new", data), "upgrade charlm"),
        (lambda data: seal_state(saved({"a": Hostile()})), "asks for '(posix|nt) mkdir'"),
        (lambda data: seal_state(saved({"a": Large()})), "asks for '(__builtin__|builtins) bytearray'"),
        (lambda data: seal_state(pickle.dumps(Hostile())), "damaged.*zip"),
        (lambda data: seal_state(pickled(pickle.dumps(Hostile(), 4))), "opcode STACK_GLOBAL"),
        (lambda data: seal_state(pickled(b"(i" + b"posix\nmkdir\n.")), "opcode INST"),
        (lambda data: seal_state(pickled(b"\x80\x02" + b"(" * 2**23 + b".")), "more than 8,388,608"),
        (lambda data: seal_state(pickled(b"\x80\x02" + b"]" * 10**5 + b"a" * 99_999 + b".")), "not a state"),
        (lambda data: seal_state(pickled(b"\x80\x02I" + b"9" * 10**5 + b"\n.")), "damaged"),
        (lambda data: seal_state(compressed(unseal_state(data)[0])), "compressed"),
        (lambda data: seal_state(saved([1, 2])), "not a state"),
    ],
)  # fmt: skip
def test_what_is_no_whole_state_is_refused(path, monkeypatch, content, part):
    monkeypatch.chdir(path.parent)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(CharlmError, match=part) as caught:
        load_state(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("harmed").exists()


def test_parts_that_overlap_are_refused(path):
    """Of an archive whose parts are one stretch of bytes, told to be many."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data/0", bytes(10**4))
        (entry,) = file.infolist()
        for k in range(1, 99):
            twin = zipfile.ZipInfo(f"archive/data/{k}")
            twin.file_size, twin.compress_size, twin.CRC = entry.file_size, entry.compress_size, entry.CRC
            twin.header_offset = entry.header_offset
            file.filelist.append(twin)
            file.NameToInfo[twin.filename] = twin
    path.write_bytes(seal_state(out.getvalue()))
    with pytest.raises(CharlmError, match="overlap"):
        load_state(path)
