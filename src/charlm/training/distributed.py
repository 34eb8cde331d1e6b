"""Data-parallel training: several processes, on one machine or many, train one model together.

Each process holds the whole model and reads its slice of every batch; `DistributedDataParallel` averages the
gradients, so that all processes take the same step. ``torchrun`` starts the processes and describes the group
in environment variables. A single process is a group of one, whose methods communicate with nobody.

Metrics and states go through gloo, gradients through gloo or, on CUDA, NCCL.
"""

import atexit
import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from charlm.errors import CharlmError, ConfigError, EndedElsewhere
from charlm.nn.device import choose_device
from charlm.storage.state_file import read_state, write_state
from charlm.text.batches import mix

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """The processes that train together, seen from process `rank` of `size`, `local_rank` on its machine.

    A method that communicates waits for the other processes: all of them have to call it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    gloo: "dist.ProcessGroup | None" = None  # for numbers and states, on CUDA too

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Return the device `name`, as `choose_device` does; with CUDA, each process takes another GPU.

        Raises `ConfigError` for too few GPUs and for a device that processes cannot share.
        """
        if self.size == 1:
            return choose_device(name)
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if name not in ("auto", "cuda"):
            raise ConfigError(
                f"train.device is {name!r}; allowed with several processes: auto, cuda, cpu "
                "(each process takes another GPU)"
            )
        choose_device("cuda")
        if self.local_size > (count := torch.cuda.device_count()):
            raise ConfigError(
                f"{self.local_size} processes need as many GPUs, and this machine has {count}; "
                "lower --nproc-per-node or set train.device=cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def seed(self, seed: int) -> int:
        """Return the seed of this process's dropout, which for the first process is `seed`."""
        return mix(seed, self.rank) if self.rank else seed

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return `module` with its gradients averaged over the processes in every backward pass."""
        if self.size == 1:
            return module
        # One bucket per parameter. After the first step, DistributedDataParallel rebuilds larger buckets in
        # the order of the gradients and then sums in another order: with three processes or more, a resumed
        # run would not end with the same bits. The models have about ten parameters, most of them large.
        return DistributedDataParallel(module, bucket_cap_mb=1e-6, gradient_as_bucket_view=True)

    def sum(self, number: float) -> float:
        """Return the sum of the processes' numbers, in float64."""
        return self._reduced(number, torch.float64, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        return int(self._reduced(number, torch.int64, dist.ReduceOp.MAX))

    def _reduced(self, number: float, dtype: torch.dtype, operation: Any) -> float:
        if self.size == 1:
            return number
        tensor = torch.tensor([number], dtype=dtype)
        dist.all_reduce(tensor, operation, self.gloo)
        return tensor.item()

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the processes' tensors, all of one shape (...), as one tensor (size, ...) on the CPU."""
        tensor = tensor.detach().cpu().contiguous()
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, self.gloo)
        return torch.stack(parts)

    def from_first(self, find: Callable[[], Value]) -> Value:
        """Return the result of `find`, a JSON value, which only the first process calls."""
        if self.size == 1:
            return find()
        value: Value = json.loads(self._broadcast(json.dumps(find()).encode() if self.first else b""))
        return value

    def state(self, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the state that `load`, called on the first process only, returns there."""
        if self.size == 1:
            return load()
        buffer, state = io.BytesIO(), load() if self.first else {}
        if self.first:
            write_state(buffer, state)
        data = self._broadcast(buffer.getvalue())
        return state if self.first else read_state(io.BytesIO(data), Path("the first process's state"))

    def _broadcast(self, data: bytes) -> bytearray:
        """Return the first process's bytes, of which there is at least one."""
        buffer = bytearray(self.largest(len(data)))
        buffer[: len(data)] = data
        dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), 0, self.gloo)
        return buffer

    def in_turn(self, load: Callable[[], Value]) -> Value:
        """Return the result of `load`, called on one process of each machine first, then on the others.

        The others find the files that the first call leaves on the disk.
        """
        value = load() if self.local_rank == 0 else None
        self.largest(0)  # waits for the others
        return load() if value is None else value

    def check_same(self, name: str, value: str) -> None:
        """Raise `CharlmError` unless all processes have the same `value`; `name` says what it is."""
        different = self.from_first(lambda: value) != value
        if self.largest(int(different)):
            raise CharlmError(f"the processes have different {name}; give every machine the same files")


ALONE = Group()


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Join the group that ``torchrun``'s environment variables describe, for as long as the context lasts.

    When an error ends the group, the first process that meets it raises it, and the others raise
    `EndedElsewhere`. Raises `ConfigError` for environment variables that contradict each other, and
    `CharlmError` if the other processes cannot be reached or one of them is lost.

    A program that uses this calls `end_process` at its end.
    """
    rank, size, local_rank, local_size = _from_environment()
    if size == 1:
        yield ALONE
        return
    from torch.distributed.rendezvous import rendezvous

    try:
        store = next(rendezvous("env://", rank, size, timeout=timedelta(minutes=10)))[0]
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        # The others wait while the first process scores val. The end of a process is noticed at once, because
        # its connections close.
        gloo = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
    except (RuntimeError, ValueError) as error:
        raise CharlmError(f"process {rank} of {size} cannot join the others: {_line(error)}") from None
    try:
        yield Group(rank, size, local_rank, local_size, gloo)
    except BaseException as error:
        if threading.current_thread() is threading.main_thread():
            # torchrun sends SIGTERM to the survivors of a lost process, which would end before they say why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _first_to_end(error, rank, size, store) from None
    dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End a process of a group with the exit code `code`, without the interpreter's finalization.

    After an error, the threads of gloo are still running while the interpreter shuts down, which can abort
    the process (SIGABRT). They cannot be joined before: one may be in an operation that another process,
    which is ending too, never completes.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _from_environment() -> tuple[int, int, int, int]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or those of a single process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [os.environ.get(name, "") for name in names]
    if not any(texts[:2]):
        return 0, 1, 0, 1
    try:
        rank, size = map(int, texts[:2])
        local_rank, local_size = int(texts[2] or rank), int(texts[3] or size)
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise ValueError
    except ValueError:
        variables = ", ".join(map("=".join, zip(names, texts, strict=True)))
        raise ConfigError(
            f"invalid environment variables {variables}; "
            "start several processes with torchrun, or unset RANK and WORLD_SIZE"
        ) from None
    return rank, size, local_rank, local_size


def _first_to_end(error: BaseException, rank: int, size: int, store: Any) -> BaseException:
    """Return the error to raise: `error` on the first process to have one, else `EndedElsewhere`."""
    lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
    try:
        first = store.add("charlm/ended", 1) == 1
    except RuntimeError:  # the process that held the store is gone
        first = True
    if not first:
        return EndedElsewhere("", error.exit_code if isinstance(error, CharlmError) else 1)
    if lost:
        return CharlmError(
            f"process {rank} of {size} lost the others: {_line(error)}; "
            "one of them was killed or the network failed; continue from the last save with --resume"
        )
    return error


def _line(error: BaseException) -> str:
    """Return the message of `error` without torch's source line and its advice to look at the logs."""
    return re.sub(r"^\[\S+\] ", "", str(error).split("\n")[0]).split(". This is")[0]
