"""The configuration: every key with its type, range, default and meaning, in one table.

A configuration is the defaults, overlaid by a YAML recipe, overlaid by ``--set key=value``. All errors in it
are reported at once. `charlm config`, the README, docs/reference.md and the shell's completion show the table
as `reference` gives it. Only this module reads and writes YAML.
"""

import codecs
import difflib
import itertools
import json
import math
import re
import warnings
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from charlm.errors import ConfigError, one_line


def shipped(folder: str) -> Path:
    """Return the folder ``configs`` or ``data``, inside the installed package or at the top of a checkout."""
    package = Path(__file__).parent
    return package / folder if (package / folder).is_dir() else package.parents[1] / folder


class Section(BaseModel):
    """A group of keys: types are not converted, unknown keys are errors, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Upper bounds far beyond any use keep the numbers computed from these inside 64 bits.
Positive = Annotated[int, Field(ge=1, le=10**12)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Depth = Annotated[int, Field(ge=1, le=1000)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UpToOne = Annotated[float, Field(ge=0, le=1)]
Split = Annotated[tuple[float, float, float], Field(strict=False)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
_TIME = r"^(\d+(?:\.\d+)?) ?(s|min|h)$"
Time = Annotated[str, Field(pattern=_TIME)]
Direction = Literal["forward", "backward", "both"]
Implementation = Literal["auto", "scratch", "builtin", "fused"]
Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "adadelta"]
Schedule = Literal["constant", "cosine", "one_cycle", "step", "plateau"]
Initial = Literal["default", "xavier", "orthogonal", "normal"]
Precision = Literal["auto", "float32", "bfloat16"]
Forcing = Literal["linear", "exponential", "inverse_sigmoid"]


def _known_encoding(name: str) -> str:
    try:
        if name != "bytes":
            "".encode(name)  # raises for the codecs that do not encode text
            codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        raise PydanticCustomError("encoding", "unknown encoding") from None
    return name


Encoding = Annotated[str, AfterValidator(_known_encoding)]


def _key(default: Any, description: str) -> Any:
    """A field; its type says what is allowed, `description` what it means, in one line."""
    return Field(default, description=description)


class CorpusConfig(Section):
    """The text: where it is, how it is cleaned and how it is split."""

    source: str | list[str] = _key("sancho", "bundled corpus, file, folder or glob, or a list of these")
    encoding: Encoding = _key("utf-8", "text encoding, any of Python's; bytes: each byte is a character")
    start: str | None = _key(None, "skip the text before these words; null: skip nothing")
    normalize: Literal["NFC", "NFD", "NFKC", "NFKD", "none"] = _key("NFC", "Unicode normal form")
    lowercase: bool = _key(False, "convert the text to lower case")
    keep: str | None = _key(None, 'characters to keep, as "A-Za-zñ"; each run of others becomes one space')
    split: Split = _key(
        (0.9, 0.05, 0.05), "fractions of the text for train, val and test; val and test may be 0"
    )
    val: str | list[str] | None = _key(None, "another text for val, as source; null: the part in split")
    test: str | list[str] | None = _key(None, "another text for test, as source; null: the part in split")
    max_chars: Positive | None = _key(None, "use only this many characters of source; null: all")
    min_count: Positive = _key(1, "characters that occur fewer times in train become one, the unknown")
    vocabulary: str | None = _key(
        None, "text file whose characters are the vocabulary, or a model or run; null: those of train"
    )
    records: str | None = _key(
        None, "line, or the delimiter: the text is a list, shuffled and read one by one; null: one text"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "CorpusConfig":
        train, val, test = self.split
        whole = math.isclose(train + val + test, 1, abs_tol=1e-6)
        if not (train > 0 and val >= 0 and test >= 0 and whole):
            raise ValueError(
                f"split is {list(self.split)}; allowed: fractions for train, val and test that add up to 1, "
                "train above 0, for example [0.9, 0.05, 0.05]"
            )
        if self.keep is not None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # about [ in a class, which is allowed
                    re.compile(f"[^{self.keep}]+")
                if not re.fullmatch(r"\]?(\\.|[^]\\])*", self.keep, re.S):
                    raise re.error("write \\] for a ] that is not the first")
            except re.error as error:
                raise ValueError(
                    f"keep is {self.keep!r}, which is not the inside of a character class ({error}); "
                    'write for example "A-Za-z"'
                ) from None
        changed = self.lowercase or (self.keep, self.min_count, self.vocabulary) != (None, 1, None)
        if self.encoding == "bytes" and changed:
            raise ValueError(
                "encoding: bytes needs lowercase: false, keep: null, min_count: 1 and vocabulary: null"
            )
        too_high = self.encoding == "bytes" and self.records and max(self.records) > "\xff"
        if self.records is not None and (not self.records or "\r" in self.records or too_high):
            raise ValueError(f"records is {self.records!r}; allowed: {_FORMS['corpus.records']}")
        if not self.source or (isinstance(self.source, list) and not all(self.source)):
            raise ValueError(
                "source is empty; allowed: a bundled corpus, a file, a folder, a glob or a list of these"
            )
        return self

    @property
    def has_val(self) -> bool:
        """Whether there is a val split."""
        return self.split[1] > 0 or bool(self.val)

    @property
    def separator(self) -> str | None:
        """The text at which records are split; None for a text that is not a list of records."""
        return "\n" if self.records == "line" else self.records

    @property
    def boundary(self) -> str | None:
        """The character that follows each record; None for a text that is not a list of records.

        For a delimiter it is U+001E, the record separator, so that records can contain line ends.
        """
        return {None: None, "line": "\n"}.get(self.records, "\x1e")

    @property
    def cleaning(self) -> dict[str, Any]:
        """The arguments of `charlm.text.clean.clean`; bytes stay as they are."""
        normalize = "none" if self.encoding == "bytes" else self.normalize
        return {"normalize": normalize, "lowercase": self.lowercase, "keep": self.keep}


class BatchesConfig(Section):
    """How the encoded text becomes batches of shape (B, T)."""

    sampling: Literal["sliding", "contiguous"] = _key("sliding", "windows, or streams that carry the state")
    batch_size: Positive = _key(32, "sequences per step and process (B)")
    seq_len: Positive = _key(64, "characters per sequence, through which the gradient flows back (T)")
    stride: Positive = _key(64, "sliding: characters from the start of one window to the next")
    shuffle: bool = _key(True, "sliding: read the windows in random order")
    truncation: Literal["fixed", "random"] = _key(
        "fixed", "contiguous: fixed sequence lengths, or random ones around seq_len"
    )
    max_train_windows: Positive | None = _key(None, "sliding: use only this many windows; null: all")
    max_val_windows: Positive | None = _key(None, "evaluate only this many windows of val; null: all")

    @model_validator(mode="after")
    def _consistent(self) -> "BatchesConfig":
        if self.sampling == "contiguous" and self.max_train_windows:
            raise ValueError(
                "max_train_windows needs sampling: sliding; with contiguous, set corpus.max_chars"
            )
        if self.sampling == "sliding" and self.truncation == "random":
            raise ValueError("truncation: random needs sampling: contiguous")
        return self


# The values of `model.cell`, to which `nn.cells.register` appends. They are listed here because they are
# needed before torch is imported.
CELL_NAMES = ["rnn", "lstm", "gru"]


def _known_cell(name: str) -> str:
    if name not in CELL_NAMES:
        raise PydanticCustomError("cell", "unknown cell")
    return name


Cell = Annotated[str, AfterValidator(_known_cell), WithJsonSchema({"type": "string", "enum": CELL_NAMES})]


class ModelConfig(Section):
    """The network: input, recurrent stack, linear head."""

    cell: Cell = _key("lstm", "recurrent cell")
    direction: Direction = _key("forward", "reading direction; both: a model that fills in blanks")
    implementation: Implementation = _key("auto", "implementation of the layers; auto: the fastest here")
    input: Literal["embedding", "one_hot"] = _key("embedding", "how a character enters the network")
    embedding_size: Width = _key(64, "size of the embedding")
    hidden_size: Width = _key(192, "units per recurrent layer (H)")
    num_layers: Depth = _key(1, "recurrent layers (L)")
    dropout: Fraction = _key(0.1, "dropout probability on the output of every recurrent layer")
    locked_dropout: bool = _key(False, "use one dropout mask for all steps of a sequence")
    weight_dropout: Fraction = _key(0.0, "dropout probability on the recurrent weight matrices")
    embedding_dropout: Fraction = _key(0.0, "probability of dropping a character everywhere in the batch")
    nonlinearity: Literal["tanh", "relu"] = _key("tanh", "rnn: activation function")
    gru_reset: Literal["after", "before"] = _key(
        "after", "gru: reset gate after the recurrent product, as torch, or before it, as Cho et al. 2014"
    )
    tie_weights: bool = _key(False, "share one matrix between the embedding and the output layer")
    init: Initial = _key("default", "initial weights; default: torch's, normal: N(0, 0.01²)")
    forget_bias: Finite | None = _key(1.0, "lstm: initial bias of the forget gate; null: as init gives it")

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.cell == "gru" and self.gru_reset == "before" and self.implementation in ("builtin", "fused"):
            raise ValueError(
                "gru_reset: before needs implementation: scratch or auto; torch computes after only"
            )
        if self.tie_weights and self.direction == "both":
            raise ValueError("tie_weights: true needs direction: forward or backward")
        if self.tie_weights and (self.input != "embedding" or self.embedding_size != self.hidden_size):
            raise ValueError(
                "tie_weights: true needs input: embedding and embedding_size equal to hidden_size "
                f"(they are {self.embedding_size} and {self.hidden_size})"
            )
        return self


class TrainConfig(Section):
    """The optimisation, its budget, and what is reported and saved on the way."""

    epochs: Positive = _key(18, "passes over the train split")
    max_steps: Positive | None = _key(None, "optimiser steps in place of epochs; null: epochs counts")
    time_limit: Time | None = _key(None, "end the training after this time, as 30min; null: never")
    init_from: str | None = _key(None, "a model whose weights are the first ones; null: random weights")
    loss_on: Literal["all", "last"] = _key("all", "steps of a sequence that count in the loss")
    teacher_forcing: UpToOne = _key(1.0, "fraction of true characters as input at the end of training")
    teacher_forcing_schedule: Forcing = _key("linear", "decrease of teacher_forcing from 1")
    optimizer: Optimizer = _key("adamw", "optimiser")
    lr: PositiveFloat = _key(8e-3, "learning rate, the largest of the schedule")
    weight_decay: NonNegative = _key(0.0, "weight decay of matrices; biases have none")
    momentum: Fraction = _key(0.0, "sgd, rmsprop: momentum")
    betas: Betas = _key((0.9, 0.99), "adam, adamw: decay rates of the averages of gradient and square")
    schedule: Schedule = _key("one_cycle", "learning rate over the run")
    warmup: Fraction = _key(0.1, "cosine, one_cycle: fraction of the steps with a rising learning rate")
    min_lr: Fraction = _key(0.01, "cosine, one_cycle, plateau: last learning rate, as a fraction of lr")
    step_epochs: Positive = _key(1, "step: epochs between two multiplications of the learning rate by decay")
    decay: Annotated[float, Field(gt=0, le=1)] = _key(0.5, "step, plateau: factor of the learning rate")
    plateau_patience: Positive = _key(2, "plateau: evaluations without a better val loss before the decay")
    clip: Literal["norm", "value", "none"] = _key("norm", "clip the norm of all gradients or each value")
    clip_value: PositiveFloat = _key(1.0, "largest gradient norm or value")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = _key(
        None, "decay of an average of the weights to evaluate and save, as 0.999; null: no average"
    )
    early_stopping: Positive | None = _key(
        None, "stop after this many evaluations without a better val loss; null: never"
    )
    eval_every: Positive | None = _key(None, "steps between evaluations; null: one epoch")
    log_every: Positive = _key(100, "steps between the rows of the log that are not evaluations")
    checkpoint_every: Positive | Time | None = _key(
        None, "steps or time between saves, as 500, 30s, 10min, 2h; null: at evaluations only"
    )
    keep_last: Positive = _key(1, "saves to keep, for --at and for `charlm generate`")
    max_bad_steps: Positive = _key(10, "steps in a row with a loss or gradient not finite before a rollback")
    max_rollbacks: Count = _key(3, "rollbacks, each with half the learning rate, before the run stops")
    sample_chars: Count = _key(0, "characters of text to show after each evaluation")
    tensorboard: bool = _key(False, "write TensorBoard files too (needs the extra `tensorboard`)")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = _key(1, "seed of all random numbers")
    device: str = _key("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    precision: Precision = _key("auto", "of matrix products; auto: bfloat16 where the processor has it")

    @property
    def checkpoint_steps(self) -> int | None:
        """`checkpoint_every` if it is a number of steps, else None."""
        return None if isinstance(self.checkpoint_every, str) else self.checkpoint_every

    @property
    def checkpoint_seconds(self) -> float | None:
        """`checkpoint_every` in seconds if it is a time, else None."""
        return _seconds(self.checkpoint_every) if isinstance(self.checkpoint_every, str) else None

    @property
    def time_limit_seconds(self) -> float:
        """`time_limit` in seconds; without one, infinity."""
        return math.inf if self.time_limit is None else _seconds(self.time_limit)


def _seconds(time: str) -> float:
    number, unit = re.fullmatch(_TIME, time).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


class Config(Section):
    """A whole configuration."""

    corpus: CorpusConfig = CorpusConfig()
    batches: BatchesConfig = BatchesConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.model.direction == "both":
            needed: dict[str, tuple[Any, Any]] = {
                "batches.sampling": ("sliding", self.batches.sampling),
                "train.loss_on": ("all", self.train.loss_on),
                "train.teacher_forcing": (1.0, self.train.teacher_forcing),
            }
            _refuse_others("model.direction: both", needed)
        if self.corpus.records is not None:
            needed = {
                "model.direction": ("forward", self.model.direction),
                "batches.sampling": ("sliding", self.batches.sampling),
                "batches.shuffle": ("true", json.dumps(self.batches.shuffle)),
                "batches.max_train_windows": ("null", json.dumps(self.batches.max_train_windows)),
                "batches.max_val_windows": ("null", json.dumps(self.batches.max_val_windows)),
                "train.loss_on": ("all", self.train.loss_on),
                "train.teacher_forcing": (1.0, self.train.teacher_forcing),
            }
            _refuse_others("corpus.records", needed)
        if self.train.init_from is not None and self.corpus.vocabulary is not None:
            raise ValueError(
                "train.init_from keeps the characters of its model and adds new ones: set corpus.vocabulary "
                "to null, or train.init_from"
            )
        using = {
            "train.early_stopping": self.train.early_stopping,
            "train.schedule: plateau": self.train.schedule == "plateau",
        }
        if not self.corpus.has_val and (found := [name for name, used in using.items() if used]):
            raise ValueError(
                f"{' and '.join(found)} needs a val split: a val part in corpus.split, or corpus.val"
            )
        return self


def _refuse_others(what: str, needed: dict[str, tuple[Any, Any]]) -> None:
    """Raise ValueError with the keys of `needed` whose value, the second, is not the first."""
    if wrong := [f"{key}: {want}" for key, (want, have) in needed.items() if want != have]:
        raise ValueError(f"{what} needs {', '.join(wrong)}")


_SECTIONS: dict[str, type[Section]] = {name: type(section) for name, section in Config()}
KEYS = [f"{section}.{name}" for section, model in _SECTIONS.items() for name in model.model_fields]


class Setting(NamedTuple):
    """A key in the form that people read. choices: the allowed values where they are names, else empty."""

    key: str
    default: Any
    allowed: str
    description: str
    choices: tuple[str, ...]

    @property
    def default_text(self) -> str:
        """The default as YAML."""
        return self.default if isinstance(self.default, str) else json.dumps(self.default)


def reference(names: Iterable[str] = ()) -> list[Setting]:
    """Return the table of the configuration, or the part that `names`, sections or keys, select.

    Raises `ConfigError` for a name of neither.
    """
    keys: list[str] = []
    for name in names:
        keys += [key for key in KEYS if key.startswith(f"{name}.")] or [find_key(name)]
    defaults, rows = Config().model_dump(mode="json"), []
    schemas = {section: model.model_json_schema()["properties"] for section, model in _SECTIONS.items()}
    for section, name in (key.split(".") for key in dict.fromkeys(keys or KEYS)):
        schema, key = schemas[section][name], f"{section}.{name}"
        choices = tuple(schema.get("enum", ()))
        allowed = _FORMS.get(key) or _allowed(schema)
        rows.append(Setting(key, defaults[section][name], allowed, schema["description"], choices))
    return rows


def find_key(name: str) -> str:
    """Return the full key for `name`: ``section.key``, or ``key`` alone where one section only has it.

    Raises `ConfigError` that names the nearest keys, or those of which `name` could be each.
    """
    found = [key for key in KEYS if name in (key, key.partition(".")[2])]
    if len(found) > 1:
        raise ConfigError(f"{name!r} is a key of several sections; write {' or '.join(found)}")
    if not found:
        keys = [*_SECTIONS, *(key.partition(".")[2] for key in KEYS), *KEYS]
        keys = [each for each in keys if each != name]  # a section is not a key
        near = _nearest(name, keys, f"; allowed: {', '.join(_SECTIONS)}")
        raise ConfigError(f"unknown key {one_line(repr(name))}{near}")
    return found[0]


_FORMS = {  # of values that a type says less well
    "corpus.encoding": "utf-8, another of Python's encodings, as windows-1252, or bytes",
    "corpus.split": "three numbers that add up to 1, as [0.9, 0.05, 0.05]",
    "corpus.records": 'line, a delimiter in double quotes, as "\\n\\n", or null',
    "train.betas": "two numbers >= 0 and < 1, as [0.9, 0.99]",
    "train.checkpoint_every": "integer >= 1, a time as 30s, 10min, 2h, or null",
    "train.time_limit": "a time as 30s, 10min, 2h, or null",
}
_LARGE = {10**12: "10^12", 2**20: "2^20", 2**63: "2^63"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _allowed(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(map(_allowed, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(schema["enum"])
    kinds = {"string": "text", "boolean": "true or false", "array": "list of text"}
    kind = kinds.get(schema["type"], schema["type"])
    bounds = [(sign, schema[word]) for word, sign in _BOUNDS.items() if word in schema]
    limits = " and ".join(f"{sign} {_LARGE.get(value) or format(value, 'g')}" for sign, value in bounds)
    return f"{kind} {limits}".strip()


_LISTED = 20  # errors of a configuration that a message lists
_MERGE = "tag:yaml.org,2002:merge"
_MAX_YAML = 2**20  # characters, with what aliases stand for written out


class _Loader(yaml.SafeLoader):
    """YAML that reads 2e-3 as a number (YAML 1.2 does, PyYAML's 1.1 does not) and refuses double keys.

    A few aliases of aliases can expand to gigabytes (the "billion laughs") when they are merged or printed.
    The expanded size is therefore limited before any value is constructed.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.size = 0
        self.sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; counts its characters, those of an alias as those of its target."""
        before, is_alias = self.size, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None
        if is_alias:
            self.size += self.sizes.get(node, _MAX_YAML)  # no size yet: an alias inside its own target
        else:
            self.size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            self.sizes[node] = self.size - before
        if self.size > _MAX_YAML:
            problem = f"with its aliases expanded it has more than {_MAX_YAML:,} characters"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the dictionary of a node; raises an error for a key that occurs twice."""
        seen = set()
        for key_node in [key for key, _ in node.value if key.tag != _MERGE]:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                problem = f"the key {key!r} occurs twice, or is a list or a mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of the YAML `text`; raises `ConfigError`, which names `where`, for invalid YAML."""
    if len(text) > _MAX_YAML:
        raise ConfigError(f"{where} has {len(text):,} characters or more; allowed: {_MAX_YAML:,}")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ConfigError(f"{where} is not valid YAML{line}: {problem}") from None


def read_yaml(path: Path) -> Any:
    """Return the value of the YAML file at `path`; raises `ConfigError` if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MAX_YAML + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    return parse_yaml(text, str(path))


def to_yaml(config: Config) -> str:
    """Return `config` as YAML, from which `load` makes an equal one."""
    dump = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    return str(dump)


def from_data(data: Any, where: str, overrides: Iterable[str] = ()) -> Config:
    """Return the configuration in `data`, nested dictionaries as YAML or JSON give them.

    overrides: ``section.key=value`` texts, or ``key=value`` where only one section has the key.
    Raises `ConfigError` that lists every error; `where` names the origin of `data`.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where} is {one_line(repr(data))}; allowed: a mapping with the sections {', '.join(_SECTIONS)}"
        )
    data = _overlay(data, overrides)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        problems = list(itertools.islice(_explain(error, data), _LISTED))
    if len(problems) > 1:
        problems.insert(0, f"{len(problems)} errors")
    raise ConfigError(f"{where}: ".removeprefix(": ") + "\n  ".join(problems))


def load(
    recipe: str | None, overrides: Iterable[str] = (), values: dict[str, dict[str, Any]] | None = None
) -> Config:
    """Return the defaults, overlaid by the recipe named `recipe`, by `values`, and by ``key=value`` texts.

    values: by section and key.
    """
    path = None if recipe is None else find_recipe(recipe)
    data = {} if path is None else read_yaml(path)
    data = {} if data is None else data
    if values and isinstance(data, dict):
        for section, keys in values.items():
            if isinstance(before := data.get(section) or {}, dict):
                data = {**data, section: {**before, **keys}}
    return from_data(data, str(path or ""), overrides)


def override(config: Config, overrides: Iterable[str]) -> Config:
    """Return `config` overlaid by ``key=value`` texts."""
    return from_data(config.model_dump(mode="json"), "", overrides)


def recipes() -> list[str]:
    """Return the names of the recipes in ./configs and of those that ship with charlm."""
    folders = (Path("configs"), shipped("configs"))
    return sorted({path.relative_to(each).as_posix() for each in folders for path in each.rglob("*.yaml")})


def find_recipe(name: str) -> Path:
    """Return the path of a recipe: `name` itself, else in ./configs, else among those that ship with charlm.

    Raises `ConfigError` with the nearest name if there is none.
    """
    for folder in (Path(), Path("configs"), shipped("configs")):
        for candidate in (name, f"{name}.yaml"):
            if (folder / candidate).is_file():
                return folder / candidate
    known = recipes()
    raise ConfigError(
        f"no recipe {name!r}, neither a file nor in ./configs"
        + _nearest(name, known, f"; allowed: {', '.join(known)}")
    )


def _overlay(data: dict[Any, Any], overrides: Iterable[str]) -> dict[Any, Any]:
    """`data` overlaid by ``key=value`` texts."""
    data = {section: {} if values is None else values for section, values in data.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {text!r} is not of the form KEY=VALUE, for example lr=2e-3")
        name = name.strip()
        section, _, key = (name if "." in name else find_key(name)).partition(".")
        values = data.setdefault(section, {})
        if isinstance(values, dict):
            data[section] = {**values, key: parse_yaml(value, f"--set {text!r}")}
    return data


def _nearest(name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """A suggestion: the same key in another section, else the nearest spelling, else `otherwise`."""
    elsewhere = [key for key in candidates if key.endswith(f".{name}")]
    near = elsewhere or difflib.get_close_matches(name, candidates, n=1)
    return f"; did you mean {near[0]}?" if near else otherwise


def _explain(errors: ValidationError, data: dict[str, Any]) -> Iterator[str]:
    """Each wrong section or key once, with its value and the allowed values."""
    for place, error in {error["loc"][:2]: error for error in errors.errors()}.items():
        section, *keys = map(str, place) if place else [""]
        name = ".".join([section, *keys])
        if error["type"] == "value_error":  # raised by a section, whose message begins with the key
            yield f"{name}.{error['msg'].removeprefix('Value error, ')}".removeprefix(".")
        elif error["type"] in ("extra_forbidden", "invalid_key"):
            known = [*(_SECTIONS[section].model_fields if keys else _SECTIONS)]
            near = _nearest(str(place[-1]), [*known, *KEYS], f"; allowed: {', '.join(known)}")
            yield f"unknown {'key' if keys else 'section'} {one_line(repr(name))}{near}"
        elif not keys:
            yield f"{name} is {one_line(repr(data[section]))}; allowed: a mapping of keys to values"
        else:
            (row,), value = reference([name]), data[section][keys[0]]
            near = _nearest(str(value), row.choices)
            yield f"{name} is {one_line(repr(value))}; allowed: {row.allowed}{near}"
