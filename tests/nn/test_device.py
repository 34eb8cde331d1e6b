import pytest
import torch

from charlm.errors import ConfigError
from charlm.nn.device import autocast, choose_device, choose_precision

CPU = torch.device("cpu")


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match=r"'cuda:99' is not available.*cpu"):
        choose_device("cuda:99")


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_precision_is_bfloat16_where_the_cpu_has_it(monkeypatch, native, dtype):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    assert choose_precision("auto", CPU)[0] == dtype
    assert choose_precision("float32", CPU)[0] == torch.float32


def test_bfloat16_needs_avx512(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True, raising=False)
    assert choose_precision("bfloat16", CPU)[0] == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False, raising=False)
    with pytest.raises(ConfigError, match="take auto or float32"):
        choose_precision("bfloat16", CPU)


def test_autocast_multiplies_in_the_precision():
    a = torch.ones(2, 2)
    for precision in (torch.float32, torch.bfloat16):
        with autocast(CPU, precision):
            assert (a @ a).dtype == precision
