"""Any bytes either train a step or are refused with one line."""

import bz2
import gzip
import lzma
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charlm import config as configuration
from charlm.errors import CharlmError
from charlm.text.corpus import Corpus
from charlm.training.learner import Learner
from conftest import PIECES, TINY

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "latin-1"]
ENDINGS = {".txt": bytes, ".txt.gz": gzip.compress, ".txt.bz2": bz2.compress, ".txt.xz": lzma.compress}
encoded = st.builds(
    lambda pieces, encoding, times: ("".join(pieces) * times).encode(encoding, "replace"),
    PIECES,
    st.sampled_from(ENCODINGS),
    st.sampled_from([1, 40]),
)
hostile = st.sampled_from(
    [b"\xff", b"\0", b"\xed\xa0\x80", b"\xc3", b"\xef\xbb\xbf", b"\xf4\x90\x80\x80", b"\r"]
)


def attempt(data, ending=".txt", cut_off=0, changes=()):
    """Train a step on a file with `data`; return its loss or the error message."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        patch.setattr("charlm.text.read._PIECE", 64)
        patch.setattr("charlm.text.corpus.IN_MEMORY", 500)
        path = Path(folder, f"text{ending}")
        packed = ENDINGS[ending](data)
        path.write_bytes(packed[: len(packed) - cut_off])
        config = configuration.load(None, [*TINY, f"corpus.source={path}", "train.max_steps=1", *changes])
        try:
            learner = Learner(config, Corpus.load(config.corpus))
        except CharlmError as error:
            return str(error)
        return learner.step(*next(learner.remaining_batches()))[0]


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(
        encoded,
        st.binary(max_size=80),
        st.tuples(encoded, hostile, encoded).map(b"".join),
        st.text(max_size=3).map(lambda text: text.encode("utf-8", "replace") * 99),
    ),
    st.sampled_from([*ENDINGS, ".txt", ".txt"]),
    st.sampled_from([0, 0, 0, 1, 9]),
    st.sampled_from([(), ("corpus.keep=a-zé", "corpus.lowercase=true"), ("corpus.max_chars=60",)]),
)
@example(b"", ".txt", 0, ())
@example(b"", ".txt.gz", 0, ())
@example(b"\xef\xbb\xbf", ".txt", 0, ())
@example(b"a" * 400, ".txt", 0, ())
@example("\U0010ffff".encode() * 400, ".txt", 0, ())
@example("\u0301".encode() * 400, ".txt", 0, ())
@example(b"\r" * 400, ".txt", 0, ())
@example("שלום עולם ".encode() * 40, ".txt", 0, ())
def test_any_bytes_train_or_are_refused_in_one_line(data, ending, cut_off, changes):
    outcome = attempt(data, ending, cut_off, changes)
    if isinstance(outcome, float):
        assert outcome >= 0 and torch.isfinite(torch.tensor(outcome))
    else:
        assert outcome and "\n" not in outcome and len(outcome) < 400, outcome
        outcome.encode()  # can be printed


def test_text_without_a_line_end_trains(folder):
    assert attempt("á".encode() * 10**5) < 1e-3
