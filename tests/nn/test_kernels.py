"""The compiled part is optional, and stored in a folder that only its owner can write to."""

import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from charlm.files import cache_folder, is_ours
from charlm.nn import fused
from charlm.nn.kernels import native

needs_compiler = pytest.mark.skipif(native.kernels(torch.float32) is None, reason="no C compiler here")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("CHARLM_KERNELS", "CC"):
        monkeypatch.delenv(name, raising=False)
    native.load.cache_clear()
    yield tmp_path / "charlm"
    native.load.cache_clear()


@needs_compiler
def test_library_is_compiled_once_into_a_private_folder(cache, monkeypatch):
    library, reason = native.load("f32")
    assert library and "compiled by" in reason
    (kept,) = cache.iterdir()
    assert kept.suffix == ".so" and cache.stat().st_mode & 0o777 == 0o700
    commands, run = [], native._run
    monkeypatch.setattr(
        native, "_run", lambda command, **options: commands.append(command) or run(command, **options)
    )
    native.load.cache_clear()
    assert native.load("f32")[0] and not any("-shared" in command for command in commands)


@needs_compiler
def test_cache_folder_that_others_can_write_to_is_not_used(cache):
    cache.mkdir()
    cache.chmod(0o777)
    assert native.load("f32")[0]
    assert not list(cache.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="no such modes here")
@pytest.mark.parametrize(("mode", "safe"), [(0o700, True), (0o777, False), (0o1777, True)])
def test_cache_folder_that_others_can_rename_is_not_used(cache, mode, safe):
    cache.parent.chmod(mode)
    assert cache_folder() == (cache if safe else None)


@pytest.mark.skipif(os.name != "posix", reason="no such modes here")
def test_links_and_files_that_others_can_write_to_are_not_loaded(tmp_path):
    library, link = tmp_path / "a.so", tmp_path / "b.so"
    library.touch(mode=0o700)
    link.symlink_to(library)
    assert is_ours(library) and not is_ours(link)
    library.chmod(0o722)
    assert not is_ours(library)


@needs_compiler
def test_damaged_library_is_compiled_again(cache):
    native.load("f32")
    (library,) = cache.iterdir()
    content = library.read_bytes()
    library.unlink()  # this process has loaded it
    library.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    library.chmod(0o700)
    native.load.cache_clear()
    code = "from charlm.nn.kernels import native; print(native.load('f32')[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "compiled by" in done.stdout
    assert [file.read_bytes()[len(content) // 2 :].strip(b"\0") != b"" for file in cache.iterdir()] == [True]


@needs_compiler
def test_library_is_compiled_without_a_cache_folder(tmp_path, cache, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.load("f32")[0] and not cache.exists()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("CHARLM_KERNELS", "off", "CHARLM_KERNELS is off"),
        ("CC", "no-such-compiler", "no-such-compiler"),
        ("CC", "false", "false could not compile them"),
        ("CC", 'gcc "', "CC"),
    ],
)
def test_load_returns_the_reason_where_there_are_no_kernels(cache, monkeypatch, name, value, why):
    monkeypatch.setenv(name, value)
    library, reason = native.load("f32")
    assert library is None and why in reason


@needs_compiler
def test_kernels_use_the_openmp_library_of_torch():
    """One pool of threads: a second OpenMP library would fight torch's for the cores."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    code = (
        "import torch; from charlm.nn.kernels.native import kernels; kernels(torch.float32);"
        "print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    libraries = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(libraries) == 1


@needs_compiler
def test_cache_folder_that_forbids_execution_is_not_used(cache, monkeypatch):
    load = native._open

    def open_(path, openmp):
        if cache in path.parents:
            raise OSError("failed to map segment from shared object")
        return load(path, openmp)

    monkeypatch.setattr(native, "_open", open_)
    assert native.load("f32")[0] and list(cache.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_openmp_library_is_looked_up_beside_file_names_that_are_not_utf_8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9"
    with open(path, "wb+") as file:  # noqa: PTH123 - the name is bytes
        file.write(b"x")
        file.flush()
        with mmap.mmap(file.fileno(), 1):
            native._torch_openmp()


@needs_compiler
def test_sigmoid_and_tanh_have_a_small_relative_error_over_the_whole_range():
    """The sigmoid of a large negative number is the exponential function."""
    tiny, H = torch.finfo(torch.float32).tiny, 64  # results below `tiny` may be rounded to 0
    positive = torch.cat([torch.logspace(-44.8, 38.5, 20_028), torch.linspace(0, 100, 20_000)])
    x = torch.cat([positive, torch.tensor([0.0, torch.inf, 1.0, 1.0])])
    x = torch.cat([-x, x]).view(1, -1, H)
    B = x.shape[1]
    zero = torch.zeros(B, H)
    (y, _) = fused.rnn(x, None, torch.zeros(H, H), zero)
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=5e-7, atol=tiny)
    inputs = (x.repeat(1, 1, 4), None, torch.zeros(4 * H, H), None, zero, zero)
    _, _, gates = fused._forward(fused._LSTM, *inputs, keep=True)
    for gate in (0, 1, 3):
        found = gates[..., gate * H : (gate + 1) * H].double()
        torch.testing.assert_close(found, x.double().sigmoid(), rtol=5e-7, atol=tiny)


@pytest.fixture
def commands(monkeypatch):
    """The compiler's commands; clear it to count from there."""
    commands, run = [], native._run
    monkeypatch.setattr(
        native, "_run", lambda c, **options: commands.append(" ".join(c)) or run(c, **options)
    )
    return commands


@pytest.mark.parametrize("compiler", ["cc", "clang"])
def test_library_without_threads_is_compiled_once(cache, commands, monkeypatch, compiler):
    """As with clang, whose threads need another library than torch's; here for every compiler."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    load = native._open

    def open_(path, openmp):
        if openmp:
            raise OSError("undefined symbol: __kmpc_fork_call")
        return load(path, openmp)

    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(native, "_torch_openmp", lambda: "libgomp.so.1")
    if compiler == "cc":
        monkeypatch.setattr(native, "_open", open_)
    for expected in (True, False):
        native.load.cache_clear()
        commands.clear()
        assert native.load("f32")[0] and any(" -shared " in line for line in commands) == expected


@needs_compiler
def test_kernels_are_compiled_for_the_instructions_that_torch_uses(cache, commands, monkeypatch):
    expected = {None: "-march=native", "avx2": "-mavx2 -mfma", "default": ""}
    for limit, options in expected.items():
        commands.clear()
        native.load.cache_clear()
        monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
        if limit:
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", limit)
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", limit.upper)
        native.load("f32")
        first = next(line for line in commands if " -c " in line)
        assert [part for part in first.split() if part.startswith("-m")] == options.split()
