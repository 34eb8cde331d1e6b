"""Import of the models of other programs: Stanza, Flair and plain PyTorch.

Each is an embedding, a recurrent stack and a linear head, whose weights are copied unchanged. Ids that are
not a single character, such as ``<UNK>``, are left out: the other characters keep their logits.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, ConfigError, one_line
from charlm.interop.foreign import Parts, read_flair, read_plain, read_stanza
from charlm.nn.cells import CELLS
from charlm.nn.device import Uninitialised
from charlm.nn.model import CharLM, make_model
from charlm.storage.model_file import Loaded, load_weights
from charlm.text.vocab import Vocab, ascii_name

_MAX_LISTED = 8  # ids in a message
_TEXTS, _STEPS = 64, 32  # on which the effect of an initial state is measured
_MAX_LOGITS = 2**24  # computed at once
_CHANGEABLE = ("corpus.", "model.direction", "model.nonlinearity", "model.gru_reset", "model.dropout")


def import_model(
    path: Path, origin: str, vocab: Path | None = None, overrides: tuple[str, ...] = ()
) -> tuple[Loaded, list[str]]:
    """Read the model at `path`; return it with notes on the parts that were left out.

    origin: stanza, flair or torch-char-rnn. vocab: the JSON file with the vocabulary, for torch-char-rnn.
    overrides: ``section.key=value`` texts for settings that the weights do not determine.
    Raises `CharlmError` for a file that is damaged or of another kind and for parts that charlm lacks or that
    do not fit together, `ConfigError` for `overrides` of settings that the weights determine.
    """
    readers = {"stanza": read_stanza, "flair": read_flair}
    parts = read_plain(path, vocab) if vocab else readers[origin](path)
    notes: list[str] = []
    ids = [n for n, unit in enumerate(parts.units) if _is_character(unit)]
    characters = "".join(str(parts.units[n]) for n in ids)
    if repeated := [char for char, count in Counter(characters).items() if count > 1]:
        raise CharlmError(f"the vocabulary of {path} has {ascii_name(repeated[0])} more than once")
    if not characters:
        raise CharlmError(f"the vocabulary of {path} has no characters")
    if others := [one_line(repr(unit), 40) for unit in parts.units if not _is_character(unit)]:
        more = f" and {len(others) - _MAX_LISTED} more" if len(others) > _MAX_LISTED else ""
        notes.append(f"left out ids that are not a single character: {', '.join(others[:_MAX_LISTED])}{more}")
    weights = _weights(parts, ids, path)
    config = _config(weights, parts.settings, f"{path.name}, imported from {origin}", path, overrides)
    _check_shapes(weights, len(characters), config, path)
    with Uninitialised():
        model = make_model(len(characters), config.model)
    load_weights(model, weights)
    model.eval()
    if any(tensor.any() for tensor in parts.start):
        first, last = _divergence_from_zeros(model, parts.start, path)
        notes.append(
            "left out the learned initial state: charlm starts from zeros. On random characters the "
            f"prediction after the first differs by {first:.2g} bits, after {_STEPS} by {last:.2g} bits"
        )
    return Loaded(model, Vocab(characters), config, {"imported_from": origin}), notes


def _check_shapes(weights: dict[str, Tensor], V: int, config: Config, path: Path) -> None:
    """Raise `CharlmError` unless `weights` have the shapes of the model, before memory is taken for it."""
    with Uninitialised(), torch.device("meta"):
        model = make_model(V, config.model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if config.model.tie_weights:
        del found["head.weight"]
    for name in sorted(shapes.keys() | found.keys()):
        if found.get(name) != shapes.get(name):
            raise CharlmError(
                f"the tensors of {path} do not fit together: {one_line(name)} is "
                f"{found.get(name, 'missing')}, the others require {shapes.get(name, 'no such tensor')}"
            )


def _weights(parts: Parts, ids: list[int], path: Path) -> dict[str, Tensor]:
    """Return the weights by charlm's names, with the rows of `ids` only."""
    V, weights = len(parts.units), dict(parts.weights)
    for name, dimensions in (("embedding.weight", 2), ("head.weight", 2), ("head.bias", 1)):
        if name in weights:
            shape = weights[name].shape
            if shape[0] != V or len(shape) != dimensions:
                raise CharlmError(f"{path} has a vocabulary of {V} ids, but {name} of shape {tuple(shape)}")
            weights[name] = weights[name][ids]
    if not any("recurrent.bias" in name for name in weights):
        for name in [name for name in weights if "weight_hh" in name]:
            for kind in ("ih", "hh"):
                weights[name.replace("weight_hh", f"bias_{kind}")] = torch.zeros(len(weights[name]))
    if "embedding.weight" not in weights:  # one column for each id
        weights["recurrent.weight_ih_l0"] = weights["recurrent.weight_ih_l0"][..., ids]
    elif _is_identity(weights["embedding.weight"]):
        del weights["embedding.weight"]
    return weights


def _is_identity(matrix: Tensor) -> bool:
    """Return whether `matrix` (N, K) is the identity, without allocating one: it can be huge."""
    N, K = matrix.shape
    return N == K == int(matrix.count_nonzero()) and bool((matrix.diagonal() == 1).all())


def _config(
    weights: dict[str, Tensor], settings: dict[str, Any], source: str, path: Path, overrides: tuple[str, ...]
) -> Config:
    """Return the configuration that `weights`, `settings` and `overrides` determine."""
    keys = {text: configuration.find_key(text.partition("=")[0].strip()) for text in overrides}
    if fixed := [text for text, key in keys.items() if not key.startswith(_CHANGEABLE)]:
        raise ConfigError(
            f"--set {fixed[0]!r}: an import takes this setting from the file; allowed: corpus.*, "
            + ", ".join(_CHANGEABLE[1:])
        )
    hidden = weights.get("recurrent.weight_hh_l0", torch.empty(0))
    rows, H = hidden.shape if hidden.dim() == 2 else (0, 0)
    cells = {cell.gates * H: name for name, cell in CELLS.items() if cell.builtin}
    if not (H and rows in cells):
        raise CharlmError(f"{path} is damaged: its recurrent stack has no first layer of 1, 3 or 4 gates")
    embedding = weights.get("embedding.weight")
    model = {
        "cell": cells[rows],
        "hidden_size": H,
        "num_layers": sum("weight_hh" in name for name in weights),
        "input": "one_hot" if embedding is None else "embedding",
        "dropout": 0.0,
    }
    if embedding is not None:
        model["embedding_size"] = embedding.shape[1]
        model["tie_weights"] = torch.equal(embedding, weights["head.weight"])
    data: dict[str, dict[str, Any]] = {"corpus": {"source": source, "normalize": "none"}, "model": model}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        data[section][name] = value
    config = configuration.from_data(data, str(path), overrides)
    if config.model.direction == "both":
        raise ConfigError("model.direction is both; allowed for an import: forward, backward")
    return config


@torch.inference_mode()
def _divergence_from_zeros(model: CharLM, start: tuple[Tensor, ...], path: Path) -> tuple[float, float]:
    """Return the mean KL divergence, in bits, of predictions from `start` from those from zeros.

    start: tensors (L, 1, H). The first value is after one random character, the second after `_STEPS`.
    """
    zeros = model.initial_state(1)
    if [tensor.shape for tensor in start] != [tensor.shape for tensor in zeros]:
        raise CharlmError(f"{path} is damaged: its initial state does not fit its weights")
    ids = torch.randint(model.vocab_size, (_TEXTS, _STEPS), generator=torch.Generator().manual_seed(1))

    def predicted(ids: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """Return the log-probabilities after the first and the last of `ids` (B, T): (B, 2, V)."""
        logits, _ = model(ids, tuple(tensor.repeat(1, len(ids), 1) for tensor in state))
        return F.log_softmax(logits[:, [0, -1]].double(), -1)

    bits = torch.zeros(2)
    for part in torch.split(ids, max(_MAX_LOGITS // (_STEPS * model.vocab_size), 1)):
        p, q = predicted(part, start), predicted(part, zeros)
        bits += (p.exp() * (p - q)).sum((0, 2)) / (_TEXTS * math.log(2))
    return float(bits[0]), float(bits[1])


def _is_character(unit: Any) -> bool:
    """Return whether `unit` is one character and not a surrogate."""
    return isinstance(unit, str) and len(unit) == 1 and not "\ud800" <= unit <= "\udfff"
