"""The optional compiled part: compiles `kernels.c` with the machine's C compiler and loads it.

It is compiled at first use, once for each type of number, and kept in `files.cache_folder` if that is safe;
else it is compiled in each process. The file's name contains its checksum, which is checked before it is
loaded. Without a compiler, or with ``CHARLM_KERNELS=off`` in the environment, `kernels` returns None, and
`choose_implementation` takes another. ``ATEN_CPU_CAPABILITY`` limits the kernels' instructions as torch's.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charlm.errors import CharlmError
from charlm.files import cache_folder, is_ours, write_atomically

_SOURCE = Path(__file__).with_name("kernels.c")  # it includes the others
_SOURCES = (_SOURCE, *(_SOURCE.with_stem(f"kernels_{part}") for part in ("sequences", "training", "writing")))
_FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden"]
_NATIVE = ["-march=native"]
_STORE = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
_COUNT, _POINTER, _FLAG, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_double
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # the types of the result and of the arguments
    "packed_size": (_COUNT, [_COUNT, _COUNT, _FLAG]),
    "sequence_forward": (None, [_POINTER]),
    "sequence_backward": (None, [_POINTER]),
    "panels_size": (_COUNT, [_COUNT, _COUNT]),
    "multiply": (None, [_POINTER]),
    "gather": (None, [_COUNT] * 4 + [_POINTER] * 3),
    "drop": (None, [_COUNT] * 2 + [_REAL, ctypes.c_uint64] + [_POINTER] * 2),
    "cross_entropy": (None, [_COUNT] * 3 + [_POINTER] * 4),
}
_UNROUNDED: dict[str, tuple[Any, list[Any]]] = {  # not in bfloat16
    "squares": (_REAL, [_COUNT] * 3 + [_POINTER] * 2),
    "adamw": (None, [_COUNT] * 3 + [_POINTER] * 2),
    "laid_size": (_COUNT, [_COUNT] * 2),
    "lay": (None, [_COUNT] * 3 + [_POINTER] * 2),
    "step": (_FLAG, [_POINTER, _COUNT] + [_POINTER] * 7),
    "draw": (_FLAG, [_COUNT] * 2 + [_POINTER] * 5),
}


def _fields(kind: type, *names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names)


class Sequence(ctypes.Structure):
    """A layer, its sequence and room for the results; kernels_sequences.c says what the fields are."""

    _fields_ = (
        *_fields(_COUNT, "cell", "T", "B", "H", "threads", "state_step"),
        *_fields(_POINTER, "x", "ids", "W_hh", "packed", "b_hn", "y", "state", "gates", "dy", "dx", "du"),
        *_fields(_POINTER, "dh", "dstate"),
    )


class Multiplication(ctypes.Structure):
    """The operands of a product and room for its result; kernels_training.c says what the fields are."""

    _fields_ = (
        *_fields(_COUNT, "threads", "M", "N", "K", "a_row", "a_column", "b_row", "b_column"),
        *_fields(_POINTER, "a", "b", "bias", "packed", "sums", "out"),
    )


class Weights(ctypes.Structure):
    """Weights, their gradient, moments and average; kernels_training.c says what the fields are."""

    _fields_ = (("n", _COUNT), *_fields(_POINTER, "w", "g", "m", "v", "average"), ("decay", _REAL))


class AdamW(ctypes.Structure):
    """The numbers of a step of AdamW; kernels_training.c says what they are."""

    _fields_ = _fields(_REAL, "scale", "limit", "rate", "beta1", "beta2", "eps", "correction", "share")


class Matrix(ctypes.Structure):
    """A matrix (K, N), laid out for writing text."""

    _fields_ = _fields(_COUNT, "kind", "K", "N") + _fields(_POINTER, "weights", "scale", "bias")


class Layer(ctypes.Structure):
    """A layer's matrices, and the GRU's b_hn or NULL."""

    _fields_ = _fields(Matrix, "input", "recurrent") + _fields(_POINTER, "b_hn")


class Model(ctypes.Structure):
    """A model, laid out for writing text."""

    _fields_ = (
        *_fields(_COUNT, "cell", "layers", "H", "V"),
        *(("table", _POINTER), ("layer", ctypes.POINTER(Layer)), ("head", Matrix)),
    )


class DrawOptions(ctypes.Structure):
    """How `kernels.c` draws characters, as in `inference.sampling.Sampling`; 0 turns a filter off."""

    _fields_ = _fields(_REAL, "temperature") + _fields(_COUNT, "top_k") + _fields(_REAL, "top_p", "min_p")


class Kernels:
    """The functions of `kernels.c` for one type of number, over contiguous CPU tensors.

    wide: the type of arithmetic, sums and states: float32 for bfloat16.
    writes: whether they write text and update weights too, which they do not in bfloat16.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        self.dtype, self.library = dtype, library
        self.wide = torch.float32 if dtype == torch.bfloat16 else dtype
        self.writes = dtype != torch.bfloat16
        for name, (result, arguments) in {**_FUNCTIONS, **(_UNROUNDED if self.writes else {})}.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments

    def sequence(self, backward: bool, cell: int, W_hh: Tensor, **fields: Any) -> None:
        """Compute a layer over all steps, forward or backward; a field is a number, a tensor or None."""
        H, W_hh = W_hh.shape[1], W_hh.to(self.dtype).contiguous()
        packed = W_hh.new_empty(self.library.packed_size(cell, H, backward))
        fields = {**fields, "W_hh": W_hh, "packed": packed}
        values = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items()}
        call = self.library.sequence_backward if backward else self.library.sequence_forward
        sequence = Sequence(cell=cell, H=H, threads=torch.get_num_threads(), **values)
        call(ctypes.addressof(sequence))

    def multiply(self, a: Tensor, b: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
        """Return a b + bias, (M, N), for a (M, K), b (K, N), both with any strides, and bias (N,).

        The result is in self.dtype or, with `wide`, in the type of arithmetic, in which the sums are.
        """
        (M, K), N = a.shape, b.shape[1]
        wide = wide or self.dtype == self.wide
        if a.stride(1) != 1 and not (wide and a.stride(0) == 1):
            a = a.contiguous()
        out = a.new_empty(M, N, dtype=self.wide if wide else self.dtype)
        packed = b.new_empty(self.library.panels_size(K, N))
        bias = None if bias is None else bias.to(self.wide).contiguous()
        sums, rounded = (out, None) if wide else (None, out)
        pointers = (t if t is None else t.data_ptr() for t in (a, b, bias, packed, sums, rounded))
        call = Multiplication(torch.get_num_threads(), M, N, K, *a.stride(), *b.stride(), *pointers)
        self.library.multiply(ctypes.addressof(call))
        return out

    def gather(self, a: Tensor, ids: Tensor, rows: int) -> Tensor:
        """Return the sums of the rows of a (M, N) with the same id, (rows, N), in the type of arithmetic."""
        (M, N), table = a.shape, a.new_empty(rows, a.shape[1], dtype=self.wide)
        pointers = (ids.data_ptr(), a.data_ptr(), table.data_ptr())
        self.library.gather(torch.get_num_threads(), M, N, rows, *pointers)
        return table

    def drop(self, y: Tensor, p: float, seed: int) -> Tensor:
        """Return y with each number 0 with probability p, else divided by 1 - p; `seed` chooses which."""
        out = torch.empty_like(y)
        self.library.drop(torch.get_num_threads(), y.numel(), p, seed, y.data_ptr(), out.data_ptr())
        return out

    def cross_entropy(self, logits: Tensor, targets: Tensor, d: Tensor | None) -> Tensor:
        """Return the losses (M,) of logits (M, V), and write the gradient of their mean to `d`."""
        (M, V), losses = logits.shape, logits.new_empty(len(logits), dtype=self.wide)
        pointers = (each if each is None else each.data_ptr() for each in (logits, targets, losses, d))
        self.library.cross_entropy(torch.get_num_threads(), M, V, *pointers)
        return losses

    def norm(self, tensors: list[Tensor]) -> float:
        """Return the norm of all numbers of contiguous `tensors` in self.dtype, summed in float64."""
        rows = (Weights * len(tensors))(*(Weights(n=each.numel(), g=each.data_ptr()) for each in tensors))
        sums = torch.empty(64 * len(rows), dtype=torch.float64)  # PARTS in kernels_training.c
        total = sum(row.n for row in rows)
        threads = torch.get_num_threads()
        return float(self.library.squares(threads, len(rows), total, rows, sums.data_ptr()) ** 0.5)

    def adamw(self, weights: list[tuple[Tensor | None, ...]], decays: list[float], **options: float) -> None:
        """Take a step with each (w, g, m, v, average or None), contiguous, of one shape and in self.dtype."""
        rows = (Weights * len(weights))()
        for row, tensors, decay in zip(rows, weights, decays, strict=True):
            assert tensors[0] is not None
            pointers = (each if each is None else each.data_ptr() for each in tensors)
            row.__init__(tensors[0].numel(), *pointers, decay)
        total = sum(row.n for row in rows)
        self.library.adamw(torch.get_num_threads(), len(rows), total, rows, ctypes.byref(AdamW(**options)))

    def draw(self, logits: Tensor, uniforms: Tensor, options: DrawOptions) -> Tensor | None:
        """Draw ids (B,) from logits (B, V), sorted in descending order where `options` has a filter.

        uniforms: numbers (B,) drawn uniformly from [0, 1). Returns None for logits that are not finite.
        """
        B, V = logits.shape
        up_to, ids = uniforms.new_empty(V), logits.new_empty(B, dtype=torch.int64)
        pointers = (tensor.data_ptr() for tensor in (logits, uniforms, up_to, ids))
        return None if self.library.draw(B, V, ctypes.addressof(options), *pointers) else ids

    def matrix(self, weights: Tensor, scale: Tensor | None, bias: Tensor | None) -> tuple[Matrix, list[Any]]:
        """Lay out weights (N, K) in self.dtype, bfloat16 or int8, with scale and bias (N,).

        Return the matrix and the tensors that it points to.
        """
        (N, K), weights = weights.shape, weights.contiguous()
        kind = {torch.bfloat16: 1, torch.int8: 2}.get(weights.dtype, 0)
        laid = weights.new_empty(self.library.laid_size(K, N))
        self.library.lay(kind, K, N, weights.data_ptr(), laid.data_ptr())
        scale = None if scale is None else scale * 2.0**-24
        rows = [tensor if tensor is None else tensor.to(self.dtype).contiguous() for tensor in (scale, bias)]
        pointers = (tensor if tensor is None else tensor.data_ptr() for tensor in rows)
        return Matrix(kind, K, N, laid.data_ptr(), *pointers), [laid, *rows]


@functools.cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """Return the kernels for tensors of `dtype`, compiled if necessary; None where that is impossible."""
    library = load(_STORE.get(dtype, ""))[0]
    return Kernels(library, dtype) if library else None


@functools.cache
def load(store: str) -> tuple[ctypes.CDLL | None, str]:
    """Return the library for one ``-DSTORE`` or None, and the reason."""
    if os.environ.get("CHARLM_KERNELS", "").lower() in ("off", "0", "no"):
        return None, "CHARLM_KERNELS is off"
    if not store:
        return None, "no kernels for this type of number"
    if os.name != "posix":
        return None, "kernels are compiled on Linux and macOS only"
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        return None, f"CC is not a command: {error}"
    if not shutil.which(compiler[0]):
        return None, f"C compiler {compiler[0]} not found"
    folder, why = cache_folder(), ""
    # Clang on Linux, for example, needs another OpenMP library than the one that torch has loaded: then what
    # it compiles cannot be loaded, and is compiled without threads.
    builds = [_Build(compiler, store, openmp) for openmp in dict.fromkeys((_torch_openmp(), None))]
    # Look for both before compiling one: else the one that cannot be loaded is compiled at each start.
    for build in builds:
        if folder and (library := build.cached(folder)):
            return library, f"compiled by {compiler[0]}"
    # The cache folder may be full, or on a disk from which nothing can be executed.
    for place, build in itertools.product(dict.fromkeys((folder, None)), builds):
        try:
            return build.compiled(place), f"compiled by {compiler[0]}"
        except (OSError, subprocess.SubprocessError, CharlmError) as error:
            output = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            why = (output.strip().splitlines() or ["it gave no reason"])[-1]
    return None, f"{compiler[0]} could not compile them: {why}"


class _Build:
    """One way to compile `kernels.c`; openmp: the library with its threads, or None for one thread."""

    def __init__(self, compiler: list[str], store: str, openmp: str | None):
        self.compiler, self.openmp = compiler, openmp
        self.flags = [*_FLAGS, f"-DSTORE={store}", "-fopenmp" if openmp else "-fopenmp-simd"]
        self.level = _level()
        # Everything that the result depends on, so that several machines can share a home folder.
        parts = [
            *(source.read_bytes() for source in _SOURCES),
            " ".join([*compiler, *self.flags, *self.level]).encode(),
            _machine(compiler),
        ]
        self.name = f"kernels-{store}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}"

    def cached(self, folder: Path) -> ctypes.CDLL | None:
        """Load the library from `folder`; a damaged one, which would end the process, is deleted."""
        for path in folder.glob(f"{self.name}-*.so"):
            with contextlib.suppress(OSError):
                if not is_ours(path):
                    continue
                if path.name == f"{self.name}-{_checksum(path)}.so":
                    return _open(path, self.openmp)
                path.unlink()
        return None

    def compiled(self, folder: Path | None) -> ctypes.CDLL:
        """Compile the library, load it and keep it in `folder`, if that is given and can be written to."""
        if folder and not os.access(folder, os.W_OK):
            folder = None
        level = self.level if self.level != _NATIVE or _macros(self.compiler) else []
        command = [*self.compiler, *self.flags, *level]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / f"{self.name}.so"
            # Linked without an OpenMP library: its functions are those that torch has loaded already, so that
            # both use the same threads.
            _run([*command, "-c", str(_SOURCE), "-o", f"{made}.o"])
            darwin = os.uname().sysname == "Darwin"
            unresolved = ["-undefined", "dynamic_lookup"] if darwin else ["-Wl,-Bsymbolic"]
            _run([*self.compiler, "-shared", *unresolved, f"{made}.o", "-o", str(made), "-lm"])
            made.chmod(0o700)
            library = _open(made, self.openmp)
            if folder:
                write_atomically(folder / f"{self.name}-{_checksum(made)}.so", made.replace)
            return library


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _level() -> list[str]:
    """Return the compiler's options for the instructions that torch uses."""
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        return _NATIVE
    return {"DEFAULT": [], "AVX2": ["-mavx2", "-mfma"]}.get(torch.backends.cpu.get_cpu_capability(), _NATIVE)


def _machine(compiler: list[str]) -> bytes:
    """Identify the compiler and the kind of processor, from files where possible."""
    try:
        program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
        known = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
        lines = [line for line in first.splitlines() if line.startswith(known)]
        found = program.stat()
    except OSError:
        lines = []
    if not lines:
        return _macros(compiler)  # slower: it runs the compiler
    parts = [str(program), str(found.st_size), str(found.st_mtime_ns), *lines]
    return "\n".join(parts).encode(errors="surrogateescape")


def _macros(compiler: list[str]) -> bytes:
    """Return the compiler's macros for this processor; nothing if it does not accept -march=native."""
    done = _run([*compiler, *_NATIVE, "-dM", "-E", "-x", "c", os.devnull], check=False)
    return done.stdout.encode() if done.returncode == 0 else b""


def _open(path: Path, openmp: str | None) -> ctypes.CDLL:
    if openmp:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _run(command: list[str], check: bool = True) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, check=check, capture_output=True, text=True, errors="replace", timeout=120)


def _torch_openmp() -> str | None:
    """Return the path of the OpenMP library that torch has loaded, or None where it is not found."""
    try:
        loaded = os.fsdecode(Path("/proc/self/maps").read_bytes())  # names can be any bytes
    except OSError:
        return None
    found = re.search(r" (/.*/lib(?:gomp|iomp5|omp)\b[^/]*\.so[^/]*)$", loaded, re.M)
    return found.group(1) if found else None


def keep_memory() -> None:
    """Make glibc's allocator keep freed memory, large blocks too, for the next allocation.

    This changes the whole process, so only a program's main function should call it. A training step
    allocates and frees the same large blocks each time; if they are returned to the kernel, all their pages
    fault again, which takes a quarter of the step. With other C libraries this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
