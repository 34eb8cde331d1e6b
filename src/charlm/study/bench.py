"""How fast this machine trains and writes, in every implementation.

The contestants take turns, round after round, so that a machine whose speed drifts is fair to all; a figure
is the median of its rounds. Texts are random: how fast a model is does not depend on what it reads.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from charlm.config import BatchesConfig, Config, ModelConfig, TrainConfig
from charlm.errors import ConfigError
from charlm.inference.sample import Sampling, generate
from charlm.nn.cells import CELLS
from charlm.nn.device import choose_device, choose_precision
from charlm.nn.model import CharLM
from charlm.text.corpus import Corpus
from charlm.training.learner import Learner

ROUNDS = 3
CHARACTERS = "".join(map(chr, range(32, 97)))  # 65 of them, as in tiny Shakespeare
_WRITTEN = 256  # characters of a text: its beginning, in which weights are prepared, counts too
_LARGE, _SMALL = 2048, 256  # matrices to measure products with; small ones where instructions are missing


@dataclass(frozen=True)
class Speed:
    """One cell in one implementation.

    trained, written: characters a second, in training and in writing one text.
    ratio: of `trained` to that of the builtin implementation, or of scratch for a cell without one.
    share: of the machine's matrix products, in the precision trained in, that the training reaches.
    """

    cell: str
    implementation: str
    trained: float
    ratio: float
    share: float
    written: float


@dataclass(frozen=True)
class Report:
    """What was measured where; products: floating-point operations a second of large matrices, by type."""

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
    """Measure `cells` in all implementations, on models and batches otherwise as `model` and `batches` say.

    seconds: how long each row trains, in all rounds; it writes, and products are taken, a third as long.
    Raises `ConfigError` for a device that this machine lacks, and for a time without end.
    """
    if not math.isfinite(seconds):
        raise ConfigError(f"--seconds {seconds} has no end; give a number, for example 3")
    train = TrainConfig(device=device, lr=1e-4, schedule="constant")
    learners = {
        (cell, name): make_learner(
            Config(
                model=ModelConfig(**{**model.model_dump(), "cell": cell, "implementation": name}),
                batches=batches,
                train=train,
            )
        )
        for cell in cells
        for name in CELLS[cell].implementations
    }
    where, each = choose_device(device), seconds / ROUNDS
    products: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    trained: dict[tuple[str, str], list[float]] = {key: [] for key in learners}
    written: dict[tuple[str, str], list[float]] = {key: [] for key in learners}
    for turn in range(ROUNDS + 1):  # the first warms up, and compiles what is compiled
        length = each if turn else 0.0
        for name, rates in products.items():
            rates.append(matrix_rate(where, getattr(torch, name), length / 3))
        for key, learner in learners.items():
            trained[key].append(training_rate(learner, length))
            written[key].append(writing_rate(learner, length / 3))
    limits = {name: statistics.median(rates[1:]) for name, rates in products.items()}
    precision = str(choose_precision("auto", where)[0]).removeprefix("torch.")
    medians = {key: statistics.median(rates[1:]) for key, rates in trained.items()}
    rows = [
        Speed(
            cell,
            name,
            medians[cell, name],
            medians[cell, name] / medians.get((cell, "builtin"), medians[cell, "scratch"]),
            medians[cell, name] * operations(learner.model) / limits[precision],
            statistics.median(written[cell, name][1:]),
        )
        for (cell, name), learner in learners.items()
    ]
    return Report(machine(), str(where), precision, torch.get_num_threads(), limits, rows)


def make_learner(config: Config) -> Learner:
    """A learner of `config` on a random text of `CHARACTERS`, long enough for one batch."""
    length = (config.batches.batch_size + 1) * (max(config.batches.seq_len, config.batches.stride) + 1)
    draws = torch.randint(len(CHARACTERS), (2 * length + 100,), generator=torch.Generator().manual_seed(0))
    text = CHARACTERS + "".join(CHARACTERS[i] for i in draws.tolist())
    return Learner(config, Corpus.from_text(text, (0.9, 0.1, 0.0)))


def training_rate(learner: Learner, seconds: float) -> float:
    """Characters a second in `Learner.step`, on one batch again and again."""
    x, y = next(iter(learner.batches.loader(seed=1, epoch=0)))
    return rate(lambda: learner.step(x, y)[1], seconds)


def writing_rate(learner: Learner, seconds: float) -> float:
    """Characters a second in writing one text."""
    vocab = learner.corpus.vocab
    prefix = vocab.encode(" ")
    return rate(lambda: len(list(generate(learner.model, vocab, prefix, _WRITTEN, Sampling()))), seconds)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Floating-point operations a second of a product of square matrices."""
    native = dtype == torch.float32 or choose_precision("auto", device)[0] == dtype
    size = _LARGE if native else _SMALL
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)

    def multiply() -> int:
        torch.mm(a, b, out=out)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return 2 * size**3

    return rate(multiply, seconds)


def rate(work: Callable[[], int], seconds: float) -> float:
    """How much `work` does a second; it is called until `seconds` have passed, once at least."""
    done, began = 0, time.perf_counter()
    while True:
        done += work()
        passed = time.perf_counter() - began
        if passed >= seconds:
            return done / passed


def operations(model: CharLM) -> int:
    """Floating-point operations that training takes a character: 6 a weight of the matrices.

    A product with a weight is two, once forward and twice backward. The first layer's input weights are not
    counted: where characters are read, the product can be looked up.
    """
    return 6 * sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and not name.startswith("embedding.") and not name.endswith("weight_ih_l0")
    )


def machine() -> str:
    """The processor, its cores and instructions, torch's version and the day, for a table's heading."""
    try:
        found = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        found = []
    names = [line.partition(":")[2].strip() for line in found if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    if choose_precision("auto", torch.device("cpu"))[0] == torch.bfloat16:
        instructions += " with bfloat16"
    threads = torch.get_num_threads()
    return (
        f"{name}, {threads} threads, {instructions}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
