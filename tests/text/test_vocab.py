import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm.errors import CharlmError, UnknownCharactersError
from charlm.text.vocab import UNKNOWN, Vocab
from conftest import vocabulary

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.fixture(autouse=True, scope="module")
def _pieces():
    """Encode short texts in several pieces too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("charlm.text.vocab._CHUNK", 3)
        yield


def test_most_frequent_first_ties_by_code_point():
    assert vocabulary("b aab\nñ c").characters == " ab\ncñ"


@given(TEXTS)
def test_a_text_survives_encoding(content):
    vocab = vocabulary(content)
    assert vocab.characters == "".join(sorted(set(content), key=lambda char: (-content.count(char), char)))
    assert vocab.decode(vocab.encode(content)) == content


@given(TEXTS, TEXTS)
def test_unknown_characters_are_skipped_replaced_or_refused(known, content):
    vocab = vocabulary(known)
    kept = "".join(char for char in content if char in known)
    stand_in = vocab.replacement
    assert vocab.decode(vocab.encode(content, "skip")) == kept
    replaced = "".join(char if char in known else stand_in for char in content)
    assert vocab.decode(vocab.encode(content, "replace")) == replaced
    if kept != content:
        with pytest.raises(UnknownCharactersError):
            vocab.encode(content)


def test_the_error_names_each_unknown_character_and_its_position():
    with pytest.raises(UnknownCharactersError) as caught:
        Vocab("ab ").encode("aΩb\udc80Ω", name="the prefix")
    message = str(caught.value)
    assert all(
        part in message for part in ("the prefix", "U+03A9", "position 1", "U+DC80", "position 3", "skip")
    )
    assert message.count("U+03A9") == 1
    message.encode()  # can be printed
    assert "' ' for each" in message
    with pytest.raises(UnknownCharactersError, match="'b' for each"):
        Vocab("ba").encode("Ω")


@given(TEXTS, TEXTS)
def test_the_unknown_class_is_read_for_all_characters_outside_the_vocabulary(known, content):
    known = "".join(dict.fromkeys(known.replace(UNKNOWN, "")))
    for characters in (known + UNKNOWN, UNKNOWN + known):
        vocab = Vocab(characters, 3)
        assert vocab.unknown == (characters.index(UNKNOWN), 3)
        read = "".join(char if char in known else UNKNOWN for char in content)
        assert vocab.decode(vocab.encode(content)) == read
        assert vocab.count_unknown(content) == read.count(UNKNOWN)
        assert vocab.decode(vocab.encode(content, "skip")) == read.replace(UNKNOWN, "")
        assert vocab.decode(vocab.writable) == known


def test_an_empty_text_has_no_ids_and_no_vocabulary():
    assert Vocab("ab").encode("").shape == (0,)
    assert Vocab("ab").encode("").dtype == torch.int32
    with pytest.raises(CharlmError, match="empty"):
        vocabulary("")


def test_unknown_characters_are_not_replaced_by_the_end_of_a_record():
    assert Vocab("\n\x1eab").replacement == "a"
    assert Vocab("ab ").replacement == " "
    assert Vocab("\n").replacement == "\n"
