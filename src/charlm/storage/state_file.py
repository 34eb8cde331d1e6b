"""The state file: everything that a training resumes from, in the container of `header`.

The state is a tree of dicts, lists, tuples, tensors and plain values. A tensor's name is its path in the tree
(``optimizer.state.0.exp_avg``). The rest is JSON, exact to the bit, with objects of one key for the values
that JSON lacks: ``{"$tensor": name}``, ``{"$tuple": [...]}``, ``{"$float": "inf"}`` for a float that is not
finite, and ``{"$pairs": [[key, value], ...]}`` for a dict whose keys are not all strings.
"""

from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from charlm.storage.header import (
    checking,
    opened,
    read_container,
    read_tensors,
    save_container,
    write_container,
)

_FLOATS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, atomically; the bytes depend on `state` alone."""
    tensors: dict[str, Tensor] = {}
    save_container(path, "state", {"state": _encode(state, "", tensors)}, tensors)


def load_state(path: Path) -> dict[str, Any]:
    """Read the state in the file at `path`, its tensors on the CPU.

    Raises `CharlmError` for a file that cannot be read, is damaged, has another format or is not a state.
    """
    with opened(path) as file:
        return read_state(file, path)


def write_state(file: BinaryIO, state: dict[str, Any]) -> None:
    """Write `state` to `file`, as a state file."""
    tensors: dict[str, Tensor] = {}
    write_container(file, "state", {"state": _encode(state, "", tensors)}, tensors)


def read_state(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Read the state in `file`, which errors call `path`; raises as `load_state` does."""
    container = read_container(file, path, "state")
    with checking(path):
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            for name, (dtype, shape) in container.tensors.items()
        }
        left = dict(tensors)
        state = _decode(container.content["state"], left)
        if left or not isinstance(state, dict):
            raise ValueError("it is not a state, or has tensors that are not part of it")
    read_tensors(file, path, container, tensors)
    return state


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value`, which is at `path`, as JSON, and put its tensors into `tensors`."""

    def below(key: Any, child: Any) -> Any:
        return _encode(child, f"{path}.{key}" if path else str(key), tensors)

    if isinstance(value, Tensor):
        assert path not in tensors, f"two tensors named {path}"
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: below(key, child) for key, child in value.items()}
        return {"$pairs": [[key, below(key, child)] for key, child in value.items()]}
    if isinstance(value, list | tuple):
        items = [below(index, child) for index, child in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, float) and repr(value) in _FLOATS:
        return {"$float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state cannot hold {type(value).__name__}, at {path}")


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value that `_encode` was given, and remove its tensors from `tensors`."""
    if isinstance(tree, list):
        return [_decode(child, tensors) for child in tree]
    if not isinstance(tree, dict):
        return tree
    tag: str = next(iter(tree), "")
    if not tag.startswith("$"):
        return {key: _decode(child, tensors) for key, child in tree.items()}
    if len(tree) > 1:
        raise ValueError("a key with $ is not the only one")
    content = tree[tag]
    if tag == "$tensor":
        return tensors.pop(content)
    if tag == "$float":
        return _FLOATS[content]
    if tag == "$tuple":
        return tuple(_decode(child, tensors) for child in content)
    if tag == "$pairs":
        return {key: _decode(child, tensors) for key, child in content}
    raise ValueError("unknown key with $")
