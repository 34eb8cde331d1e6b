"""Render a run as one HTML page that needs no network: curves, samples, surprisals, hidden units.

All text from files is escaped by jinja2, and the page's content security policy allows its own script and
style only.

T characters of text, H hidden units, F features.
"""

import base64
import hashlib
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor
from torch.nn import functional as F

from charlm import config as configuration
from charlm.api import LanguageModel
from charlm.errors import CharlmError
from charlm.files import write_atomically
from charlm.inference.evaluate import record_surprisals, text_surprisals
from charlm.inference.novelty import SIZES, novelty, training_text
from charlm.inference.sample import Sampling, sample
from charlm.nn.model import CharLM, num_parameters
from charlm.storage.log import Row, curve, read
from charlm.storage.model_file import Loaded, load_model
from charlm.storage.run import Run
from charlm.text.corpus import Corpus

TEMPERATURES = (0.4, 0.7, 1.0)
WRITTEN = 1000  # characters of a sample
PASSAGE = 2500  # characters shown with their surprisals, guesses and activations
STUDIED = 20_000  # characters over which units are correlated with features
_ACTIVATIONS = 1_100_000  # bytes of activations on the page; they limit the number of units
_GUESSES = 5
_BEST = 6  # units offered for a feature


def write_report(run: Run, output: Path, source: str | None = None) -> None:
    """Write the page of `run` to `output`, atomically.

    source: the path of the training text, if it has been moved.

    Raises `CharlmError` for a fill-in model, a run without a model, a damaged log, and a missing text.
    """
    path = run.best if run.best.is_file() else run.last
    loaded = load_model(path)
    if loaded.config.model.direction == "both":
        raise CharlmError(
            "model.direction is 'both', which cannot generate; report allows forward and backward"
        )
    corpus = training_text(path, loaded.config, loaded.vocab, source)
    log, rows = (read(run), curve(run)) if run.metrics.exists() else ([], [])
    page = make_page(run.folder.resolve().name, loaded, corpus, log, rows)
    # The name of a folder can be invalid UTF-8.
    write_atomically(output, lambda file: file.write_text(page, encoding="utf-8", errors="replace"))


def make_page(name: str, loaded: Loaded, corpus: Corpus, log: list[Row], rows: list[Row]) -> str:
    """Return the page; `rows` are those of the curves."""
    folder = Path(__file__).parent
    style, script = ((folder / f"page.{suffix}").read_text(encoding="utf-8") for suffix in ("css", "js"))
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    model, vocab = LanguageModel(loaded), loaded.vocab
    texts = {f"temperature {t}": _sample(model, t, corpus.boundary) for t in TEMPERATURES}
    # A line end that follows a record can be none of the model's characters.
    copied = {title: novelty(vocab.encode(text, "replace"), corpus.train) for title, text in texts.items()}
    if len(corpus.val):
        copied["held-out text"] = novelty(corpus.val[:WRITTEN], corpus.train)
    studied, end = corpus.val if len(corpus.val) else corpus.train, STUDIED
    if corpus.boundary is not None:  # whole records, at least one
        ends = (studied == corpus.boundary).nonzero()[:, 0] + 1
        end = int(ends[max(int((ends <= STUDIED).sum()) - 1, 0)])
    studied = studied[:end].long()
    return environment.get_template("page.html").render(
        title=name,
        script=script,
        style=style,
        digest=_digest,
        loaded=loaded,
        parameters=num_parameters(loaded.model),
        last={key: value for row in log for key, value in row.items()},
        charts=_charts(rows),
        samples=texts,
        novelty=copied,
        sizes=SIZES,
        studied=len(studied),
        config=configuration.to_yaml(loaded.config),
        data=study(loaded, studied, corpus.boundary),
    )


def _sample(model: LanguageModel, temperature: float, boundary: int | None) -> str:
    """Return a text of `WRITTEN` characters, with records one per line."""
    if boundary is None:
        return model.generate(length=WRITTEN, temperature=temperature, seed=1)
    sampling, generator = Sampling(temperature=temperature), torch.Generator().manual_seed(1)
    return sample(model.model, model.vocab, boundary, WRITTEN, generator, sampling)


@torch.inference_mode()
def study(loaded: Loaded, ids: Tensor, boundary: int | None = None) -> dict[str, Any]:
    """Return the data of the page's script for a text `ids` (T,); its first `PASSAGE` characters are shown.

    boundary: the id of the character that follows each record, if the text is a list of records.

    passage: the characters shown. bits: their surprisals, None without a prediction. guesses: the most
    probable characters at each place, with their probabilities. units: the numbers of the units shown.
    activations: a signed byte per unit and character, base64. features: the units that correlate best with
    each feature, with r.
    """
    model, vocab = loaded.model, loaded.vocab
    before, states, nats = _read(model, ids) if boundary is None else _read_records(model, ids, boundary)
    shown = min(PASSAGE, len(ids))
    probabilities, best = model.head(before[:shown]).softmax(-1).topk(min(_GUESSES, len(vocab)))
    guesses: list[Any] = [
        [[vocab.characters[i], round(p, 4)] for i, p in zip(row, row_probabilities, strict=True)]
        for row, row_probabilities in zip(best.tolist(), probabilities.tolist(), strict=True)
    ]
    bits = [
        round(value / math.log(2), 3) if math.isfinite(value) else None for value in nats[:shown].tolist()
    ]
    guesses = [each if value is not None else None for each, value in zip(guesses, bits, strict=True)]
    found = correlate(features(vocab.decode(ids)), states)
    units = _units(found, states.shape[1], shown)
    part = states[:shown, units]
    scaled = part / part.abs().amax(0).clamp(min=1.0)
    values = (scaled * 127).round().to(torch.int8).t().contiguous()
    return {
        "passage": list(vocab.decode(ids[:shown])),
        "bits": bits,
        "guesses": guesses,
        "units": units,
        "activations": base64.b64encode(bytes(values.view(torch.uint8).flatten().tolist())).decode(),
        "features": found,
    }


def _read(model: CharLM, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read a text (T,); return the outputs (T, H) before and after each character, and its nats (T,).

    The first character read is not predicted; the output before it is that after it.
    """
    backward = model.config.direction == "backward"
    y, _ = model.recurrent(model.embed((ids.flip(0) if backward else ids)[None]), model.initial_state(1))
    before = torch.cat([y[0, :1], y[0, :-1]])
    outputs = (before.flip(0), y[0].flip(0)) if backward else (before, y[0])
    return *outputs, text_surprisals(model, ids)


def _read_records(model: CharLM, ids: Tensor, boundary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read each record of `ids` (T,) alone, between two boundaries; return the same as `_read`."""
    ends = ((ids == boundary).nonzero()[:, 0] + 1).tolist()
    records = [ids[start:end] for start, end in pairwise([0, *ends])]
    outputs = [
        model.recurrent(model.embed(F.pad(each, (1, 0), value=boundary)[None]), model.initial_state(1))[0][0]
        for each in records
    ]
    before, after = (torch.cat([y[part] for y in outputs]) for part in (slice(-1), slice(1, None)))
    nats = record_surprisals(model, [each[:-1] for each in records], boundary)
    return before, after, torch.cat(nats)


def _units(found: dict[str, list[tuple[int, float]]], hidden_size: int, shown: int) -> list[int]:
    """Return the units shown: those that correlate with a feature, then the first ones, up to the limit."""
    wanted = [unit for units in found.values() for unit, _ in units]
    room = max(_ACTIVATIONS // max(shown, 1), 1)
    return sorted([*dict.fromkeys([*wanted, *range(hidden_size)])][:room])


def features(text: str) -> dict[str, list[float]]:
    """Return the features by name, each a number for each character of `text`."""
    following = text[1:] + "\n"
    return {
        "ends of lines": [float(char == "\n") for char in following],
        "position in the line": _since(text, "\n"),
        "ends of words": [
            float(char.isalpha() and not after.isalpha()) for char, after in zip(text, following, strict=True)
        ],
        "spaces": [float(char.isspace()) for char in text],
        "position in the word": [min(count, 12.0) for count in _since(text, " ")],
        "capitals": [float(char.isupper()) for char in text],
        "vowels": [float(char.lower() in "aeiouáéíóúàèìòùâêîôûäöüy") for char in text],
        "digits": [float(char.isdigit()) for char in text],
        "punctuation": [float(not char.isalnum() and not char.isspace()) for char in text],
        "inside quotes": _inside(text, "«“„", "»”"),
        "inside straight quotes": _inside(text, '"', '"'),
        "inside brackets": _inside(text, "([", ")]"),
    }


def _since(text: str, mark: str) -> list[float]:
    """Return the number of characters since the last `mark`, for each character."""
    return [float(k - text.rfind(mark, 0, k + 1)) for k in range(len(text))]


def _inside(text: str, opening: str, closing: str) -> list[float]:
    """Return 1 from an opening mark to the closing one or the end of the paragraph, else 0."""
    inside, values = False, []
    for k, char in enumerate(text):
        if char in opening and not (inside and char in closing):
            inside = True
        elif char in closing or text[k - 1 : k + 1] == "\n\n":
            inside = False
        values.append(float(inside))
    return values


def correlate(named: dict[str, list[float]], states: Tensor) -> dict[str, list[tuple[int, float]]]:
    """Return the units of `states` (T, H) that correlate best with each feature that varies, with r."""
    varying = {name: values for name, values in named.items() if len(set(values)) > 1}
    if not varying:
        return {}
    F = torch.tensor(list(varying.values()), dtype=torch.float64)  # (F, T)
    centred = F - F.mean(1, keepdim=True)
    units = states.double() - states.double().mean(0)
    r = centred @ units / (centred.norm(dim=1)[:, None] * units.norm(dim=0)).clamp(min=1e-12)
    best = r.abs().topk(min(_BEST, r.shape[1])).indices.tolist()
    ranked = {
        name: [(unit, round(float(r[k, unit]), 4)) for unit in best[k]] for k, name in enumerate(varying)
    }
    return dict(sorted(ranked.items(), key=lambda item: -abs(item[1][0][1])))


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _charts(rows: list[Row]) -> dict[str, list[list[tuple[int, float]]]]:
    """Return the curves of each chart, each the steps and values of the rows that have a finite one."""
    keys = {
        "loss, nats per character": ("train_loss", "val_loss"),
        "learning rate": ("lr",),
        "gradient norm": ("grad_norm",),
    }
    return {
        title: [[(row["step"], row[key]) for row in rows if _finite(row.get(key))] for key in curves]
        for title, curves in keys.items()
    }


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
