"""Several processes that train one model together, on one machine or many: data-parallel training.

Each process holds the whole model and reads its share of every batch; `DistributedDataParallel` averages the
gradients, so that all take the same step. ``torchrun`` starts the processes and says in the environment who
they are. A single process is a group of one, for which nothing here does anything.

Figures and states go through gloo, gradients through gloo or, on CUDA, NCCL.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from charlm.errors import CharlmError, ConfigError, Told
from charlm.nn.device import choose_device
from charlm.storage.state_file import read_state, write_state
from charlm.text.batches import mix

Value = TypeVar("Value")

# The others wait while the first process scores val. One that dies is noticed at once all the same: its
# connections close.
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Group:
    """The processes that train together; this is number `rank` of `size`, and `local_rank` on its machine.

    What is called on one process of a group has to be called on all: each waits for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    figures: "dist.ProcessGroup | None" = None  # gloo, on CUDA too

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device called `name`, as `choose_device` has it; on CUDA each process of a machine has its own.

        Raises `ConfigError` for too few GPUs and for a device that processes cannot share.
        """
        if self.size == 1:
            return choose_device(name)
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if name not in ("auto", "cuda"):
            raise ConfigError(
                f"train.device is {name!r}; with several processes it must be auto, cuda or cpu: "
                "each takes a GPU of its own"
            )
        choose_device("cuda")
        if self.local_size > torch.cuda.device_count():
            raise ConfigError(
                f"{self.local_size} processes need as many GPUs, and this machine has "
                f"{torch.cuda.device_count()}; lower --nproc-per-node, or take train.device=cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def seed(self, seed: int) -> int:
        """The seed of this process's dropout: the first process's is `seed` itself."""
        return mix(seed, self.rank) if self.rank else seed

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module`, its gradients averaged over the processes in every backward pass."""
        if self.size == 1:
            return module
        # A bucket for each parameter. With more in one, the first step would sum in another order than those
        # that follow it, once the buckets are in the order of the gradients: of three processes or more a
        # resumed run would not end with the same bits. The models have some ten parameters, mostly large.
        return DistributedDataParallel(module, bucket_cap_mb=1e-6, gradient_as_bucket_view=True)

    def sum(self, number: float) -> float:
        """The sum of the processes' numbers, in float64."""
        return self._reduced(number, torch.float64, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return int(self._reduced(number, torch.int64, dist.ReduceOp.MAX))

    def _reduced(self, number: float, dtype: torch.dtype, how: Any) -> float:
        if self.size == 1:
            return number
        tensor = torch.tensor([number], dtype=dtype)
        dist.all_reduce(tensor, how, self.figures)
        return tensor.item()

    def gathered(self, tensor: Tensor) -> Tensor:
        """The processes' tensors, all of one shape (...), as (size, ...), on the CPU."""
        tensor = tensor.detach().cpu().contiguous()
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, self.figures)
        return torch.stack(parts)

    def side_by_side(self, tensor: Tensor) -> Tensor:
        """The processes' tensors (L, B, H), all of one shape, as one (L, size · B, H), on the CPU."""
        return torch.cat(list(self.gathered(tensor)), 1)

    def told(self, find: Callable[[], Value]) -> Value:
        """What `find`, called on the first process alone, gives there: a value that JSON holds."""
        if self.size == 1:
            return find()
        data = json.dumps(find()).encode() if self.first else b""
        value: Value = json.loads(self._spread(data))
        return value

    def state(self, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the state that `load`, called on the first process only, returns there."""
        if self.size == 1:
            return load()
        buffer, state = io.BytesIO(), load() if self.first else {}
        if self.first:
            write_state(buffer, state)
        data = self._spread(buffer.getvalue())
        return state if self.first else read_state(io.BytesIO(data), Path("the first process's state"))

    def _spread(self, data: bytes) -> bytes:
        """The first process's bytes."""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, self.figures)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, 0, self.figures)
        return buffer.numpy().tobytes()

    def in_turn(self, load: Callable[[], Value]) -> Value:
        """What `load` gives, called first on one process of each machine, then on the others.

        What the one leaves on the disk, the others find.
        """
        value = load() if self.local_rank == 0 else None
        self.wait()
        return load() if value is None else value

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0)

    def check_same(self, what: str, value: str) -> None:
        """Raise `CharlmError` unless all processes have the same `value`."""
        different = self.told(lambda: value) != value
        if self.largest(int(different)):
            raise CharlmError(f"the processes have different {what}; give every machine the same files")


ALONE = Group()


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The group that ``torchrun``'s environment tells of, while the context lasts.

    Of the processes that an error ends, the first that meets it raises it, and from the others it comes as
    `Told`. Raises `ConfigError` for an environment that makes no sense, and `CharlmError` where the others
    cannot be reached or one of them is lost.
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
        figures = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise CharlmError(f"process {rank} of {size} cannot join the others: {_line(error)}") from None
    try:
        yield Group(rank, size, local_rank, local_size, figures)
    except BaseException as error:
        raise _first_told(error, rank, size, store) from None
    dist.destroy_process_group()


def _from_environment() -> tuple[int, int, int, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; of a process alone where there are none."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {name: os.environ.get(name) for name in names}
    if not (found["RANK"] or found["WORLD_SIZE"]):
        return 0, 1, 0, 1
    where = ", ".join(f"{name}={value}" for name, value in found.items())
    try:
        rank, size = int(found["RANK"] or ""), int(found["WORLD_SIZE"] or "")
        local_rank, local_size = int(found["LOCAL_RANK"] or rank), int(found["LOCAL_WORLD_SIZE"] or size)
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"the environment says {where}, which is no place among several processes; "
            "start them with torchrun, or unset RANK and WORLD_SIZE"
        ) from None
    return rank, size, local_rank, local_size


def _first_told(error: BaseException, rank: int, size: int, store: Any) -> BaseException:
    """`error` itself on the process that is the first to meet one, on the others `Told`."""
    lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
    try:
        first = store.add("charlm/ended", 1) == 1
    except RuntimeError:  # the process that held the store is gone
        first = True
    if not first:
        return Told(error.exit_code if isinstance(error, CharlmError) else 1)
    if lost:
        return CharlmError(
            f"process {rank} of {size} lost the others: {_line(error)}; "
            "one of them was killed, or the network failed; go on from the last save with --resume"
        )
    return error


def _line(error: BaseException) -> str:
    """What `error` says, without where in torch's source and its advice to look at the logs."""
    return re.sub(r"^\[\S+\] ", "", str(error).split("\n")[0]).split(". This is")[0]
