"""Other programs' models as charlm's: Stanza's, Flair's, and plain PyTorch's.

Each is an embedding, a recurrent stack and a linear head, whose weights are taken over as they are. Ids that
stand for no single character, as ``<UNK>``, are left out: the other characters keep their logits.
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

_NAMED = 8  # how many ids a message names
_TEXTS, _STEPS = 64, 32  # over which the effect of an initial state is measured
_LOGITS = 2**24  # so many are computed at once
_CHANGEABLE = ("corpus.", "model.direction", "model.nonlinearity", "model.gru_reset", "model.dropout")


def import_model(
    path: Path, origin: str, vocab: Path | None = None, overrides: tuple[str, ...] = ()
) -> tuple[Loaded, list[str]]:
    """The model in the file at `path`, which `origin` wrote, and what was left out of it.

    origin: stanza, flair or torch-char-rnn. vocab: the JSON file with the vocabulary, of ``torch-char-rnn``.
    overrides: ``section.key=value`` texts for what the weights do not say.
    Raises `CharlmError` for a file that is damaged, is of another kind, or has parts that charlm lacks.
    """
    if origin == "stanza":
        parts = read_stanza(path)
    elif origin == "flair":
        parts = read_flair(path)
    else:
        assert vocab is not None, "the command asks for it"
        parts = read_plain(path, vocab)
    return assemble(parts, path, origin, overrides)


def assemble(parts: Parts, path: Path, origin: str, overrides: tuple[str, ...]) -> tuple[Loaded, list[str]]:
    """charlm's model of `parts`, and what was left out.

    Raises `CharlmError` where the parts do not fit together, `ConfigError` for `overrides` of what they fix.
    """
    said: list[str] = []
    kept = [n for n, unit in enumerate(parts.units) if _is_character(unit)]
    vocab = "".join(str(parts.units[n]) for n in kept)
    if doubled := [char for char, count in Counter(vocab).items() if count > 1]:
        raise CharlmError(f"the vocabulary of {path} has {ascii_name(doubled[0])} more than once")
    if not vocab:
        raise CharlmError(f"the vocabulary of {path} has no characters")
    if len(kept) < len(parts.units):
        others = [one_line(repr(unit), 40) for unit in parts.units if not _is_character(unit)]
        named = ", ".join(others[:_NAMED]) + (f" and {len(others) - _NAMED} more" * (len(others) > _NAMED))
        said.append(f"left out the ids that stand for no single character: {named}")
    weights = _weights_of(parts, kept, path)
    config = _config_of(weights, parts.settings, f"{path.name}, imported from {origin}", path)
    config = _overridden(config, overrides)
    with Uninitialised(), torch.device("meta"):  # sizes are checked before memory is taken
        model = make_model(len(vocab), config.model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(
        shapes.keys() | weights.keys() - ({"head.weight"} if config.model.tie_weights else set())
    ):
        have = tuple(weights[name].shape) if name in weights else None
        if have != shapes.get(name):
            raise CharlmError(
                f"the tensors of {path} do not fit together: {one_line(name)} is {have or 'missing'} where "
                f"the others need {shapes.get(name, 'none')}"
            )
    with Uninitialised():
        model = make_model(len(vocab), config.model)
    load_weights(model, weights)
    model.eval()
    if any(tensor.any() for tensor in parts.start):
        first, later = _effect(model, parts.start, path)
        said.append(
            "left out the learned initial state: charlm begins with zeros. Over characters by chance the "
            f"prediction after the first differs by {first:.2g} bits, after {_STEPS} by {later:.2g}"
        )
    return Loaded(model, Vocab(vocab), config, {"imported_from": origin}), said


def _weights_of(parts: Parts, kept: list[int], path: Path) -> dict[str, Tensor]:
    """The weights by charlm's names, with the rows of the ids `kept` alone."""
    V, embedding = len(parts.units), parts.embedding
    for name, tensor in (("an embedding", embedding), ("a head", parts.head)):
        if tensor is not None and not (tensor.dim() == 2 and len(tensor) == V):
            raise CharlmError(
                f"{path} has a vocabulary of {V} ids, but {name} of shape {tuple(tensor.shape)}"
            )
    if parts.bias.shape != (V,):
        raise CharlmError(f"the head of {path} has a bias of shape {tuple(parts.bias.shape)}, not {(V,)}")
    weights = {f"recurrent.{name}": tensor for name, tensor in parts.recurrent.items()}
    if not any("bias" in name for name in weights):
        for name in [name for name in weights if "weight_hh" in name]:
            for kind in ("ih", "hh"):
                weights[name.replace("weight_hh", f"bias_{kind}")] = torch.zeros(len(weights[name]))
    weights |= {"head.weight": parts.head[kept], "head.bias": parts.bias[kept]}
    if embedding is None:  # one column for each id
        weights["recurrent.weight_ih_l0"] = weights["recurrent.weight_ih_l0"][..., kept]
    elif not _is_identity(table := embedding[kept]):
        weights["embedding.weight"] = table
    return weights


def _is_identity(matrix: Tensor) -> bool:
    """Whether `matrix` (N, K) is the identity, which is not made for it: of a large vocabulary it is huge."""
    N, K = matrix.shape
    return N == K == int(matrix.count_nonzero()) and bool((matrix.diagonal() == 1).all())


def _config_of(weights: dict[str, Tensor], settings: dict[str, Any], source: str, path: Path) -> Config:
    """The configuration that `weights` and `settings` amount to."""
    hidden = weights.get("recurrent.weight_hh_l0", torch.empty(0))
    rows, H = hidden.shape if hidden.dim() == 2 else (0, 0)
    cells = {cell.gates * H: name for name, cell in CELLS.items() if cell.builtin}
    if not (H and rows in cells):
        raise CharlmError(f"{path} is damaged: its recurrent stack lacks a first layer of one, 3 or 4 gates")
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
    return configuration.from_data(data, str(path))


def _overridden(config: Config, overrides: tuple[str, ...]) -> Config:
    """`config` with `overrides`, which must leave what the weights say."""
    if fixed := [text for text in overrides if not text.strip().startswith(_CHANGEABLE)]:
        raise ConfigError(
            f"--set {fixed[0]!r} is not for an import, where the file says the rest: set corpus.*, "
            + ", ".join(_CHANGEABLE[1:])
        )
    config = configuration.override(config, overrides)
    if config.model.direction == "both":
        raise ConfigError("a model that is imported reads in one direction: forward or backward, not both")
    return config


@torch.inference_mode()
def _effect(model: CharLM, start: tuple[Tensor, ...], path: Path) -> tuple[float, float]:
    """The mean divergence, in bits, of the predictions after one character and after `_STEPS`.

    Those from `start`, (L, 1, H) each, against those from zeros, over characters drawn evenly.
    """
    zeros = model.initial_state(1)
    L, _, H = zeros[0].shape
    if [tensor.shape for tensor in start] != [(L, 1, H)] * len(zeros):
        raise CharlmError(f"{path} is damaged: its initial state does not fit its weights")
    ids = torch.randint(model.vocab_size, (_TEXTS, _STEPS), generator=torch.Generator().manual_seed(1))

    def predicted(ids: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """The logarithms of the probabilities after the first and the last of `ids` (B, T): (B, 2, V)."""
        logits, _ = model(ids, tuple(tensor.repeat(1, len(ids), 1) for tensor in state))
        return F.log_softmax(logits[:, [0, -1]].double(), -1)

    bits = torch.zeros(2)
    for part in torch.split(ids, max(_LOGITS // (_STEPS * model.vocab_size), 1)):
        p, q = predicted(part, start), predicted(part, zeros)
        bits += (p.exp() * (p - q)).sum((0, 2)) / (_TEXTS * math.log(2))
    return float(bits[0]), float(bits[1])


def _is_character(unit: Any) -> bool:
    """Whether `unit` is one character, and not half of one."""
    return isinstance(unit, str) and len(unit) == 1 and not "\ud800" <= unit <= "\udfff"
