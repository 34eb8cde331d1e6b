import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from charlm.errors import CharlmError
from charlm.storage.header import FORMAT
from charlm.storage.state_file import load_state, read_state, save_state, write_state
from corruption import same, seal_file, split_file

STATE = {
    "a": torch.arange(3.0),
    "b": [1, "two", None, True, 10**30, -0.0],
    "c": (torch.ones(2, 2, dtype=torch.int64), 2.5, ()),
    "d": {0: {"step": torch.tensor(3.0)}, 1: {}},
    "e": [math.inf, -math.inf, math.nan],
    "f": {"$tensor": "a", "": torch.zeros(1, 5, dtype=torch.uint8)},
    "g": torch.ones(4, 3, dtype=torch.float64).t(),
}


@pytest.fixture
def path(tmp_path):
    save_state(tmp_path / "state.safetensors", STATE)
    return tmp_path / "state.safetensors"


def test_state_is_read_as_it_was_saved(path):
    found = load_state(path)
    assert math.isnan(found["e"].pop()) and same(found, {**STATE, "e": STATE["e"][:2]})
    assert math.copysign(1, found["b"][-1]) == -1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$tensor", "$tuple", "$pairs", "$float", "a"]), inner)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_any_plain_value_is_read_as_it_was_saved(value):
    file = io.BytesIO()
    write_state(file, {"value": value})
    file.seek(0)
    assert same(read_state(file, "the state"), {"value": value})


def test_same_state_gives_same_bytes(path):
    first = path.read_bytes()
    save_state(path, STATE)
    assert path.read_bytes() == first


def test_safetensors_reads_the_tensors(path):
    tensors = load_file(path)
    assert tensors.keys() == {"a", "c.0", "d.0.step", "f.", "g"}
    assert torch.equal(tensors["c.0"], STATE["c"][0]) and torch.equal(tensors["g"], STATE["g"])


def test_value_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"a\.0"):
        save_state(tmp_path / "s", {"a": [object()]})
    assert not list(tmp_path.iterdir())


def rewrite(change):
    """Change the state's JSON under right checksums."""

    def damage(data):
        entries, content, body = split_file(data)
        change(content)
        return seal_file(entries, content, body)

    return damage


def set_state(**changes):
    return rewrite(lambda content: content["state"].update(changes))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:100], "cut short"),
        (lambda data: b"", "safetensors"),
        (lambda data: data + b"x", "bytes, not"),
        (lambda data: data[:90] + b"x" + data[91:], "damaged"),
        (lambda data: data[:-1] + b"x", "checksum of its tensors"),
        (lambda data: b"PK\x03\x04" + data, "torch.save"),
        (rewrite(lambda content: content.update(format=FORMAT + 1)), "upgrade charlm"),
        (rewrite(lambda content: content.update(kind="model")), "model file"),
        (rewrite(lambda content: content.update(state=[])), "damaged"),
        (set_state(a=0), "not part of it"),
        (set_state(b={"$tensor": "a"}), "'a'"),
        (set_state(b={"$tensor": ["a"]}), "damaged"),
        (set_state(b={"$float": "1"}), "damaged"),
        (set_state(b={"$tuple": 1}), "damaged"),
        (set_state(b={"$pairs": [[[], 1]]}), "damaged"),
        (set_state(b={"$code": "import os"}), "damaged"),
        (set_state(b={"$tuple": [], "a": 1}), "damaged"),
        (set_state(b=math.inf), "Infinity"),
        (set_state(b=nested(900)), "damaged"),
    ],
)
def test_invalid_file_is_refused_in_one_line(path, damage, part):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CharlmError, match=part) as caught:
        load_state(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
