"""A run on one HTML page that needs no network: curves, samples, what surprises it, what its units follow.

All that comes from a text or a file is escaped, and the page's own policy lets it run nothing but its own
script and load nothing.

T characters of text, H hidden units, F features.
"""

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charlm import config as configuration
from charlm.errors import CharlmError
from charlm.files import write_atomically
from charlm.inference.evaluate import text_surprisals
from charlm.inference.novelty import SIZES, Novelty, novelty, training_text
from charlm.inference.sample import Sampling, generate
from charlm.nn.model import num_parameters
from charlm.storage import log as logs
from charlm.storage.model_file import Loaded, load_model
from charlm.storage.run import Run
from charlm.text.corpus import Corpus

TEMPERATURES = (0.4, 0.7, 1.0)
WRITTEN = 1000  # characters of a sample
PASSAGE = 2500  # characters that are shown with all that the model makes of them
STUDIED = 20_000  # characters over which units are compared with features
_ACTIVATIONS = (
    1_100_000  # bytes of activations on the page: what is shown of wide models is a choice of units
)
_GUESSES = 5
_BEST = 6  # units that are offered for a feature


def write_report(run: Run, output: Path, source: str | None = None) -> None:
    """Write the page of `run` to `output`, atomically.

    source: where the training text is, if it has been moved.
    Raises `CharlmError` for a model that fills in, a run without a model, a damaged log, and a text that is
    not there.
    """
    path = run.best if run.best.is_file() else run.last
    loaded = load_model(path)
    if loaded.config.model.direction == "both":
        raise CharlmError("a report shows what a model writes; one of model.direction: both only fills in")
    corpus = training_text(path, loaded.config, loaded.vocab.characters, source)
    log = logs.read(run) if run.metrics.exists() else []
    page = make_page(run.folder.resolve().name, loaded, corpus, log)
    # A folder's name need not be UTF-8.
    write_atomically(output, lambda file: file.write_text(page, encoding="utf-8", errors="replace"))


def make_page(name: str, loaded: Loaded, corpus: Corpus, log: list[dict[str, Any]]) -> str:
    """The page, of what `loaded` makes of the held-out text and what it writes."""
    folder = Path(__file__).parent
    template, style, script = (
        (folder / f"page.{ending}").read_text(encoding="utf-8") for ending in ("html", "css", "js")
    )
    model, texts = loaded.config.model, samples(loaded)
    encoded = {title: loaded.vocab.encode(text) for title, text in texts.items()}
    found = {title: novelty(ids, corpus.train) for title, ids in encoded.items()}
    held_out = {"held-out text": novelty(corpus.val[:WRITTEN], corpus.train)}
    data = study(loaded, corpus.val[:STUDIED].long())
    some = "" if len(data["units"]) == model.hidden_size else f"{len(data['units'])} of the "
    parts = {
        "script_hash": _digest(script),
        "style_hash": _digest(style),
        "title": html.escape(name),
        "summary": f"{model.cell}, {model.num_layers} × {model.hidden_size}, {model.direction}: "
        f"{num_parameters(loaded.model):,} parameters, {len(loaded.vocab)} characters, trained on "
        + html.escape(f"{loaded.config.corpus.source}"),
        "figures": _figures(log, loaded.figures),
        "charts": "".join(_charts(log)),
        "samples": "".join(_sample(title, texts[title], found[title]) for title in texts),
        "novelty": _novelty_table({**found, **held_out}),
        "units": f"The same text, coloured by the output of {some}{model.hidden_size} units of the top layer "
        "after each character: orange above zero, blue below (Karpathy, Johnson and Li 2015). For each "
        f"feature, the units that go with it best over {min(STUDIED, len(corpus.val)):,} characters, r being "
        "their correlation with it.",
        "config": html.escape(configuration.to_yaml(loaded.config)),
        "data": script_safe(data),
        "style": style,
        "script": script,
    }
    # In one pass: what is put in is not looked through for more.
    return re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], template)


def script_safe(data: Any) -> str:
    """`data` as JSON that can stand inside a script element, whatever text it has."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def samples(loaded: Loaded) -> dict[str, str]:
    """A text at each temperature, the same each time, in the order in which it is read."""
    texts = {}
    for temperature in TEMPERATURES:
        generator = torch.Generator().manual_seed(1)
        start = torch.empty(0, dtype=torch.int64)
        sampling = Sampling(temperature=temperature)
        text = "".join(generate(loaded.model, loaded.vocab, start, WRITTEN, sampling, generator))
        backward = loaded.config.model.direction == "backward"
        texts[f"temperature {temperature}"] = text[::-1] if backward else text
    return texts


@torch.inference_mode()
def study(loaded: Loaded, ids: Tensor) -> dict[str, Any]:
    """What the model makes of a text `ids` (T,), of which the first `PASSAGE` characters are shown.

    passage: its characters. bits: the surprisal of each, None where there is no prediction. guesses: for each
    the likeliest characters with their probabilities. units: which units are shown. activations: for each of
    them a signed byte for each character, base64. features: for each the units that follow it best, with r.
    """
    model, vocab = loaded.model, loaded.vocab
    backward = loaded.config.model.direction == "backward"
    read = ids.flip(0) if backward else ids
    y, _ = model.recurrent(model.embed(read[None]), model.initial_state(1))  # (1, T, H)
    shown = min(PASSAGE, len(ids))
    # The prediction of a character comes from the state after the one that is read before it.
    first = len(ids) - shown if backward else 0
    asked = y[0, max(first - 1, 0) : first + shown - 1]
    probabilities, best = model.head(asked).softmax(-1).topk(min(_GUESSES, len(vocab)))
    guesses: list[Any] = [
        [[vocab.characters[i], round(p, 4)] for i, p in zip(row, shares, strict=True)]
        for row, shares in zip(best.tolist(), probabilities.tolist(), strict=True)
    ]
    if first == 0:
        guesses.insert(0, None)
    nats = text_surprisals(model, ids)[:shown].tolist()
    bits = [round(each / math.log(2), 3) if math.isfinite(each) else None for each in nats]
    states = y[0].flip(0) if backward else y[0]
    found = follow(features(vocab.decode(ids)), states)
    units = _units(found, states.shape[1], shown)
    part = states[:shown, units]
    scaled = part / part.abs().amax(0).clamp(min=1.0)
    values = (scaled * 127).round().to(torch.int8).t().contiguous()
    return {
        "passage": list(vocab.decode(ids[:shown])),
        "bits": bits,
        "guesses": guesses[::-1] if backward else guesses,
        "units": units,
        "activations": base64.b64encode(bytes(values.view(torch.uint8).flatten().tolist())).decode(),
        "features": found,
    }


def _units(found: dict[str, list[tuple[int, float]]], hidden_size: int, shown: int) -> list[int]:
    """The units that there is room for: those that follow something, and then the first."""
    room = min(max(_ACTIVATIONS // max(shown, 1), 1), hidden_size)
    wanted = dict.fromkeys(unit for units in found.values() for unit, _ in units)
    return sorted(list(dict.fromkeys([*wanted, *range(hidden_size)]))[:room])


def features(text: str) -> dict[str, list[float]]:
    """What units may follow, by name: a number for each character of `text`."""
    following = text[1:] + "\n"
    found: dict[str, list[float]] = {
        "ends of lines": [float(char == "\n") for char in following],
        "the way along a line": _since(text, "\n"),
        "ends of words": [
            float(char.isalpha() and not after.isalpha()) for char, after in zip(text, following, strict=True)
        ],
        "spaces": [float(char.isspace()) for char in text],
        "the way along a word": [min(each, 12.0) for each in _since(text, " ")],
        "capitals": [float(char.isupper()) for char in text],
        "vowels": [float(char.lower() in "aeiouáéíóúàèìòùâêîôûäöüy") for char in text],
        "digits": [float(char.isdigit()) for char in text],
        "marks of punctuation": [float(not char.isalnum() and not char.isspace()) for char in text],
        "the inside of quotes": _inside(text, "«“„", "»”"),
        "the inside of straight quotes": _inside(text, '"', '"'),
        "the inside of brackets": _inside(text, "([", ")]"),
    }
    return found


def _since(text: str, mark: str) -> list[float]:
    """How many characters there are since the last `mark`."""
    counts, count = [], 0.0
    for char in text:
        count = 0.0 if char == mark else count + 1
        counts.append(count)
    return counts


def _inside(text: str, opening: str, closing: str) -> list[float]:
    """1 from an opening mark to the closing one or the end of the paragraph, else 0."""
    inside, values = False, []
    for k, char in enumerate(text):
        if char in opening and not (inside and char in closing):
            inside = True
        elif char in closing or text[k - 1 : k + 1] == "\n\n":
            inside = False
        values.append(float(inside))
    return values


def follow(named: dict[str, list[float]], states: Tensor) -> dict[str, list[tuple[int, float]]]:
    """For each feature that varies, the units of `states` (T, H) that correlate with it best, with r."""
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


def _figures(log: list[dict[str, Any]], figures: dict[str, Any]) -> str:
    last = {key: value for row in log for key, value in row.items()}
    shown = {
        "val loss, nats": figures.get("val_loss"),
        "val perplexity": figures.get("val_perplexity"),
        "val bits a character": figures.get("val_bits_per_character"),
        "test perplexity": last.get("test_perplexity"),
        "steps": last.get("step"),
        "seconds of training": last.get("seconds"),
    }
    return "".join(
        f"<div><dt>{name}</dt><dd>{value if isinstance(value, int) else format(value, '.4g')}</dd></div>"
        for name, value in shown.items()
        if isinstance(value, int | float)
    )


def _charts(log: list[dict[str, Any]]) -> list[str]:
    """The curves that the log has."""
    charts = []
    for title, keys in (
        ("loss, nats a character", ("train_loss", "val_loss")),
        ("learning rate", ("lr",)),
        ("norm of the gradient", ("grad_norm",)),
    ):
        curves = [
            [(row["step"], row[key]) for row in log if _number(row.get("step")) and _number(row.get(key))]
            for key in keys
        ]
        if any(curves):
            names = ["train", "val"] if len(keys) > 1 else []
            charts.append(
                f"<figure>{_chart(curves, names)}<figcaption>{title}, by step</figcaption></figure>"
            )
    return charts


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _chart(curves: list[list[tuple[float, float]]], names: list[str]) -> str:
    """An SVG of `curves`, each of points (x, y)."""
    points = [point for curve in curves for point in curve]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    wide, tall, x0, y0 = 360, 200, 58, 172

    def place(x: float, y: float) -> str:
        across = (x - left) / ((right - left) or 1)
        return f"{x0 + across * (wide - x0 - 10):.1f},{y0 - (y - low) / ((high - low) or 1) * (y0 - 22):.1f}"

    drawn = [f'<path class="axis" d="M{x0} 14V{y0}H{wide - 6}"/>']
    for kind, curve in zip(("one", "two"), curves, strict=False):
        drawn.append(f'<polyline class="{kind}" points="{" ".join(place(x, y) for x, y in curve)}"/>')
    for y, at in ((low, y0), (high, 26)):
        drawn.append(f'<text x="{x0 - 6}" y="{at}" text-anchor="end">{y:.3g}</text>')
    for x, at, anchor in ((left, x0, "start"), (right, wide - 6, "end")):
        drawn.append(f'<text x="{at}" y="{y0 + 16}" text-anchor="{anchor}">{x:,}</text>')
    for k, name in enumerate(names):
        drawn.append(f'<text class="key{k + 1}" x="{wide - 90 + 46 * k}" y="24">{name}</text>')
    return f'<svg viewBox="0 0 {wide} {tall}" role="img" aria-label="a curve">{"".join(drawn)}</svg>'


def _sample(title: str, text: str, found: Novelty) -> str:
    end = found.start + found.longest
    parts = [html.escape(part) for part in (text[: found.start], text[found.start : end], text[end:])]
    return f'<div><h3>{title}</h3><pre dir="auto">{parts[0]}<mark>{parts[1]}</mark>{parts[2]}</pre></div>'


def _novelty_table(rows: dict[str, Novelty]) -> str:
    heads = ["text", "characters", "longest", *(f"{size} chars" for size in SIZES)]
    body = ""
    for name, found in rows.items():
        shares = [f"{found.shares[size]:.1%}" if size in found.shares else "–" for size in SIZES]
        cells = [name, f"{found.characters:,}", f"{found.longest:,}", *shares]
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th>{each}</th>" for each in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
