import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charlm.text.clean import Cleaner, clean
from conftest import PIECES, cut

SEEDS = "A-Za-záéíóúÁÉÍÓÚñÑüÜ"


def test_normal_form_case_and_kept_characters():
    assert clean("e\u0301") == "é"
    assert clean("é", normalize="NFD") == "e\u0301"
    assert clean("e\u0301", normalize="none") == "e\u0301"
    assert clean("¡Ea, señor!\n\nÁnimo: 12 ", keep=SEEDS, lowercase=True) == " ea señor ánimo "


@settings(max_examples=60, deadline=None)
@given(
    PIECES,
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD", "none"]),
    st.booleans(),
    st.sampled_from([None, SEEDS + "Σ'", "a\u0301]"]),
    st.sampled_from([None, "a", "e\u0301", "\n\n"]),
    st.sampled_from([None, 1, 7]),
)
@example(["Σ", "Σ", "a"], "none", True, None, None, None)
@example(["aΣ", "'", "\u0301", "a aΣ'"], "none", True, None, None, None)
@example(["a", "\u0301\u0327", "\u0327", "\u1100", "\u1161\u11a8"], "NFC", False, None, None, None)
def test_cleaning_in_pieces_equals_cleaning_at_once(pieces, form, lowercase, keep, start, max_chars):
    cleaner = Cleaner(form, lowercase, keep, start, max_chars)
    found = "".join([*map(cleaner.feed, pieces), cleaner.finish()])
    text = "".join(pieces)
    begin = text.find(start or "")
    assert cleaner.missed == (begin < 0)
    whole = text[begin:] if begin >= 0 else ""
    whole = whole if form == "none" else unicodedata.normalize(form, whole)
    whole = whole if keep is None else re.sub(f"[^{keep}]+", " ", whole)
    assert found == (whole.lower() if lowercase else whole)[:max_chars]
    assert cleaner.full == (len(found) == max_chars)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@settings(max_examples=50, deadline=None)
@given(char=st.characters(exclude_categories=["Cs"]), before=st.characters(exclude_categories=["Cs"]))
def test_characters_that_combine_are_not_separated(form, char, before):
    text = f"{before}{char}\u0301"
    cleaner = Cleaner(form)
    found = "".join([*map(cleaner.feed, cut(text, 1)), cleaner.finish()])
    assert found == unicodedata.normalize(form, text)


def test_few_characters_are_held_back():
    cleaner = Cleaner("NFC", lowercase=True)
    fed = given_back = 0
    for piece in ("中" * 1000, "Σ" * 1000, "أ" * 1000, "각" * 1000, "a" * 1000):
        fed += len(piece)
        given_back += len(cleaner.feed(piece))
        assert fed - given_back <= 2
