"""The optional compiled part: `kernels.c`, made by the machine's C compiler for the machine's instructions.

It is compiled at first use, once for each type of number, in about a second, and kept in the user's cache
folder (``$XDG_CACHE_HOME/charlm`` or ``~/.cache/charlm``), which only its owner may write to. Where there is
no compiler, or ``CHARLM_KERNELS=off`` stands in the environment, `kernels` gives None, and `fused` does the
same with torch's operations.
"""

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden"]
_STORE = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
_COUNT, _POINTER, _FLAG = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
STEPS: dict[str, list[Any]] = {  # the arguments after B and H
    "rnn_forward": [_FLAG] + [_POINTER] * 4,
    "rnn_backward": [_FLAG] + [_POINTER] * 4,
    "lstm_forward": [_POINTER] * 6,
    "lstm_backward": [_POINTER] * 7,
    "gru_forward": [_POINTER] * 8,
    "gru_backward": [_POINTER] * 9,
}


class Kernels:
    """The functions of `kernels.c` for one type of number, over contiguous CPU tensors.

    The steps take the arguments of their namesakes in `fused`, which say what they compute. Where there is no
    product for the type (`multiplies` is false: in bfloat16, and without AVX) torch's is the one to use.
    """

    rnn_forward: Callable[..., None]
    rnn_backward: Callable[..., None]
    lstm_forward: Callable[..., None]
    lstm_backward: Callable[..., None]
    gru_forward: Callable[..., None]
    gru_backward: Callable[..., None]

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        self.dtype = dtype
        self.library = library
        self.multiplies = hasattr(library, "product")
        for name, arguments in STEPS.items():
            function = getattr(library, name)
            function.argtypes = [_COUNT, _COUNT, *arguments]
            function.restype = None
            setattr(self, name, functools.partial(_step, function))
        if self.multiplies:
            library.packed_size.argtypes, library.packed_size.restype = [_COUNT] * 2, _COUNT
            library.pack.argtypes = [_COUNT] * 2 + [_POINTER, _COUNT, _COUNT, _POINTER]
            library.product.argtypes = [_COUNT] * 3 + [_POINTER] * 3
            library.pack.restype = library.product.restype = None

    def at(self, tensor: Tensor) -> int:
        """The address of `tensor`."""
        return tensor.data_ptr()

    def each(self, tensor: Tensor) -> Sequence[Any]:
        """The address of tensor[t] for all t."""
        size = tensor.stride(0) * tensor.element_size()
        return range(tensor.data_ptr(), tensor.data_ptr() + len(tensor) * size, size)

    def bind(self, name: str, B: int, H: int) -> Callable[..., None]:
        """The step of this name over a batch of B and H units, told of tensors by their addresses."""
        return functools.partial(getattr(self.library, name), B, H)

    def product(self, W: Tensor, M: int) -> Callable[[Any, Any], None]:
        """A function of a (M, K) and out (M, N) that puts a W into out, for a W (K, N) that stays."""
        (K, N), library = W.shape, self.library
        packed = torch.empty(library.packed_size(K, N), dtype=self.dtype)
        library.pack(K, N, W.data_ptr(), *W.stride(), packed.data_ptr())

        def multiply(a: int, out: int) -> None:
            library.product(M, K, N, a, packed.data_ptr(), out)

        return multiply


def _step(function: Callable[..., None], *arguments: Any) -> None:
    """Call a step: B and H are the last argument's shape, a tensor is its address, None is NULL."""
    pointers = (item.data_ptr() if isinstance(item, Tensor) else item for item in arguments)
    function(*arguments[-1].shape, *pointers)


@functools.cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for tensors of `dtype`, compiled if they are not yet; None where they cannot be had."""
    library = load(_STORE.get(dtype, ""))[0]
    return Kernels(library, dtype) if library else None


def why_no_kernels() -> str:
    """Why `kernels` gives None for float32."""
    return load(_STORE[torch.float32])[1]


@functools.cache
def load(store: str) -> tuple[ctypes.CDLL | None, str]:
    """The library for one ``-DSTORE``, or None, and why."""
    if os.environ.get("CHARLM_KERNELS", "").lower() in ("off", "0", "no"):
        return None, "CHARLM_KERNELS is off"
    if not store:
        return None, "no kernels for this type of number"
    if os.name != "posix":
        return None, "kernels are compiled on Linux and macOS only"
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if not shutil.which(compiler[0]):
        return None, f"there is no C compiler {compiler[0]}"
    try:
        return _build(compiler, store), f"compiled by {compiler[0]}"
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler[0]} could not compile them: {output.strip().splitlines()[-1]}"


def _build(compiler: list[str], store: str) -> ctypes.CDLL:
    """Compile `kernels.c` into the cache folder, or find it there."""
    openmp = _torch_openmp()
    flags = [*_FLAGS, f"-DSTORE={store}", "-fopenmp" if openmp else "-fopenmp-simd"]
    machine = _run([*compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull], check=False)
    if machine.returncode == 0:
        flags.append("-march=native")
    # Everything that the result depends on, so that a home shared by several machines is safe.
    parts = [_SOURCE.read_bytes(), " ".join([*compiler, *flags]).encode(), machine.stdout.encode()]
    name = f"kernels-{store}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if folder and (folder / name).is_file():
        return _open(folder / name, openmp)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / name
        # Linked without OpenMP's library: its functions are those that torch has loaded already, so that
        # both share one pool of threads.
        _run([*compiler, *flags, "-c", str(_SOURCE), "-o", f"{made}.o"])
        unresolved = ["-undefined", "dynamic_lookup"] if os.uname().sysname == "Darwin" else []
        _run([*compiler, "-shared", *unresolved, f"{made}.o", "-o", str(made), "-lm"])
        if folder:
            made = made.replace(folder / name)
        return _open(made, openmp)


def _open(path: Path, openmp: str | None) -> ctypes.CDLL:
    if openmp:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _run(command: list[str], check: bool = True) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=120)


def _torch_openmp() -> str | None:
    """The OpenMP library with GCC's interface that torch has loaded, where that can be told."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*", loaded)
    return found.group() if found else None


def keep_memory() -> None:
    """Have glibc keep what is freed for the next allocation, large blocks too.

    A training step allocates and frees the same large blocks each time. Given back to the kernel, all their
    pages fault anew: a quarter of the step's time. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _cache_folder() -> Path | None:
    """The folder for what was compiled, made if need be; None where none is ours alone to write to."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(home) if home else Path.home() / ".cache") / "charlm"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    ours = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if ours and os.access(folder, os.W_OK) else None
