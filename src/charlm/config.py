"""The one table of defaults: what can be configured, its types, ranges and defaults.

A configuration is the defaults, overlaid by a YAML recipe, overlaid by ``--set section.key=value``.
Every problem in it is reported at once. Only this module knows YAML.
"""

import difflib
import itertools
import math
import re
import warnings
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from charlm.errors import ConfigError

PACKAGE = Path(__file__).parent


def shipped(folder: str) -> Path:
    """The folder ``configs`` or ``data``: inside the installed package, or at the top of a checkout."""
    packaged = PACKAGE / folder
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / folder


class Section(BaseModel):
    """Strict, closed and frozen: no silent conversions, no unknown keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Bounds that nobody meets, so that what is computed from them fits into 64 bits.
Positive = Annotated[int, Field(gt=0, le=10**12)]
Width = Annotated[int, Field(gt=0, le=2**20)]
Depth = Annotated[int, Field(gt=0, le=1000)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
_TIME = r"^(\d+(?:\.\d+)?) ?(s|min|h)$"


class CorpusConfig(Section):
    """What text is read, how it is cleaned and how it is split."""

    source: str | list[str] = "sancho"
    start: str | None = None
    normalize: Literal["NFC", "NFD", "NFKC", "NFKD", "none"] = "NFC"
    lowercase: bool = False
    keep: str | None = None
    split: Annotated[tuple[float, float, float], Field(strict=False)] = (0.9, 0.05, 0.05)
    max_chars: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CorpusConfig":
        train, val, test = self.split
        if not (train > 0 and val > 0 and test >= 0 and math.isclose(train + val + test, 1, abs_tol=1e-6)):
            raise ValueError(
                f"split {list(self.split)} must be the shares of train, val and test: "
                "train and val above 0, test 0 or more, adding up to 1, for example [0.9, 0.05, 0.05]"
            )
        if self.keep is not None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # of [ in a class, which one may keep
                    re.compile(f"[^{self.keep}]+")
                if not re.fullmatch(r"\]?(\\.|[^]\\])*", self.keep, re.S):
                    raise re.error("a ] that is not the first must be written \\]")
            except re.error as error:
                raise ValueError(
                    f"keep {self.keep!r} is not the inside of a character class ({error}); "
                    'write for example "A-Za-z"'
                ) from None
        if not self.source or (isinstance(self.source, list) and not all(self.source)):
            raise ValueError(
                "source is empty; name a bundled corpus, a file, a folder, a glob or a list of them"
            )
        return self

    @property
    def cleaning(self) -> dict[str, Any]:
        """The arguments of `text.clean`."""
        return {"normalize": self.normalize, "lowercase": self.lowercase, "keep": self.keep}


class BatchesConfig(Section):
    """How the encoded text becomes batches of shape (B, T)."""

    sampling: Literal["sliding", "contiguous"] = "sliding"
    batch_size: Positive = 32
    seq_len: Positive = 64
    stride: Positive = 64
    shuffle: bool = True
    truncation: Literal["fixed", "random"] = "fixed"
    max_train_windows: Positive | None = None
    max_val_windows: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "BatchesConfig":
        if self.sampling == "contiguous" and self.max_train_windows:
            raise ValueError(
                "max_train_windows counts sliding windows; with sampling: contiguous use corpus.max_chars"
            )
        if self.sampling == "sliding" and self.truncation == "random":
            raise ValueError("truncation: random cuts streams; it needs sampling: contiguous")
        return self


# The values of `model.cell`, to which `nn.cells.register` appends. They are listed here because they are
# needed before torch is imported.
CELL_NAMES = ["rnn", "lstm", "gru"]


def _known_cell(name: str) -> str:
    if name not in CELL_NAMES:
        *others, last = map(repr, CELL_NAMES)
        near = difflib.get_close_matches(name, CELL_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise PydanticCustomError("cell", f"{', '.join(others)} or {last}{hint}")
    return name


class ModelConfig(Section):
    """The network: input, recurrent stack, linear head."""

    cell: Annotated[str, AfterValidator(_known_cell)] = "lstm"
    direction: Literal["forward", "backward", "both"] = "forward"
    implementation: Literal["auto", "scratch", "builtin", "fused"] = "auto"
    input: Literal["embedding", "one_hot"] = "embedding"
    embedding_size: Width = 64
    hidden_size: Width = 192
    num_layers: Depth = 1
    dropout: Share = 0.1
    locked_dropout: bool = False
    weight_dropout: Share = 0.0
    embedding_dropout: Share = 0.0
    nonlinearity: Literal["tanh", "relu"] = "tanh"
    gru_reset: Literal["after", "before"] = "after"
    tie_weights: bool = False
    init: Literal["default", "xavier", "orthogonal", "normal"] = "default"
    forget_bias: Annotated[float, Field(allow_inf_nan=False)] | None = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.cell == "gru" and self.gru_reset == "before" and self.implementation in ("builtin", "fused"):
            raise ValueError(
                "gru_reset: before is not what torch computes; it needs implementation: scratch or auto"
            )
        if self.tie_weights and self.direction == "both":
            raise ValueError("tie_weights does not go with direction: both, whose head reads two states")
        if self.tie_weights and (self.input != "embedding" or self.embedding_size != self.hidden_size):
            raise ValueError(
                "tie_weights needs input: embedding and embedding_size equal to hidden_size "
                f"(they are {self.embedding_size} and {self.hidden_size})"
            )
        return self


class TrainConfig(Section):
    """The optimisation, its budget, and what is reported and saved on the way."""

    epochs: Positive = 18
    max_steps: Positive | None = None
    loss_on: Literal["all", "last"] = "all"
    teacher_forcing: Annotated[float, Field(ge=0, le=1)] = 1.0
    teacher_forcing_schedule: Literal["linear", "exponential", "inverse_sigmoid"] = "linear"
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "adadelta"] = "adamw"
    lr: PositiveFloat = 8e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    momentum: Share = 0.0
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.99)
    schedule: Literal["constant", "cosine", "one_cycle", "step", "plateau"] = "one_cycle"
    warmup: Share = 0.1
    min_lr: Share = 0.01
    step_epochs: Positive = 1
    decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    plateau_patience: Positive = 2
    clip: Literal["norm", "value", "none"] = "norm"
    clip_value: PositiveFloat = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    early_stopping: Positive | None = None
    eval_every: Positive | None = None
    checkpoint_every: Positive | Annotated[str, Field(pattern=_TIME)] | None = None
    keep_last: Positive = 1
    max_bad_steps: Positive = 10
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    sample_chars: Annotated[int, Field(ge=0)] = 0
    tensorboard: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def checkpoint_steps(self) -> int | None:
        """`checkpoint_every` where it is in steps."""
        return None if isinstance(self.checkpoint_every, str) else self.checkpoint_every

    @property
    def checkpoint_seconds(self) -> float | None:
        """`checkpoint_every` where it is a time."""
        if not isinstance(self.checkpoint_every, str):
            return None
        number, unit = re.fullmatch(_TIME, self.checkpoint_every).groups()  # type: ignore[union-attr]
        return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


class Config(Section):
    """Everything a run is made from."""

    corpus: CorpusConfig = CorpusConfig()
    batches: BatchesConfig = BatchesConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.model.direction == "both":
            needed = {
                "batches.sampling": ("sliding", self.batches.sampling),
                "train.loss_on": ("all", self.train.loss_on),
                "train.teacher_forcing": (1.0, self.train.teacher_forcing),
            }
            wrong = [f"{key}: {want}" for key, (want, have) in needed.items() if want != have]
            if wrong:
                raise ValueError(f"model.direction: both fills in characters; it needs {', '.join(wrong)}")
        return self


_LISTED = 20  # problems of a configuration that are named
_QUOTES = "'\""
_MERGE = "tag:yaml.org,2002:merge"
_MAX_YAML = 2**20  # characters, with what aliases stand for written out


class _Loader(yaml.SafeLoader):
    """YAML that reads 2e-3 as a number (YAML 1.2 does, PyYAML's 1.1 does not) and refuses double keys.

    A few aliases of aliases can stand for gigabytes (the "billion laughs"), which merging and showing them
    would write out: such a text is refused before anything is made of it.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.size = 0
        self.sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; counts its characters, an alias as what it stands for."""
        before, is_alias = self.size, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if is_alias:
            self.size += self.sizes.get(node, _MAX_YAML)  # none yet where an alias stands in what it names
        else:
            self.size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            self.sizes[node] = self.size - before
        if self.size > _MAX_YAML:
            problem = f"with its aliases written out it has more than {_MAX_YAML:,} characters"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dictionary, no key of which may stand twice."""
        seen = set()
        for key_node in [key for key, _ in node.value if key.tag != _MERGE]:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no key", node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` holds; `where` names it in the `ConfigError` for text that is no YAML."""
    if len(text) > _MAX_YAML:
        raise ConfigError(f"{where} has {len(text):,} characters or more; at most {_MAX_YAML:,} are read")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ConfigError(f"{where} is not valid YAML{line}: {problem}") from None


def read_yaml(path: Path) -> Any:
    """The value in the YAML file at `path`; raises `ConfigError` for what cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MAX_YAML + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    return parse_yaml(text, str(path))


def to_yaml(config: Config) -> str:
    """`config` as a YAML text that `load` reads back to an equal one."""
    dump = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    return str(dump)


def from_data(data: Any, where: str, overrides: Iterable[str] = ()) -> Config:
    """The configuration in `data`, nested dictionaries as YAML or JSON give them.

    overrides: ``section.key=value`` texts laid on top.
    Raises `ConfigError` that lists every problem; `where` names the origin.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where}: {_shown(data)} must be a mapping with the sections {', '.join(_SECTIONS)}"
        )
    data = _overlay(data, overrides)
    problems = list(itertools.islice(_misplaced(data), _LISTED))
    known = {
        section: {key: value for key, value in values.items() if key in _SECTIONS[section].model_fields}
        for section, values in data.items()
        if section in _SECTIONS and isinstance(values, dict)
    }
    try:
        config = Config.model_validate(known)
    except ValidationError as error:
        problems += _explain(error, known)
    if len(problems) == 1:
        raise ConfigError(f"{where}: {problems[0]}".removeprefix(": "))
    if problems:
        raise ConfigError(
            f"{where}: {len(problems)} problems".removeprefix(": ") + "".join(f"\n  {p}" for p in problems)
        )
    return config


def load(recipe: str | None, overrides: Iterable[str] = ()) -> Config:
    """The defaults, overlaid by the recipe named `recipe`, overlaid by ``section.key=value`` texts."""
    if recipe is None:
        return from_data({}, "", overrides)
    path = find_recipe(recipe)
    data = read_yaml(path)
    return from_data({} if data is None else data, str(path), overrides)


def override(config: Config, overrides: Iterable[str]) -> Config:
    """`config` with the ``section.key=value`` texts laid on top."""
    return from_data(config.model_dump(mode="json"), "", overrides)


def find_recipe(name: str) -> Path:
    """`name` as a path, else in ./configs, else among the recipes that ship with charlm."""
    names = [name] if name.endswith((".yaml", ".yml")) else [name, f"{name}.yaml"]
    for folder in (Path(), Path("configs"), shipped("configs")):
        for candidate in names:
            if (folder / candidate).is_file():
                return folder / candidate
    known = sorted(str(path.relative_to(shipped("configs"))) for path in shipped("configs").rglob("*.yaml"))
    raise ConfigError(
        f"no recipe {name!r}, neither as a file nor in ./configs" + _nearest(name, known, known)
    )


def _overlay(data: dict[Any, Any], overrides: Iterable[str]) -> dict[Any, Any]:
    """`data` with the ``section.key=value`` texts laid on top."""
    data = {section: {} if values is None else values for section, values in data.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        section, _, key = name.strip().partition(".")
        if not (equals and section and key):
            raise ConfigError(f"--set {text!r} must read section.key=value, for example train.lr=2e-3")
        values = data.setdefault(section, {})
        if isinstance(values, dict):
            data[section] = {**values, key: parse_yaml(value, f"--set {text!r}")}
    return data


_SECTIONS: dict[str, type[Section]] = {
    "corpus": CorpusConfig,
    "batches": BatchesConfig,
    "model": ModelConfig,
    "train": TrainConfig,
}
KEYS = [f"{section}.{key}" for section, model in _SECTIONS.items() for key in model.model_fields]


def _misplaced(data: dict[Any, Any]) -> Iterator[str]:
    """Sections and keys that do not exist, each with the nearest that does."""
    for section, values in data.items():
        if section not in _SECTIONS:
            yield f"unknown section {_shown(section)}" + _nearest(
                str(section), [*_SECTIONS, *KEYS], _SECTIONS
            )
        elif isinstance(values, dict):
            known = list(_SECTIONS[section].model_fields)
            for key in [key for key in values if key not in known]:
                yield f"unknown key {section}.{_shown(key).strip(_QUOTES)}" + _nearest(
                    str(key), [*known, *KEYS], known
                )
        else:
            yield f"{section} is {_shown(values)}; it must be a mapping of keys to values"


def _shown(value: Any) -> str:
    """`value` in as many characters as a line bears."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _nearest(name: str, candidates: list[str], listed: Iterable[str]) -> str:
    """A hint at what was meant: the same key in a section, else the nearest spelling, else all `listed`."""
    elsewhere = [key for key in candidates if key.endswith(f".{name}")]
    near = elsewhere or difflib.get_close_matches(name, candidates, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(listed)}"


_FORMS = {
    "corpus.split": "three numbers: the shares of train, val and test, for example [0.9, 0.05, 0.05]",
    "train.checkpoint_every": "steps, as 500, or a time, as 30s, 10min or 2h",
    "train.betas": "two numbers from 0 to below 1, for example [0.9, 0.99]",
}


def _explain(errors: ValidationError, data: dict[str, Any]) -> list[str]:
    """Each wrong key with its value and what is allowed; a key of several types has an error for each."""
    explained: dict[str, str] = {}
    for error in errors.errors():
        name = ".".join(str(part) for part in error["loc"][:2])
        allowed = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
        if error["type"] == "value_error":
            explained[name] = f"{name}.{error['msg'].removeprefix('Value error, ')}".removeprefix(".")
        elif name in _FORMS:
            section, key = name.split(".")
            explained[name] = f"{name} is {_shown(data[section][key])}; it must be {_FORMS[name]}"
        elif name in explained:
            explained[name] += f" or {allowed}" if allowed not in explained[name] else ""
        else:
            explained[name] = f"{name} is {_shown(error['input'])}; it must be {allowed}"
    return list(explained.values())
