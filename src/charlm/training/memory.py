"""The memory of a training step, computed before it, and the memory that is free."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from charlm.config import Config
from charlm.errors import ConfigError
from charlm.nn.cells import cell_of

_OPTIMIZER_NUMBERS = {"sgd": 1, "rmsprop": 2, "adam": 2, "adamw": 2, "adadelta": 2}  # for each weight
# Measured bytes for each character of a batch and unit of a layer, more for each of its gates, and for each
# character and class of the output; in bfloat16 the shares of them.
_PER_UNIT = {"fused": (20, 8), "builtin": (20, 14), "scratch": (14, 20)}
_PER_CLASS = 18
_BFLOAT16 = {"fused": 0.6, "builtin": 0.75, "scratch": 0.75}


def check_memory(
    config: Config, vocab_size: int, sequences: int, seq_len: int, implementation: str, precision: torch.dtype
) -> str:
    """Return a line about the memory that a training step on the CPU needs, and the memory that is free.

    sequences: of a step. seq_len: characters of the longest one.

    Raises `ConfigError` with the largest batch that fits if a step needs more than is free.
    """
    fixed, each = step_memory(config, vocab_size, seq_len, implementation, precision)
    needed, free = fixed + sequences * each, free_memory()
    if free is None:
        return f"{_size(needed)} for a step"
    if needed > free:
        fits = int((free - fixed) // each)
        fix = f"allowed with it: batches.batch_size up to {fits:,}" if fits > 0 else "use a smaller model"
        if config.corpus.records:
            fix += f", or leave out the longest record, of {seq_len - 1:,} characters"
        raise ConfigError(
            f"a step of {sequences:,} × {seq_len:,} characters with "
            f"{config.model.hidden_size:,} hidden units needs {_size(needed)}, "
            f"and {_size(free)} are free; {fix}"
        )
    return f"{_size(needed)} for a step, {_size(free)} free"


def step_memory(
    config: Config, vocab_size: int, seq_len: int, implementation: str, precision: torch.dtype
) -> tuple[float, float]:
    """Return the bytes of the model and its optimiser, and those of each sequence of a batch."""
    model, train = config.model, config.train
    stacks = 2 if model.direction == "both" else 1
    L, H, G, T = model.num_layers * stacks, model.hidden_size, cell_of(model).gates, seq_len
    embedded = model.input == "embedding"
    E = model.embedding_size if embedded else vocab_size
    weights = stacks * (G * H * (E + H + 2) + (model.num_layers - 1) * G * H * (2 * H + 2))
    weights += vocab_size * (stacks * H + 1 + E * embedded)
    # The weights, their gradients, and their copies in the type of products.
    copies = 3 + _OPTIMIZER_NUMBERS[train.optimizer] + bool(train.ema)
    per_unit, per_gate = _PER_UNIT[implementation]
    share = _BFLOAT16[implementation] if precision == torch.bfloat16 else 1.0
    each = share * (L * H * (per_unit + per_gate * G) + _PER_CLASS * vocab_size)
    longest = 2 * T - 1 if config.batches.truncation == "random" else T  # both ends move by (T - 1) / 2
    return 4 * copies * weights, longest * each


def free_memory() -> int | None:
    """Return the bytes that this process can still take, None where that is not known.

    It is the least of the system's and those that a control group (of a container) allows; of several
    processes that torchrun started here, each has its share.
    """
    found = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    group = Path("/sys/fs/cgroup")
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, StopIteration, ValueError):
            lines = (group / limit).with_name("memory.stat").read_text().splitlines()
            reclaimable = int(next(line for line in lines if line.startswith(f"{cache} ")).split()[1])
            taken = int((group / used).read_text()) - reclaimable
            found.append(int((group / limit).read_text()) - taken)
    with suppress(ValueError):
        return max(0, min(found)) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return None


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
