import pytest
import torch

from charlm.config import ModelConfig
from charlm.errors import ConfigError
from charlm.nn.device import autocast, choose_device, choose_precision, choose_threads

CPU = torch.device("cpu")


def test_cpu_is_available_and_unknown_devices_raise_an_error():
    assert choose_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"'cuda:99'.*cpu"):
        choose_device("cuda:99")


@pytest.mark.parametrize(("cuda", "mps", "name"), [(2, False, "cuda:0"), (0, True, "mps"), (0, False, "cpu")])
def test_auto_prefers_cuda_or_mps_to_the_cpu(monkeypatch, cuda, mps, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto") == torch.device(name)


@pytest.fixture
def cpu(monkeypatch):
    """A function that sets what torch says of the CPU: its capability and the instructions it has."""

    def set_(capability, *instructions):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        for name in ("avx512", "avx512_bf16", "amx_tile"):
            value = name in instructions
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda v=value: v, raising=False)

    return set_


@pytest.mark.parametrize(
    ("capability", "instructions", "dtype"),
    [
        ("AVX512", ["avx512", "avx512_bf16"], torch.bfloat16),
        ("AVX512", ["avx512", "amx_tile"], torch.bfloat16),
        ("AVX512", ["avx512"], torch.float32),
        ("AVX2", ["avx512", "avx512_bf16"], torch.float32),  # ATEN_CPU_CAPABILITY=avx2
        ("DEFAULT", [], torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_has_instructions_for_it(cpu, capability, instructions, dtype):
    cpu(capability, *instructions)
    assert choose_precision("auto", CPU)[0] == dtype
    assert choose_precision("float32", CPU)[0] == torch.float32


def test_bfloat16_needs_avx512(cpu):
    cpu("AVX512", "avx512")
    assert choose_precision("bfloat16", CPU)[0] == torch.bfloat16
    for capability, instructions in (("AVX2", ["avx512"]), ("AVX512", [])):
        cpu(capability, *instructions)
        with pytest.raises(ConfigError, match="bfloat16.*float32"):
            choose_precision("bfloat16", CPU)


@pytest.mark.parametrize(
    ("wanted", "environment", "rows", "threads"),
    [(3, "2", 1, 3), (None, "2", 1, 8), (None, "", 1, 1), (None, "", 64, 8)],
)
def test_threads_depend_on_the_size_of_the_model(monkeypatch, wanted, environment, rows, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)  # as torch takes it from the variable
    assert choose_threads(wanted, ModelConfig(hidden_size=192), rows)[0] == threads


def test_autocast_multiplies_in_the_precision():
    a = torch.ones(2, 2)
    for precision in (torch.float32, torch.bfloat16):
        with autocast(CPU, precision):
            assert (a @ a).dtype == precision
