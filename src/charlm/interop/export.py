"""A model as the files that other programs read: Stanza's, Flair's, and plain PyTorch's.

The weights go over as they are; what differs is names, and the ids that a format keeps for itself. Those get
embeddings of zeros and logits so low that the other characters' probabilities stay the same.
"""

import io
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.config import Config
from charlm.errors import CharlmError
from charlm.files import write_atomically
from charlm.interop import char_rnn
from charlm.interop.onnx import checked_onnx
from charlm.interop.torchfile import FlairDictionary
from charlm.nn.cells import CELLS, cell_of
from charlm.nn.model import CharLM
from charlm.storage.model_file import Loaded
from charlm.text.vocab import Vocab

ENDINGS = {"onnx": ".onnx", "stanza": "-stanza.pt", "flair": "-flair.pt", "torch": ".pt"}
STANZA_UNITS = ("<PAD>", "<UNK>", "<EMPTY>", "<ROOT>")  # Stanza's ids 0 to 3
FLAIR_UNITS = ("<unk>",)  # Flair's id 0
_NEVER = -100.0  # the logit of an id that stands for no character: its probability is under e⁻⁵⁰ in practice


def refuse(to: str, config: Config) -> None:
    """Raise `CharlmError`, saying why, for a model that the format `to` cannot hold."""
    model = config.model
    if model.direction == "both":
        raise CharlmError(
            f"--to {to} takes models that predict the next character; this one fills in characters from both "
            "sides (model.direction: both): train one with model.direction: forward or backward"
        )
    cell = cell_of(model)
    if not cell.onnx:
        raise CharlmError(
            f"no other program computes model.cell: {model.cell}, so it cannot be exported: train one with "
            f"model.cell: {', '.join(name for name, each in CELLS.items() if each.onnx)}"
        )
    if to == "stanza" and model.cell != "lstm":
        raise CharlmError(
            f"Stanza's character models are LSTMs; this one has model.cell: {model.cell}: train an lstm, or "
            f"export it with --to {'flair, ' if model.cell == 'gru' else ''}onnx or torch"
        )
    if to == "flair" and model.cell == "rnn":
        raise CharlmError(
            "Flair's language models are LSTMs or GRUs; this one has model.cell: rnn: train one of those, "
            "or export it with --to onnx or torch"
        )
    if to != "onnx" and not cell.builtin:
        raise CharlmError(
            f"--to {to} computes GRUs with torch's, which resets after the recurrent product; this one has "
            "model.gru_reset: before: train it with gru_reset: after, or export it with --to onnx"
        )


def remarks(to: str, config: Config, vocab: Vocab) -> list[str]:
    """What whoever uses the file must know: what it does not hold, and what its reader will ask for."""
    if to in ("onnx", "torch"):
        return []  # they hold all of it
    said, cleaning = [], config.corpus
    lost = [
        f"corpus.{key}: {value}"
        for key, value, held in (
            ("normalize", cleaning.normalize, cleaning.normalize in ("NFC", "none")),
            ("lowercase", "true", to == "stanza" or not cleaning.lowercase),
            ("keep", cleaning.keep, cleaning.keep is None),
        )
        if not held
    ]
    if lost:
        hint = "; FlairEmbeddings takes is_lower=True" if to == "flair" and cleaning.lowercase else ""
        said.append(f"the format does not hold {', '.join(lost)}: give it text that is so already{hint}")
    names = {"\n": "line end", " ": "space"}
    if missing := [name for char, name in names.items() if char not in vocab.characters]:
        said.append(
            f"the model knows no {' and no '.join(missing)}, which {to.capitalize()} puts around texts and "
            "words: it reads them as unknown characters"
        )
    return said


def files_of(to: str, output: Path) -> list[Path]:
    """The files that `export` writes for `output`, which comes first."""
    if to == "torch":
        return [output, output.with_suffix(".json"), output.with_name("char_rnn.py")]
    return [output]


def export(loaded: Loaded, to: str, output: Path) -> list[str]:
    """Write the model to `output`, for ``torch`` with two files beside it; all of them whole, or none.

    Returns what whoever uses the file should know. Raises `CharlmError` for a model that the format cannot
    hold.
    """
    refuse(to, loaded.config)
    said = remarks(to, loaded.config, loaded.vocab)
    if to == "onnx":
        content, difference = checked_onnx(loaded, plain_weights(loaded.model), about(loaded))
        contents = [content]
        said.append(
            "not compared with torch: that takes onnxruntime: pip install 'charlm-torch[onnx]'"
            if difference is None
            else f"compared in onnxruntime: the logits differ from torch's by {difference:.1e} at most"
        )
    elif to == "torch":
        contents = [_saved(plain_weights(loaded.model)), _about(loaded), module_source()]
    else:
        contents = [_saved((stanza_state if to == "stanza" else flair_state)(loaded))]
    _write_all(list(zip(files_of(to, output), contents, strict=True)))
    return said


def _write_all(files: list[tuple[Path, bytes]]) -> None:
    """Write each path's content; none is put in its place before all fit on the disk."""
    if not files:
        return
    (path, content), *rest = files

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # some disks are found full only here
        _write_all(rest)

    write_atomically(path, write)


def plain_weights(model: CharLM, extra: int = 0) -> dict[str, Tensor]:
    """The weights as an `nn.Embedding`, a recurrent stack and an `nn.Linear` have them, in float32.

    extra: so many ids stand before the characters'. A model that reads one-hot vectors gets the embedding
        that makes them.
    """
    weights = {
        name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    table = weights.pop("embedding.weight", None)
    if table is None:
        table = torch.eye(model.vocab_size)
    head, bias = weights.pop("head.weight"), weights.pop("head.bias")
    return {
        "embedding.weight": F.pad(table, (0, 0, extra, 0)),
        **weights,
        "head.weight": F.pad(head, (0, 0, extra, 0)),
        "head.bias": F.pad(bias, (extra, 0), value=_NEVER),
    }


def _renamed(weights: dict[str, Tensor], embedding: str, recurrent: str, head: str) -> dict[str, Tensor]:
    """`weights` with the first part of each name another."""
    names = {"embedding": embedding, "recurrent": recurrent, "head": head}
    parts = {name: name.split(".") for name in weights}
    return {f"{names[parts[name][0]]}.{parts[name][1]}": tensor for name, tensor in weights.items()}


def stanza_state(loaded: Loaded) -> dict[str, Any]:
    """What `stanza`'s CharacterLanguageModel loads: plain values and tensors."""
    model, config = loaded.model, loaded.config
    units = [*STANZA_UNITS, *loaded.vocab.characters]
    weights = plain_weights(model, len(STANZA_UNITS))
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
                "char_emb_dim": weights["embedding.weight"].shape[1],
                "char_hidden_dim": config.model.hidden_size,
                "char_num_layers": config.model.num_layers,
                "char_dropout": config.model.dropout,
                "char_rec_dropout": 0.0,
                "char_unit_dropout": 0.0,
            },
            "state_dict": {
                "charlstm_h_init": start,
                "charlstm_c_init": start.clone(),
                **_renamed(weights, "char_emb", "charlstm.lstm", "decoder"),
            },
            "pad": False,
            "is_forward_lm": config.model.direction == "forward",
        },
        "epoch": 1,
        "global_step": loaded.figures.get("step") or 0,
    }


def flair_state(loaded: Loaded) -> dict[str, Any]:
    """What `flair`'s LanguageModel loads: the same, and a dictionary of class `flair.data.Dictionary`."""
    model, config = loaded.model, loaded.config
    items = [unit.encode() for unit in (*FLAIR_UNITS, *loaded.vocab.characters)]
    dictionary = FlairDictionary()
    dictionary.idx2item, dictionary.item2idx = items, {item: number for number, item in enumerate(items)}
    weights = plain_weights(model, len(FLAIR_UNITS))
    return {
        "state_dict": _renamed(weights, "encoder", "rnn", "decoder"),
        "dictionary": dictionary,
        "is_forward_lm": config.model.direction == "forward",
        "hidden_size": config.model.hidden_size,
        "nlayers": config.model.num_layers,
        "embedding_size": weights["embedding.weight"].shape[1],
        "nout": None,
        "document_delimiter": "\n",
        "dropout": config.model.dropout,
        "recurrent_type": config.model.cell.upper(),
        "has_decoder": True,
    }


def about(loaded: Loaded) -> dict[str, Any]:
    """What a reader of the weights alone must know besides them, as JSON has it."""
    return {
        "vocab": list(loaded.vocab.characters),
        "direction": loaded.config.model.direction,
        "cleaning": loaded.config.corpus.cleaning,
    }


def _about(loaded: Loaded) -> bytes:
    model = loaded.config.model
    builtin = cell_of(model).builtin
    assert builtin  # `refuse` has checked it
    arguments = {
        **builtin.options,
        "cell": builtin.name,
        "vocab_size": len(loaded.vocab),
        "embedding_size": model.embedding_size if model.input == "embedding" else len(loaded.vocab),
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
    }
    return json.dumps({"model": arguments, **about(loaded)}, ensure_ascii=False, indent=1).encode() + b"\n"


def module_source() -> bytes:
    """The source of `char_rnn`, which reads what ``--to torch`` writes."""
    return Path(char_rnn.__file__).read_bytes()


def is_module(path: Path) -> bool:
    """Whether `path` is that module already."""
    return path.name == "char_rnn.py" and path.is_file() and path.read_bytes() == module_source()


class _Pickler(pickle._Pickler):
    """Writes the name `flair.data.Dictionary` for its stand-in, without that package."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the name of a class or function; others than the stand-in must be importable by theirs."""
        if obj is FlairDictionary:
            self.write(pickle.GLOBAL + b"flair.data\nDictionary\n")  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]


def _saved(data: dict[str, Any]) -> bytes:
    """What ``torch.save`` makes of `data`."""
    buffer = io.BytesIO()
    torch.save(data, buffer, pickle_module=SimpleNamespace(Pickler=_Pickler, __name__="pickle"))
    return buffer.getvalue()
