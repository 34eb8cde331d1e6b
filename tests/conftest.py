import os
import random
import string
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from charlm.cli import main
from charlm.config import from_data
from charlm.text import read
from charlm.text.corpus import Corpus

ROOT = Path(__file__).parents[1]
PRECISION = os.environ.get("CHARLM_TEST_PRECISION", "float32")  # what auto resolves to; see make test-matrix

# The settings of a model that trains in a moment.
TINY = [
    "model.hidden_size=12",
    "model.embedding_size=5",
    "batches.batch_size=4",
    "batches.seq_len=8",
    "batches.stride=8",
    f"train.precision={PRECISION}",
    "train.device=cpu",
]


# Texts in pieces, with characters that combine with their neighbours or change how a line is read.
PIECES = st.lists(
    st.text(
        st.sampled_from(
            "aAbΣé \n\n\r\r'.\u0301\u0327\u0344\u1100\u1161\u11a8가각中か\u3099ﬁßİ\u00ad\u0f73\u0f71"
            "\u09c7\u09be\ufeff\u200d\U0001f469\U0010ffff"
        ),
        max_size=6,
    ),
    max_size=8,
)


def strip_gutenberg(text):
    """Return what is left of `read.strip_pieces` for a text in one piece."""
    pieces = list(read.strip_pieces(lambda: iter([text])))
    begin = max((place + 1 for place, piece in enumerate(pieces) if piece is None), default=0)
    return "".join(pieces[begin:])


def vocabulary(text):
    """Return the vocabulary of `text`."""
    return Corpus.from_text(text, (1.0, 0.0, 0.0)).vocab


def cut(whole, size):
    """Return `whole` in pieces of `size`."""
    return iter([whole[start : start + size] for start in range(0, len(whole), size)])


def configure(*overrides):
    """Return the tiny model's configuration with the given overrides."""
    return from_data({}, "", [*TINY, *overrides])


def settings(*overrides):
    """Return the tiny model's overrides and more as command-line arguments."""
    return [part for override in (*TINY, *overrides) for part in ("--set", override)]


# On a busy machine an example may take any time.
hypothesis_settings.register_profile("charlm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("charlm")


def pytest_configure(config):
    """End a run in bfloat16 on a processor that lacks it."""
    if (
        PRECISION == "bfloat16"
        and not torch.cpu._is_avx512_supported()
        and not hasattr(config, "workerinput")
    ):
        pytest.exit("CHARLM_TEST_PRECISION=bfloat16 needs AVX-512, which this processor lacks", returncode=0)


@pytest.fixture(autouse=True, scope="session")
def _as_on_another_machine():
    """Use one thread and float32 unless `make test-matrix` sets others."""
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads would only wait for each other
    torch.set_num_threads(int(threads))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            patch.setattr(torch.cpu, name, lambda: PRECISION == "bfloat16", raising=False)
        yield


@pytest.fixture
def threads():
    """Set the number of threads, and restore it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def words():
    """Return 2,000 characters of invented words, with accents and line ends."""
    draw = random.Random(0)
    letters = string.ascii_lowercase[:9] + "ñé"
    text = " ".join("".join(draw.choices(letters, k=draw.randint(1, 7))) for _ in range(700))
    return text[:400] + "\n" + text[401:1999] + "\n"


@pytest.fixture
def folder(tmp_path, monkeypatch, words):
    """Change to an empty folder that contains corpus.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(words, encoding="utf-8")
    return tmp_path


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def charlm(folder, capfd):
    """Run commands in this process: charlm("train", ...) -> (code, out, err)."""

    def run(*args):
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def trained(charlm):
    """Train a run named `tiny` for three steps on corpus.txt."""
    outcome = charlm("train", "--name", "tiny", *settings("corpus.source=corpus.txt", "train.max_steps=3"))
    assert outcome.code == 0, outcome.err
    return Path("runs/tiny")


def process(*args, cwd, stdin=None, **options):
    """Start the command as a separate process."""
    return subprocess.Popen(
        [sys.executable, "-m", "charlm", *map(str, args)],
        cwd=cwd,
        stdin=stdin if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **options,
    )
