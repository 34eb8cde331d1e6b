import json

import pytest

from charlm.config import KEYS, reference
from charlm.files import safe_cache_folder


@pytest.mark.parametrize("width", [60, 80, 200])
def test_config_shows_every_key_within_the_terminal(charlm, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    done = charlm("config")
    lines = done.out.splitlines()
    assert done.code == 0 and max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == KEYS
    for row in reference():
        assert all(word in done.out for word in (*row.allowed.split(), *row.description.split())), row.key


def test_config_shows_the_selected_keys(charlm):
    done = charlm("config", "corpus", "lr")
    assert [line.split()[0] for line in done.out.splitlines() if not line.startswith(" ")] == [
        *(key for key in KEYS if key.startswith("corpus.")), "train.lr",
    ]  # fmt: skip
    wrong = charlm("config", "hiden_size")
    assert wrong.code == 2 and wrong.out == "" and "'hiden_size'" in wrong.err and "hidden_size?" in wrong.err


def test_config_as_json(charlm):
    rows = json.loads(charlm("config", "--json").out)
    assert [row["key"] for row in rows] == KEYS
    assert set(rows[0]) == {"key", "default", "allowed", "description"}
    (betas,) = json.loads(charlm("config", "betas", "--json").out)
    assert betas["default"] == [0.9, 0.99]


def test_cache_shows_and_clears_texts_and_kernels(charlm, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("CHARLM_CACHE_GB", "2")
    text, library = safe_cache_folder("corpora") / "abc-def", safe_cache_folder() / "kernels-f32-1.so"
    writing = text.with_name(".abc.tmp")
    for path, size in ((text, 3_000_000), (library, 2_000), (writing, 10)):
        path.write_bytes(b"0" * size)
    done = charlm("cache")
    assert done.code == 0 and str(folder / "cache/charlm") in done.out
    for part in ("corpora/abc-def", "3.0 MB", "kernels-f32-1.so", "2.0 kB", "2.0 GB"):
        assert part in done.out
    assert text.exists() and library.exists()
    done = charlm("cache", "--clear")
    assert done.code == 0 and "3.0 MB" in done.out and "2.0 kB" in done.out
    assert not text.exists() and not library.exists() and writing.exists()
    assert "0 texts" in charlm("cache").out
