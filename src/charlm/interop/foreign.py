"""Read the character models of Stanza, Flair and plain PyTorch into their parts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from charlm.errors import CharlmError, one_line
from charlm.interop.torchfile import FlairDictionary, read_torch_file

# The names of the embedding, the recurrent stack and the head.
STANZA_NAMES = ("char_emb", "charlstm.lstm", "decoder")
FLAIR_NAMES = ("encoder", "rnn", "decoder")

_MAX_IDS = 0x200000  # of a vocabulary
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_LISTED = 8  # weights in a message


@dataclass
class Parts:
    """The parts of a model of another program.

    units: the text of each id; None where the file has none.
    weights: by charlm's names; a row of the embedding, if there is one, and of the head for each id.
    settings: configuration values by dotted key. start: the learned initial state, tensors (L, 1, H).
    """

    units: Sequence[str | None]
    weights: dict[str, Tensor]
    settings: dict[str, Any]
    start: tuple[Tensor, ...] = ()


def read_stanza(path: Path) -> Parts:
    """Read a file of Stanza's `CharacterLanguageModel` or a checkpoint of its trainer."""
    data = read_torch_file(path)
    if not (isinstance(data, dict) and "state_dict" in data):
        data = _entry(data, "model", dict, path, "Stanza")
    keys = ("state_dict", "vocab", "args")
    state, vocab, arguments = (_entry(data, key, dict, path, "Stanza") for key in keys)
    units = _entry(vocab, "_id2unit", list, path, "Stanza")
    if not all(isinstance(unit, str) for unit in units):
        raise CharlmError(f"{path} is damaged: its vocabulary is not a list of texts")
    # With recurrent dropout Stanza has a module for each layer: cells.0.weight_ih is weight_ih_l0.
    weights = {
        re.sub(r"^charlstm\.lstm\.cells\.(\d+)\.(\w+)$", r"charlstm.lstm.\2_l\1", name): tensor
        for name, tensor in _weights(state, path).items()
    }
    start = (_take(weights, "charlstm_h_init", path), _take(weights, "charlstm_c_init", path))
    settings = {
        "corpus.lowercase": vocab.get("lower") is True,
        **_settings(data.get("is_forward_lm"), arguments.get("char_dropout")),
    }
    return Parts(units, _renamed(weights, STANZA_NAMES, path), settings, start)


def read_flair(path: Path) -> Parts:
    """Read a file of Flair's `LanguageModel` or a checkpoint of its trainer."""
    data = read_torch_file(path)
    weights = _weights(_entry(data, "state_dict", dict, path, "Flair"), path)
    items = _entry(data, "dictionary", FlairDictionary, path, "Flair").idx2item
    if not (isinstance(items, list) and all(isinstance(item, bytes) for item in items)):
        raise CharlmError(f"{path} is damaged: its dictionary is not a list of bytes")
    if data.get("has_decoder") is False:
        raise CharlmError(f"{path} was saved without its decoder and cannot predict characters")
    if "proj.weight" in weights:  # a linear layer before the head: multiply both
        names = ("decoder.weight", "decoder.bias", "proj.weight", "proj.bias")
        head, bias, inner, inner_bias = (_take(weights, name, path) for name in names)
        fits = head.dim() == inner.dim() == 2 and head.shape[1:] == inner.shape[:1] == inner_bias.shape
        if not (fits and bias.shape == head.shape[:1] and len(head) * inner.shape[1] <= path.stat().st_size):
            raise CharlmError(f"{path} is damaged: its projection does not fit its decoder or the file")
        weights |= {"decoder.weight": head @ inner, "decoder.bias": head @ inner_bias + bias}
    settings = _settings(data.get("is_forward_lm"), data.get("dropout"))
    units = [item.decode(errors="surrogateescape") for item in items]  # bytes that are not UTF-8: surrogates
    return Parts(units, _renamed(weights, FLAIR_NAMES, path), settings)


def _renamed(weights: dict[str, Tensor], names: tuple[str, str, str], path: Path) -> dict[str, Tensor]:
    """Return `weights` by charlm's names; raise `CharlmError` if one is missing or not supported."""
    embedding, stack, head = names
    found = {
        "embedding.weight": _take(weights, f"{embedding}.weight", path),
        "head.weight": _take(weights, f"{head}.weight", path),
        "head.bias": _take(weights, f"{head}.bias", path),
        **_take_stack(weights, f"{stack}."),
    }
    _refuse_rest(weights, path)
    return found


def _settings(forward: Any, dropout: Any) -> dict[str, Any]:
    """Return the settings for these values of a file; an invalid dropout is read as 0."""
    valid = isinstance(dropout, (int, float)) and 0 <= dropout < 1
    return {
        "model.direction": "backward" if forward is False else "forward",
        "model.dropout": float(dropout) if valid else 0.0,
    }


def read_plain(path: Path, vocab: Path) -> Parts:
    """Read a state dict of an `nn.Embedding` (or none), an `nn.RNN`, LSTM or GRU, and an `nn.Linear`.

    Only the endings of the recurrent weights' names matter: ``weight_ih_l0`` and so on.
    """
    weights = _weights(_state_dict(path), path)
    units, settings = read_vocab(vocab)
    prefixes = {found[1] for name in weights if (found := re.fullmatch(r"(.*?)weight_hh_l0", name))}
    if len(prefixes) != 1:
        raise CharlmError(
            f"{path} has {len(prefixes)} recurrent stacks; it must have one nn.RNN, nn.LSTM or nn.GRU, with "
            "weights named ...weight_ih_l0, ...weight_hh_l0 and so on"
        )
    stack = _take_stack(weights, prefixes.pop())
    biases = [name for name, tensor in weights.items() if tensor.shape == (len(units),)]
    head, embedding = _find_ends(weights, stack, biases, len(units), path)
    parts = {"head.weight": weights[head], "head.bias": torch.zeros(len(units)), **stack}
    if embedding:
        parts["embedding.weight"] = weights[embedding]
    if biases:
        parts["head.bias"] = weights.pop(biases[0])
    _refuse_rest({name: weights[name] for name in weights if name not in (head, embedding)}, path)
    return Parts(units, parts, settings)


def _find_ends(
    weights: dict[str, Tensor], stack: dict[str, Tensor], biases: list[str], V: int, path: Path
) -> tuple[str, str | None]:
    """Return the names of the head's and the embedding's matrix, the same name if they are tied.

    Their shapes, (V, H) and (V, E), identify them; if E = H, the bias beside the head or their names do.
    The embedding is None where the stack reads one-hot vectors, E = V.
    """
    E, H = (_take(dict(stack), f"recurrent.weight_{part}_l0", path).shape[-1] for part in ("ih", "hh"))
    heads = [name for name, tensor in weights.items() if tensor.shape == (V, H)]
    tables = [name for name, tensor in weights.items() if tensor.shape == (V, E)]
    if len(heads) > 1:
        beside = [name for name in heads if name.removesuffix("weight") + "bias" in biases]
        heads = beside or [name for name in heads if not re.search("emb|encoder|wte|input", name)]
    if len(heads) == 1:
        tables = [name for name in tables if name != heads[0]]
        if len(tables) == 1:
            return heads[0], tables[0]
        if not tables and E in (V, H):
            return heads[0], None if E == V else heads[0]
    shapes = one_line(", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in weights.items()))
    raise CharlmError(
        f"{path} must have one embedding ({V}, {E}) and one head ({V}, {H}), as the vocabulary has {V} ids; "
        f"besides the recurrent stack it has {shapes or 'nothing'}"
    )


def read_vocab(path: Path) -> tuple[list[str | None], dict[str, Any]]:
    """Read the text of each id, and settings, from the JSON file at `path`.

    The file contains a list or a string of the characters, a dictionary from characters to ids or from ids to
    characters, or what ``charlm export --to torch`` writes. Raises `CharlmError` for anything else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except OSError as error:
        raise CharlmError(f"cannot read the vocabulary {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CharlmError(f"the vocabulary {path} is not JSON: {one_line(str(error))}") from None
    settings: dict[str, Any] = {}
    if isinstance(data, dict) and isinstance(data.get("vocab"), list):  # from charlm export
        settings["model.direction"] = data.get("direction", "forward")
        cleaning, arguments = data.get("cleaning"), data.get("model")
        if isinstance(cleaning, dict):
            settings |= {f"corpus.{key}": value for key, value in cleaning.items()}
        if isinstance(arguments, dict) and "nonlinearity" in arguments:
            settings["model.nonlinearity"] = arguments["nonlinearity"]
        data = data["vocab"]
    if isinstance(data, str):
        data = list(data)
    if isinstance(data, list) and all(isinstance(unit, str) for unit in data):
        return data, settings
    if isinstance(data, dict):
        by_id: dict[Any, Any] = {number: unit for unit, number in data.items() if type(number) is int}
        if not by_id and all(re.fullmatch(r"[0-9]{1,7}", number) for number in data):
            by_id = {int(number): unit for number, unit in data.items() if isinstance(unit, str)}
        if len(by_id) == len(data) and all(0 <= number < _MAX_IDS for number in by_id):
            return [by_id.get(number) for number in range(max(by_id, default=-1) + 1)], settings
    raise CharlmError(
        f"the vocabulary {path} must be a JSON list of characters, or a dictionary from characters to ids or "
        "from ids, 0 and up, to characters"
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _state_dict(path: Path) -> Any:
    """Return the state dict in a file of safetensors or ``torch.save``, also inside a checkpoint."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{":
            return load_file(path)
    except OSError as error:
        raise CharlmError(f"cannot read {path}: {error.strerror}") from None
    except SafetensorError as error:
        raise CharlmError(f"{path} is damaged or cut short: {one_line(str(error))}") from None
    data = read_torch_file(path)
    if isinstance(data, dict):
        inner = [value for value in data.values() if isinstance(value, dict)]
        for each in (data, *inner):
            if any(isinstance(name, str) and name.endswith("weight_hh_l0") for name in each):
                return each
    raise CharlmError(f"{path} has no state dict of an nn.RNN, nn.LSTM or nn.GRU (weight_hh_l0)")


def _weights(data: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of `data` in float32; raise `CharlmError` for an entry of another kind."""
    for name, tensor in data.items():
        if not isinstance(name, str):
            raise CharlmError(f"{path} is damaged: the name of a weight is not a text")
        if not (isinstance(tensor, Tensor) and tensor.dtype in _TYPES and tensor.dim()):
            raise CharlmError(f"{path}: {one_line(name)} is not a tensor of floating-point numbers")
    # Tensors may share their storage.
    if sum(tensor.numel() for tensor in data.values()) > path.stat().st_size:
        raise CharlmError(f"{path} is damaged: its weights have more numbers than the file has bytes")
    return {name: tensor.detach().float() for name, tensor in data.items()}


def _take_stack(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the recurrent stack, whose names start with `prefix`; return it by charlm's names."""
    pattern = re.escape(prefix) + r"((?:weight|bias)_(?:ih|hh)_l\d+)"
    names = {found[1]: name for name in weights if (found := re.fullmatch(pattern, name))}
    return {f"recurrent.{short}": weights.pop(name) for short, name in names.items()}


def _take(weights: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in weights:
        raise CharlmError(f"{path} has no weights {name}: it is damaged or of another kind")
    return weights.pop(name)


def _refuse_rest(weights: dict[str, Tensor], path: Path) -> None:
    """Raise `CharlmError` for weights that are left over: without them it would be another model."""
    if weights:
        names = one_line(", ".join(list(weights)[:_MAX_LISTED]))
        raise CharlmError(
            f"{path} has weights that charlm does not support ({names}): a model is an embedding, a "
            "recurrent stack in one direction, and a linear head"
        )


def _entry(data: Any, key: str, kind: type, path: Path, origin: str) -> Any:
    """Return the entry `key` of `data`; raise `CharlmError` if it is not of class `kind`."""
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        raise CharlmError(f"{path} is not a language model of {origin}: it has no {key}")
    return value
