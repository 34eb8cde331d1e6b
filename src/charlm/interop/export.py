"""Export of a model to the files of other programs: ONNX, Stanza, Flair and plain PyTorch.

The weights are copied unchanged; the formats differ in names, and in the ids that they reserve. The unknown
that a model has learnt becomes that of Stanza and Flair. Other reserved ids get embeddings of zeros, and
logits so low that the probabilities of the characters stay the same.
"""

import io
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from charlm.config import Config
from charlm.errors import CharlmError
from charlm.files import write_atomically
from charlm.interop.foreign import FLAIR_NAMES, STANZA_NAMES
from charlm.interop.onnx import checked_onnx
from charlm.interop.torchfile import FlairDictionary
from charlm.nn.cells import cell_of
from charlm.nn.model import CharLM
from charlm.storage.model_file import Loaded
from charlm.text.vocab import Vocab

ENDINGS = {"onnx": ".onnx", "stanza": "-stanza.pt", "flair": "-flair.pt", "torch": ".pt"}
STANZA_UNITS = ("<PAD>", "<UNK>", "<EMPTY>", "<ROOT>")  # Stanza's ids 0 to 3
FLAIR_UNITS = ("<unk>",)  # Flair's id 0
_MODULE = Path(__file__).with_name("char_rnn.py")  # loads the files of ``--to torch``
_RESERVED_LOGIT = -100.0  # gives a reserved id a probability below e⁻⁵⁰ in practice


def check_format(to: str, config: Config) -> None:
    """Raise `CharlmError` for a model that the format `to` cannot represent."""
    model, cell = config.model, cell_of(config.model)
    if model.direction == "both":
        raise CharlmError(
            f"--to {to} needs a model that predicts the next character; this one fills in characters "
            "(model.direction: both): train one with model.direction: forward or backward"
        )
    formats = ["onnx"] * bool(cell.onnx) + ["torch"] * bool(cell.builtin)
    formats += ["flair"] * (model.cell in ("lstm", "gru") and bool(cell.builtin))
    formats += ["stanza"] * (model.cell == "lstm")
    if to not in formats:
        use = f"use --to {' or '.join(formats)}, or " if formats else ""
        raise CharlmError(
            f"--to {to} cannot represent a model with {cell.setting}; {use}train one with model.cell: lstm, "
            "which all formats represent"
        )


def _notes(to: str, config: Config, vocab: Vocab) -> list[str]:
    """Return what the file does not contain and the program that reads it needs."""
    if to in ("onnx", "torch"):
        return []  # they contain everything
    corpus, notes, lost = config.corpus, [], []
    if corpus.normalize not in ("NFC", "none"):
        lost.append(f"corpus.normalize: {corpus.normalize}")
    if corpus.lowercase and to != "stanza":
        lost.append("corpus.lowercase: true")
    if corpus.keep is not None:
        lost.append(f"corpus.keep: {corpus.keep}")
    if lost:
        hint = "; FlairEmbeddings takes is_lower=True" if to == "flair" and corpus.lowercase else ""
        notes.append(f"the format does not contain {', '.join(lost)}: apply it to the text yourself{hint}")
    names = {"\n": "newline", " ": "space"}
    if missing := [name for char, name in names.items() if char not in vocab.characters]:
        notes.append(
            f"the vocabulary has no {' and no '.join(missing)}, which {to.capitalize()} puts around texts "
            "and words: the model reads an unknown character instead"
        )
    return notes


def files_of(to: str, output: Path) -> list[Path]:
    """Return the paths that `export_model` writes for `output`, `output` first."""
    if to == "torch":
        return [output, output.parent / f"{output.stem}.json", output.parent / _MODULE.name]
    return [output]


def export_model(
    loaded: Loaded, to: str, output: Path, before_writing: Callable[[], None] = lambda: None
) -> list[str]:
    """Write the model to `output`, with ``torch`` and two files beside it; on an error no file is changed.

    before_writing: called once the contents of the files are ready.
    Returns notes for the user of the file. Raises `CharlmError` for a model that the format cannot represent
    and for a file that cannot be written.
    """
    check_format(to, loaded.config)
    notes = _notes(to, loaded.config, loaded.vocab)
    if to == "onnx":
        content, note = checked_onnx(loaded, plain_weights(loaded.model), metadata(loaded))
        contents, notes = [content], [note]
    elif to == "torch":
        contents = [_torch_saved(plain_weights(loaded.model)), _module_json(loaded), _MODULE.read_bytes()]
    else:
        contents = [_torch_saved((stanza_state if to == "stanza" else flair_state)(loaded))]
    before_writing()
    _write_all(list(zip(files_of(to, output), contents, strict=True)))
    return notes


def _write_all(files: list[tuple[Path, bytes]]) -> None:
    """Write each content to its path; no path changes before all contents are on the disk."""
    if files:
        (path, content), *rest = files

        def write(temporary: Path) -> None:
            temporary.write_bytes(content)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # some file systems report a full disk only here
            _write_all(rest)

        write_atomically(path, write)


def plain_weights(
    model: CharLM,
    reserved: Sequence[str] = (),
    names: tuple[str, str, str] = ("embedding", "recurrent", "head"),
) -> dict[str, Tensor]:
    """Return the weights in float32, by the names of an `nn.Embedding`, a recurrent stack and an `nn.Linear`.

    reserved: the units of the reserved ids before those of the characters; the weights of the model's unknown
        are moved to those of the unit ``<unk>``. names: of the three modules.
    A model that reads one-hot vectors gets the embedding that makes them.
    """
    weights = {name: tensor.float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    table = weights.pop("embedding.weight", None)
    if table is None:
        table = torch.eye(model.vocab_size)
    matrix, bias = weights.pop("head.weight"), weights.pop("head.bias")
    embedding, recurrent, head = names
    unknown = model.unknown.id if model.unknown else None

    def rows(tensor: Tensor, value: float = 0.0) -> Tensor:
        """Return `tensor` (V, ...) with a row of `value` for each reserved id before it."""
        if not reserved:
            return tensor
        before = tensor.new_full((len(reserved), *tensor.shape[1:]), value)
        if unknown is None:
            return torch.cat([before, tensor])
        before[[unit.lower() for unit in reserved].index("<unk>")] = tensor[unknown]
        return torch.cat([before, tensor[:unknown], tensor[unknown + 1 :]])

    return {
        f"{embedding}.weight": rows(table),
        **{name.replace("recurrent", recurrent): tensor for name, tensor in weights.items()},
        f"{head}.weight": rows(matrix),
        f"{head}.bias": rows(bias, _RESERVED_LOGIT),
    }


def _units(reserved: Sequence[str], loaded: Loaded) -> list[str]:
    """Return the text of each id: the reserved ones, then the characters without the model's unknown."""
    unknown = loaded.model.unknown
    return [*reserved, *(c for n, c in enumerate(loaded.vocab.characters) if not unknown or n != unknown.id)]


def stanza_state(loaded: Loaded) -> dict[str, Any]:
    """Return what Stanza's `CharacterLanguageModel` loads: plain values and tensors."""
    model, config = loaded.model, loaded.config
    units = _units(STANZA_UNITS, loaded)
    weights = plain_weights(model, STANZA_UNITS, STANZA_NAMES)
    start = torch.zeros(config.model.num_layers, 1, config.model.hidden_size)
    return {
        "model": {
            "vocab": {
                "lang": "",
                "idx": 0,
                "cutoff": 0,
                "lower": config.corpus.lowercase,
                "_unit2id": {unit: number for number, unit in enumerate(units)},
                "_id2unit": units,
            },
            "args": {
                "char_emb_dim": weights["char_emb.weight"].shape[1],
                "char_hidden_dim": config.model.hidden_size,
                "char_num_layers": config.model.num_layers,
                "char_dropout": config.model.dropout,
                "char_rec_dropout": 0.0,
                "char_unit_dropout": 0.0,
            },
            "state_dict": {"charlstm_h_init": start, "charlstm_c_init": start.clone(), **weights},
            "pad": False,
            "is_forward_lm": config.model.direction == "forward",
        },
        "epoch": 1,
        "global_step": loaded.figures.get("step") or 0,
    }


def flair_state(loaded: Loaded) -> dict[str, Any]:
    """Return what Flair's `LanguageModel` loads: plain values, tensors and a `flair.data.Dictionary`."""
    model, config = loaded.model, loaded.config
    items = [unit.encode() for unit in _units(FLAIR_UNITS, loaded)]
    weights = plain_weights(model, FLAIR_UNITS, FLAIR_NAMES)
    return {
        "state_dict": weights,
        "dictionary": FlairDictionary(items),
        "is_forward_lm": config.model.direction == "forward",
        "hidden_size": config.model.hidden_size,
        "nlayers": config.model.num_layers,
        "embedding_size": weights["encoder.weight"].shape[1],
        "nout": None,
        "document_delimiter": "\n",
        "dropout": config.model.dropout,
        "recurrent_type": config.model.cell.upper(),
        "has_decoder": True,
    }


def metadata(loaded: Loaded) -> dict[str, Any]:
    """Return what is needed to use the weights, as JSON values."""
    return {
        "vocab": list(loaded.vocab.characters),
        "direction": loaded.config.model.direction,
        "cleaning": loaded.config.corpus.cleaning,
    }


def _module_json(loaded: Loaded) -> bytes:
    """Return the JSON file that `char_rnn` reads."""
    model = loaded.config.model
    builtin = cell_of(model).builtin
    assert builtin, "check_format refuses other cells"
    arguments = {
        **builtin.options,
        "cell": builtin.name,
        "vocab_size": len(loaded.vocab),
        "embedding_size": model.embedding_size if model.input == "embedding" else len(loaded.vocab),
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
    }
    return json.dumps({"model": arguments, **metadata(loaded)}, ensure_ascii=False, indent=1).encode() + b"\n"


def is_module(path: Path) -> bool:
    """Return whether `path` is the char_rnn.py that ``--to torch`` writes."""
    return path.name == _MODULE.name and path.is_file() and path.read_bytes() == _MODULE.read_bytes()


class _Pickler(pickle._Pickler):
    """Writes the name `flair.data.Dictionary` for its stand-in, without importing Flair."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the name of a class or function."""
        if obj is FlairDictionary:
            self.write(pickle.GLOBAL + b"flair.data\nDictionary\n")  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]


def _torch_saved(data: dict[str, Any]) -> bytes:
    """Return the file that ``torch.save`` writes for `data`."""
    buffer = io.BytesIO()
    torch.save(data, buffer, pickle_module=SimpleNamespace(Pickler=_Pickler, __name__="pickle"))
    return buffer.getvalue()
