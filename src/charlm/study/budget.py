"""Choose a model and its training for a text, this machine and a time: `charlm train --minutes`.

The rule interpolates between the best configurations found for one text and time (docs/budget.md). Its
arguments are the text's size and alphabet and the machine's speed, which is measured.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from charlm import __version__
from charlm.config import Config, CorpusConfig, from_data, override
from charlm.errors import CharlmError, ConfigError
from charlm.files import cache_folder, write_atomically
from charlm.nn.device import choose_device, choose_threads
from charlm.nn.layers import choose_implementation
from charlm.storage.vocabulary import read_vocabulary
from charlm.study.bench import machine, make_learner, operations, training_rate
from charlm.text.corpus import IN_MEMORY, Corpus
from charlm.text.encode import Split
from charlm.text.read import TextFile, find_files, strip_pieces
from charlm.text.records import in_records

Report = Callable[[str], object]
Speeds = dict[int, float]  # floating-point operations per second of a training, by hidden size

_SIZES = (64, 128, 256, 512, 1024)  # whose speed is measured
_MEASURED = 0.5  # seconds for each of them
_BATCH, _LENGTH = 24, 64
_RECORDS = 4096  # characters of the records of a step
_OF_WINDOWS = ("stride", "shuffle", "max_train_windows")
_START = 4.0  # seconds from the command to the first step
_READ = 50e6  # characters that are read in a second
_READ_SHARE = 0.1  # the largest share of the time for reading the text
_STEPS_SHARE = 0.92  # of the remaining time; the rest goes to evaluations and saves
_FORWARD = 3.0  # how much faster than a training a text is scored
_SCORED = 0.02  # the largest share of the time for one scoring of val, or of test
_SAMPLE = 2**20  # characters of a long text from which its size and alphabet are estimated
_MAX_EPOCHS = 40.0
_EVALUATIONS = 20
_PATIENCE = 6  # evaluations without a better val loss that end a training of many epochs


class Size(NamedTuple):
    """The size of a text: its characters, the different ones, and the mean length of its records, if any."""

    characters: int
    classes: int
    record: float | None = None


class Choice(NamedTuple):
    """The chosen values, by section and key, and two lines that say what was chosen and why."""

    values: dict[str, dict[str, Any]]
    lines: list[str]


def plan(
    config: Config,
    given: AbstractSet[str],
    seconds: float,
    threads: int | None = None,
    report: Report = print,
) -> tuple[Config, list[str]]:
    """Return `config` with what a training of so many seconds needs, and two lines about the choice.

    given: the keys, as section.key, that keep their values. threads: as for `choose_threads`.

    The speed of the chosen model is measured in a second, because that of the machine changes.

    Raises `CharlmError` for a text that cannot be read, and `ConfigError` for a time too short to start in.
    """
    started = time.perf_counter()
    size, speeds = text_size(config.corpus), machine_speeds(config.train.device, report)
    config = _with(config, choose(size, seconds, speeds, config, given))
    rate = _measured(config, size, threads)
    spent = time.perf_counter() - started
    choice = choose(size, seconds, speeds, config, {*given, "model.hidden_size"}, rate, spent)
    return _with(config, choice), choice.lines


def _with(config: Config, choice: Choice) -> Config:
    data = config.model_dump(mode="json")
    for section, values in choice.values.items():
        data[section] |= values
    return from_data(data, "")


def choose(
    size: Size,
    seconds: float,
    speeds: Speeds,
    config: Config = Config(),  # noqa: B008 - immutable
    given: AbstractSet[str] = frozenset(),
    rate: float | None = None,
    spent: float = 0.0,
) -> Choice:
    """Return the choice for a text of this size and a time.

    config: what is set before. given: its keys, as section.key, that keep their values.
    rate: the characters per second of the training, if it is known better than by `speeds`.
    spent: seconds that have passed.

    Without a val split no training ends early. Of a text that takes too long to read, the beginning is used;
    the val and test splits are smaller than by default where scoring them would take too long.

    Raises `ConfigError` for a time that is too short to start in.
    """
    if config.train.optimizer != "adamw":
        given = {*given, "train.lr", "train.weight_decay"}
    characters, classes, record = size
    if "corpus.max_chars" not in given:
        characters = min(characters, int(_READ_SHARE * seconds * _READ))
    left = seconds - spent - _START - characters / _READ
    if left < 1:
        least = math.ceil(10 * (seconds - left + 2) / 60) / 10
        raise ConfigError(
            f"--minutes is {seconds / 60:g}, too short for {characters:,} characters on this machine; "
            f"allowed here: {least:g} or more"
        )
    hidden = config.model.hidden_size
    if "model.hidden_size" not in given:
        hidden = _hidden_size(characters, left * _STEPS_SHARE, speeds)
    rate = rate or _rate(speeds, hidden, classes, config.model.num_layers)
    split, share = _split(characters, _SCORED * seconds * _FORWARD * rate, config, given)
    train = characters * share
    epochs = min(left * _STEPS_SHARE * rate / train, _MAX_EPOCHS)
    batches, read = _batches(train, record, config, given)
    steps = max(int(epochs * train / read), 1)
    if "train.max_steps" in given:  # or epochs
        steps = config.train.max_steps or round(config.train.epochs * train / read)
        epochs = steps * read / train
    sections: dict[str, dict[str, Any]] = {
        "corpus": {"split": split, **({"max_chars": characters} if characters < size.characters else {})},
        "batches": batches,
        "model": _model(hidden, epochs),
        "train": _training(hidden, epochs, steps, left, config.corpus.has_val),
    }
    values = {
        section: {key: value for key, value in chosen.items() if f"{section}.{key}" not in given}
        for section, chosen in sections.items()
    }
    return Choice(values, [
        f"budget   {seconds / 60:.3g} minutes at {rate:,.0f} characters a second: {epochs:.3g} epochs of "
        f"{train:,.0f} characters, {steps:,} steps",
        f"         with {', '.join(_shown(key, values, config) for key in ('hidden_size', 'dropout', 'lr'))}",
    ])  # fmt: skip


def _shown(key: str, values: dict[str, dict[str, Any]], config: Config) -> str:
    """Return the name and the value, chosen or set before, of a key of model or train."""
    section = "model" if key in type(config.model).model_fields else "train"
    return f"{key} {values[section].get(key, getattr(getattr(config, section), key)):g}"


def _split(characters: int, scored: float, config: Config, given: AbstractSet[str]) -> tuple[Split, float]:
    """Return the split and the share of train in the text.

    The split is that of `config`, or has parts for val and test of at most `scored` characters.
    """
    corpus = config.corpus
    if "corpus.split" in given or corpus.val or corpus.test:
        _, val, test = corpus.split
        return corpus.split, 1 - (0 if corpus.val else val) - (0 if corpus.test else test)
    part = min(scored / characters, corpus.split[1])
    return (1 - 2 * part, part, part), 1 - 2 * part


def _batches(
    train: float, record: float | None, config: Config, given: AbstractSet[str]
) -> tuple[dict[str, Any], float]:
    """Return the batches for a train split of `train` characters, and the characters that a step reads.

    record: the mean length of the records, if any.
    """
    # Windows for what needs them: records, models that fill in blanks, and settings of windows.
    windows = record or config.model.direction == "both" or given & {f"batches.{key}" for key in _OF_WINDOWS}
    if "batches.sampling" in given:
        windows = config.batches.sampling == "sliding"
    length = min(_LENGTH, max(int(train / 4), 1))
    if "batches.seq_len" in given:
        length = config.batches.seq_len
    most = min(64, _RECORDS / record) if record else _BATCH
    size = max(1, int(min(most, train / (4 * (record or length)))))
    values: dict[str, Any] = {"sampling": "sliding" if windows else "contiguous"}
    values |= {"batch_size": size, "seq_len": length, **({"stride": length} if windows else {})}
    values |= {key: getattr(config.batches, key) for key in values if f"batches.{key}" in given}
    width = record or (values["stride"] if values["sampling"] == "sliding" else length)
    return values, values["batch_size"] * width


def _model(hidden: int, epochs: float) -> dict[str, Any]:
    dropout = _dropout(epochs)
    return {
        "hidden_size": hidden,
        "num_layers": 1,
        "init": "orthogonal",
        "dropout": dropout,
        "weight_dropout": round(min(0.25, 0.7 * dropout), 2) if dropout >= 0.1 else 0.0,
    }


def _training(hidden: int, epochs: float, steps: int, seconds: float, val: bool) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "lr": _lr(hidden, epochs),
        "weight_decay": 0.1,
        "schedule": "one_cycle",
        "warmup": 0.15,
        "ema": 0.999 if steps >= 8000 else None,
        "eval_every": max(steps // _EVALUATIONS, 1),
        "early_stopping": _PATIENCE if val and epochs > 10 else None,
        "time_limit": f"{max(int(seconds), 1)}s",
    }


def _rate(speeds: Speeds, hidden: int, classes: int, layers: int = 1) -> float:
    """Return the characters per second of the training of an LSTM."""
    return interpolated(speeds, hidden) / (6 * (4 * hidden**2 * (2 * layers - 1) + classes * hidden))


def _hidden_size(characters: int, seconds: float, speeds: Speeds) -> int:
    """Return the number of hidden units, a multiple of 64.

    The units grow with the operations to the power of 0.27, and their square not faster than the text.
    """
    best = 64
    for hidden in range(128, 1025, 64):
        wanted = 350 * (interpolated(speeds, hidden) * seconds / 1.3e13) ** 0.27
        if hidden > min(wanted, characters**0.5) + 32:
            break
        best = hidden
    return best


def _dropout(epochs: float) -> float:
    """Return the dropout probability: 0 for less than an epoch, 0.05 for 4, 0.15 for 9 and 0.42 for 36."""
    if epochs < 4:
        return round(0.05 * max(0.0, (epochs - 1) / 3), 2)
    return round(max(0.05 + 0.123 * math.log(epochs / 4), 0.15 + 0.195 * math.log(epochs / 9)), 2)


def _lr(hidden: int, epochs: float) -> float:
    """Return the learning rate: 9e-3 for 384 units and up to 4 epochs, 0.3 times more from 16 on."""
    more = 0.3 * min(max(math.log(max(epochs, 1) / 4) / math.log(4), 0.0), 1.0)
    return float(f"{9e-3 * (1 + more) * (384 / hidden) ** (1 if hidden > 384 else 0.68):.2g}")


def interpolated(speeds: Speeds, hidden: int) -> float:
    """Return the operations per second for `hidden` units, along straight lines between the measured ones."""
    sizes = sorted(speeds)
    if hidden <= sizes[0]:
        return speeds[sizes[0]] * hidden / sizes[0]
    low = max(size for size in sizes[:-1] if size < hidden)
    high = sizes[sizes.index(low) + 1]
    return speeds[low] + (speeds[high] - speeds[low]) * (min(hidden, high) - low) / (high - low)


def text_size(config: CorpusConfig) -> Size:
    """Return the size of the text, of a long one an estimate from its beginning.

    Raises `CharlmError` for a text that cannot be read, and `ConfigError` for a pipe, which cannot be read
    again.
    """
    files = [TextFile(path, encoding=config.encoding) for path in find_files(config.source).files]
    if pipes := [file.path for file in files if not file.regular]:
        raise ConfigError(f"--minutes reads the text twice, and {pipes[0]} can be read once: give it as TEXT")
    total = sum(file.stat.st_size * (3 if file.compressed else 1) for file in files)
    if total <= IN_MEMORY:
        corpus = Corpus.load(config, known=read_vocabulary(config))
        own = () if config.val else corpus.val, () if config.test else corpus.test
        characters = sum(map(len, (corpus.train, *own)))
        ends = corpus.train == corpus.boundary if corpus.boundary is not None else None
        return Size(characters, len(corpus.vocab), None if ends is None else len(ends) / int(ends.sum()))
    sample = ""
    for piece in (piece for file in files for piece in strip_pieces(file.pieces)):
        sample += piece or ""
        if len(sample) >= _SAMPLE:
            break
    size = len(sample.encode(config.encoding if config.encoding != "bytes" else "latin-1", "replace"))
    characters = max(int(total * len(sample) / max(size, 1)), 1)
    record = None
    if config.separator:
        records = [record for found in in_records([sample, config.separator], config) for _, record in found]
        record = sum(map(len, records)) / max(len(records), 1) + 1
    return Size(min(config.max_chars or characters, characters), max(len(set(sample)), 1), record)


def _measured(config: Config, size: Size, threads: int | None) -> float:
    """Return the characters per second of the training of `config`, measured on random text."""
    if size.record:
        length = f"seq_len={max(round(size.record), 1)}"
        config = override(config, ["records=null", "sampling=contiguous", length])
    state, before = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(choose_threads(threads, config.model, config.batches.batch_size)[0])
    learner = make_learner(config)
    training_rate(learner, 0.0)  # compiles
    rates, started = [training_rate(learner, _MEASURED / 2)], time.perf_counter()
    while len(rates) < 5 and time.perf_counter() - started < 2 * _MEASURED:  # a step can take seconds
        rates.append(training_rate(learner, _MEASURED / 2))
    rate = statistics.median(rates)
    torch.set_rng_state(state)
    torch.set_num_threads(before)
    known = operations(learner.model)
    more = (size.classes - len(learner.corpus.vocab)) * learner.model.head.in_features
    return rate * known / (known + 6 * more)


def machine_speeds(device: str = "auto", report: Report = lambda line: None) -> Speeds:
    """Return the operations per second of trainings on this machine, measured once in some seconds.

    They are remembered in the cache folder, by processor, number of threads, device, implementation and
    versions. The caller has called `native.keep_memory`, as a training does.
    """
    implementation = choose_implementation(Config().model, choose_device(device))[0]
    kind = f"{machine().rpartition(',')[0]}, {device}, {implementation}, charlm {__version__}"
    folder = cache_folder()
    path = folder and folder / f"speeds-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.json"
    if path:
        with suppress(OSError, ValueError, TypeError, AttributeError):
            found = {int(size): float(speed) for size, speed in json.loads(path.read_bytes()).items()}
            if tuple(found) == _SIZES and all(speed > 0 and math.isfinite(speed) for speed in found.values()):
                return found
    report("measuring the speed of this machine, once")
    speeds = {}
    state = torch.get_rng_state()
    for size in _SIZES:
        settings = [f"hidden_size={size}", f"batch_size={_BATCH}", "sampling=contiguous", f"device={device}"]
        learner = make_learner(override(Config(), [*settings, "schedule=constant"]))
        training_rate(learner, 0.0)  # compiles
        speeds[size] = training_rate(learner, _MEASURED) * operations(learner.model)
    torch.set_rng_state(state)
    if path:
        content = json.dumps(speeds)
        with suppress(OSError, CharlmError):
            write_atomically(path, lambda file: file.write_text(content))
    return speeds
