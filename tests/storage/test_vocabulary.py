import pytest

from charlm.config import Config, CorpusConfig, ModelConfig
from charlm.errors import CharlmError, ConfigError
from charlm.nn.model import CharLM
from charlm.storage.model_file import save_model
from charlm.storage.vocabulary import read_vocabulary
from charlm.text.vocab import Vocab


def read(name, **options):
    return read_vocabulary(CorpusConfig(vocabulary=str(name), **options))


def test_a_text_gives_its_characters_in_the_order_of_their_first_appearance(tmp_path):
    path = tmp_path / "letters"
    path.write_bytes("\ufeffba\r\nnana A\ufffda\u0301".encode())
    vocab = read(path, lowercase=True)
    assert (vocab.characters, vocab.unknown) == ("ba\nn A\ufffd\u0301", None)
    path.write_bytes("ñé".encode("latin-1"))
    assert read(path, encoding="latin-1").characters == "ñé"
    path.write_text("abcdefgh{}")  # as in a model file, the ninth byte is a brace
    assert read(path).characters == "abcdefgh{}"
    assert read_vocabulary(CorpusConfig()) is None


def test_a_model_or_a_run_gives_its_vocabulary_with_its_unknown(tmp_path):
    config = Config(model=ModelConfig(hidden_size=6, embedding_size=3))
    (tmp_path / "config.yaml").touch()
    for vocab in (Vocab("b\ufffda", 3), Vocab("b\ufffda")):
        save_model(tmp_path / "model.safetensors", CharLM(3, config.model), vocab, config, {})
        for name in (tmp_path, tmp_path / "model.safetensors"):
            assert (read(name).characters, read(name).unknown) == (vocab.characters, vocab.unknown)


def test_names_of_neither_and_empty_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="corpus.vocabulary is '.*missing'"):
        read(tmp_path / "missing")
    with pytest.raises(ConfigError, match="corpus.vocabulary"):
        read("x" * 5000)
    (tmp_path / "empty").touch()
    with pytest.raises(CharlmError, match="empty has no characters"):
        read(tmp_path / "empty")
