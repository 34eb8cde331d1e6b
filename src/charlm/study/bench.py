"""Measure the speed of training and generation on this machine, in each implementation.

The implementations alternate in rounds, so that a drift of the machine's speed affects all of them; each
figure is the median over the rounds. The text is random, because the speed does not depend on it.
"""

import math
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from charlm.config import BatchesConfig, Config, ModelConfig, TrainConfig, override
from charlm.errors import ConfigError
from charlm.inference.sample import Sampling, generate
from charlm.nn.cells import CELLS
from charlm.nn.device import choose_device, choose_precision
from charlm.nn.kernels.native import Kernels
from charlm.nn.layers import choose_implementation
from charlm.nn.model import CharLM
from charlm.text.corpus import Corpus
from charlm.training.learner import Learner

ROUNDS = 3
CHARACTERS = "".join(map(chr, range(32, 97)))  # 65, as in tiny Shakespeare
_GENERATED = 256  # characters of a text, including the preparation of the weights
_PARTS = {  # of a training step: regular expressions of the names that torch's profiler gives to operations
    "sequence forward": "_Sequence",
    "sequence backward": "_SequenceBackward",
    "other products": "multiply|aten::(add)?mm",
    "loss": "_CrossEntropy|aten::(_log_softmax|nll_loss).*",
    "dropout": "_Dropped",
    "optimiser": "norm|adamw|Optimizer.*|aten::(_fused_adam|_foreach_|linalg_vector_norm).*",
}
_PROFILED = 10  # steps; the profiler is slow to sort its records


@dataclass(frozen=True)
class Speed:
    """The speed of one cell in one implementation.

    trained, written: characters per second of training and of the generation of one text.
    ratio: `trained` divided by that of the builtin implementation, or of scratch for a cell without one.
    share: operations per second of training divided by those of a matrix product in the same precision.
    """

    cell: str
    implementation: str
    trained: float
    ratio: float
    share: float
    written: float


@dataclass(frozen=True)
class Report:
    """The result of `bench`; products: floating-point operations per second of matrix products, by type."""

    machine: str
    device: str
    precision: str
    threads: int
    products: dict[str, float]
    rows: list[Speed]


def bench(
    cells: Iterable[str],
    model: ModelConfig,
    batches: BatchesConfig,
    device: str = "auto",
    seconds: float = 3.0,
) -> Report:
    """Measure `cells` in all implementations, with the sizes of `model` and `batches`.

    seconds: training time of each row over all rounds; generation and matrix products take a third of it.

    Raises `ConfigError` for a device that is not available and for `seconds` that are not finite.
    """
    _check_seconds(seconds)
    train = TrainConfig(device=device, lr=1e-4, schedule="constant")
    config = Config(model=model, batches=batches, train=train)
    place, rates = choose_device(device), defaultdict[tuple[str, ...], list[float]](list)
    learners = {}
    for cell in cells:
        for name in CELLS[cell].implementations:
            each = override(config, [f"model.cell={cell}", f"model.implementation={name}"])
            if choose_implementation(each.model, place)[0] == name:  # fused needs kernels
                learners[cell, name] = make_learner(each)
    for turn in range(ROUNDS + 1):  # the first one warms up and compiles
        length = seconds / ROUNDS if turn else 0.0
        for name in ("float32", "bfloat16"):
            rates["product", name].append(matrix_rate(place, getattr(torch, name), length / 3))
        for (cell, name), learner in learners.items():
            rates["trained", cell, name].append(training_rate(learner, length))
            rates["written", cell, name].append(writing_rate(learner, length / 3))
    medians = {key: statistics.median(values[1:]) for key, values in rates.items()}
    precision = str(choose_precision("auto", place)[0]).removeprefix("torch.")
    rows = []
    for (cell, name), learner in learners.items():
        trained = medians["trained", cell, name]
        scratch = medians["trained", cell, "scratch"]
        ratio = trained / medians.get(("trained", cell, "builtin"), scratch)
        share = trained * operations(learner.model) / medians["product", precision]
        rows.append(Speed(cell, name, trained, ratio, share, medians["written", cell, name]))
    products = {name: medians["product", name] for name in ("float32", "bfloat16")}
    return Report(machine(), str(place), precision, torch.get_num_threads(), products, rows)


def _check_seconds(seconds: float) -> None:
    if not math.isfinite(seconds):
        raise ConfigError(f"--seconds is {seconds}; allowed: a finite number, for example 3")


def make_learner(config: Config, steps: int = 1) -> Learner:
    """Return a learner of `config` on a random text of `CHARACTERS`, long enough for epochs of `steps`."""
    batches = config.batches
    length = (steps * batches.batch_size + 1) * (max(batches.seq_len, batches.stride) + 1)
    draws = torch.randint(len(CHARACTERS), (2 * length + 100,), generator=torch.Generator().manual_seed(0))
    text = CHARACTERS + "".join(CHARACTERS[i] for i in draws.tolist())
    return Learner(config, Corpus.from_text(text, (0.9, 0.1, 0.0)))


def training_rate(learner: Learner, seconds: float) -> float:
    """Return the characters per second that `Learner.step` reads, repeated on one batch."""
    x, y = next(iter(learner.batches.loader(seed=1, epoch=0)))

    def step() -> int:
        learner.step(x, y)
        return math.prod(x.shape)

    return rate(step, seconds)


def writing_rate(learner: Learner, seconds: float) -> float:
    """Return the characters per second of the generation of one text."""
    vocab = learner.corpus.vocab
    prefix = vocab.encode(" ")
    return rate(lambda: len(list(generate(learner.model, vocab, prefix, _GENERATED, Sampling()))), seconds)


def profile(config: Config, seconds: float) -> tuple[dict[str, float], float]:
    """Return the seconds of each part of a training step, and its share of the rate of matrix products.

    The parts are measured by torch's profiler. ``rest`` is the rest of a step without it: copies, Python.
    The share is the median of rounds in which steps and products alternate.

    Raises `ConfigError` for a device that is not the CPU and for `seconds` that are not finite.
    """
    _check_seconds(seconds)
    learner = make_learner(config, _PROFILED)
    if learner.device.type != "cpu":
        raise ConfigError(f"--profile measures the CPU, not {learner.device}; add --device cpu")
    training_rate(learner, 0.0)  # compiles
    parts = dict.fromkeys((*_PARTS, "head", "batches"), 0.0)
    loader = iter(learner.batches.loader(seed=1, epoch=0))
    with _named_kernels(), torch.profiler.profile(record_shapes=True) as recorded:
        for _ in range(_PROFILED):
            before = time.perf_counter()
            x, y = next(loader)
            parts["batches"] += (time.perf_counter() - before) / _PROFILED
            learner.step(x, y)
    # The dimensions of the head's products: the characters of a batch and the vocabulary.
    characters = config.batches.batch_size * config.batches.seq_len
    head = {characters, len(learner.corpus.vocab)}
    for event in recorded.key_averages(group_by_input_shape=True):
        name, *sizes = event.key.split()
        for part, names in _PARTS.items():
            if re.fullmatch(names, name):
                dimensions = {*map(int, sizes), *(n for shape in event.input_shapes for n in shape)}
                if part == "other products" and head <= dimensions:
                    part = "head"
                parts[part] += event.self_cpu_time_total / 1e6 / _PROFILED
                break
    parts["head"] += parts.pop("loss")
    trained, products = [], []
    for _ in range(10 * ROUNDS):
        products.append(matrix_rate(learner.device, learner.precision, seconds / 20 / ROUNDS))
        trained.append(training_rate(learner, seconds / 20 / ROUNDS))
    parts["rest"] = max(0.0, characters / statistics.median(trained) + parts["batches"] - sum(parts.values()))
    shares = [a / b for a, b in zip(trained, products, strict=True)]
    return parts, statistics.median(shares) * operations(learner.model)


@contextmanager
def _named_kernels() -> Iterator[None]:
    """Show torch's profiler the kernels that no operation of torch calls; products as "multiply M K N"."""

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Kernels, *args: Any, **kwargs: Any) -> Any:
            sizes = (*args[0].shape, args[1].shape[1]) if name == "multiply" else ()
            with torch.profiler.record_function(" ".join(map(str, (name, *sizes)))):
                return function(self, *args, **kwargs)

        return call

    before = {name: getattr(Kernels, name) for name in ("multiply", "norm", "adamw")}
    for name, function in before.items():
        setattr(Kernels, name, named(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(Kernels, name, function)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the floating-point operations per second of torch's fastest product of square matrices.

    On the CPU they fit the cache; for a type without instructions they are small.
    """
    native = dtype == torch.float32 or choose_precision("auto", device)[0] == dtype
    size = 2048 if device.type != "cpu" else 512 if native else 128
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)

    def multiply() -> int:
        torch.mm(a, b, out=out)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return 2 * size**3

    def multiply_by_onednn() -> int:
        torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return 2 * size**3

    # In float32, torch.mm calls a library that is not the fastest one on every processor.
    onednn = device.type == "cpu" and native and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    products = [multiply, *([multiply_by_onednn] if onednn else [])]
    return max(rate(each, seconds / len(products)) for each in products)


def rate(work: Callable[[], int], seconds: float) -> float:
    """Return the sum of the results of `work` per second, called at least once and until `seconds` pass."""
    total, start = 0, time.perf_counter()
    while True:
        total += work()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return total / elapsed


def operations(model: CharLM) -> int:
    """Return the floating-point operations of training per character: 6 per weight of the matrices.

    A weight is used in one product forward and two backward, of two operations each. The first layer's input
    weights are not counted, because their product with a character can be looked up.
    """
    return 6 * sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and not name.startswith("embedding.") and not name.endswith("weight_ih_l0")
    )


def machine() -> str:
    """Describe the processor, its threads and instructions, torch's version and the date in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:(.*)", text, re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    if choose_precision("auto", torch.device("cpu"))[0] == torch.bfloat16:
        instructions += " with bfloat16"
    threads, date = torch.get_num_threads(), time.strftime("%Y-%m-%d")
    return f"{name}, {threads} threads, {instructions}, torch {torch.__version__}, {date}"
