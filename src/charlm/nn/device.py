"""The device, the number of threads and the precision of matrix products."""

import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from charlm.config import ModelConfig
from charlm.errors import ConfigError

_ENOUGH_FOR_TWO = 2**17  # B · H², the multiplications of a step for each gate


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; ``auto`` is CUDA, else MPS, else the CPU.

    Raises `ConfigError` for a device that this machine does not have.
    """
    available = ["cpu"]
    if torch.cuda.is_available():
        available = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cuda", *available]
    if torch.backends.mps.is_available():
        available = ["mps", *available]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise ConfigError(
            f"device {name!r} is not available here; choose auto or one of {', '.join(available)}"
        )
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the type in which `device` multiplies matrices, and the reason.

    ``auto`` is bfloat16 where the device has instructions for it, else float32: without them bfloat16
    products are a hundred times slower than those of float32, and oneDNN's LSTM fails.

    Raises `ConfigError` for a precision that the device does not have.
    """
    if name == "bfloat16" and device.type == "cpu" and not _cpu("_is_avx512_supported"):
        raise ConfigError("precision bfloat16 needs a CPU with AVX-512 or a GPU; allowed here: auto, float32")
    if name != "auto":
        return getattr(torch, name), "as configured"
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        native = _cpu("_is_avx512_bf16_supported") or multiplies_tiles()
    else:
        return torch.float32, f"the safe choice on {device.type}"
    reason = f"the {device.type} device has {'' if native else 'no '}bfloat16 instructions"
    return (torch.bfloat16 if native else torch.float32), reason


def choose_threads(wanted: int | None, model: ModelConfig, rows: int) -> tuple[int, str]:
    """Return the number of CPU threads for `model` on batches of `rows` sequences, and the reason.

    Without a `wanted` number or ``OMP_NUM_THREADS`` it is torch's, the number of processors, or 1 where a
    second thread brings little, as measured by benchmarks/threads.py. It depends on the sizes alone, because
    results differ in their last bits between numbers of threads.
    """
    if wanted:
        return wanted, "--threads"
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():  # OpenMP ignores others, and warns
        return torch.get_num_threads(), "OMP_NUM_THREADS"
    if rows * model.hidden_size**2 < _ENOUGH_FOR_TWO:
        return 1, f"a second one brings little to {rows} × {model.hidden_size} units"
    return torch.get_num_threads(), "the number of processors"


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return a context in which matrix products run in `precision`; weights, state and loss stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != torch.float32)


class Uninitialised(TorchFunctionMode):
    """A context in which new modules do not initialise their parameters, which are then read from a file.

    Drawing them takes time; on the device `meta` torch imports its compiler for it, in three seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, unless it fills a tensor."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def multiplies_tiles() -> bool:
    """Return whether the CPU has AMX, instructions for products of bfloat16 matrices."""
    return _cpu("_is_amx_tile_supported")


def _cpu(question: str) -> bool:
    """Ask torch about the AVX-512 CPU, as ``ATEN_CPU_CAPABILITY`` limits it.

    The functions are not public and may be missing.
    """
    function = getattr(torch.cpu, question, None)
    return bool(torch.backends.cpu.get_cpu_capability().startswith("AVX512") and function and function())
