"""Read the model and the vocabulary that a training starts from."""

import contextlib
from pathlib import Path

from charlm.config import Config, CorpusConfig
from charlm.errors import CharlmError, ConfigError, one_line
from charlm.nn.model import CharLM
from charlm.storage.header import is_container, read_header
from charlm.storage.model_file import load_model
from charlm.storage.run import Run, find_model
from charlm.text.read import TextFile
from charlm.text.vocab import Vocab


def read_vocabulary(config: CorpusConfig) -> Vocab | None:
    """Return the vocabulary of ``corpus.vocabulary``, or None if that is null.

    A text file, in the encoding of the corpus, gives its characters, each once, in the order of their first
    appearance; line ends are read as LF, and nothing else is changed. A model file or a run gives its
    vocabulary, with its unknown class.

    Raises `ConfigError` for another name, and `CharlmError` for a file that is empty or cannot be read.
    """
    if config.vocabulary is None:
        return None
    path, is_text = Path(config.vocabulary), False
    with contextlib.suppress(OSError, RuntimeError):  # a name too long for the file system, ~nobody
        path = path.expanduser()
        is_text = path.is_file() and not is_container(path)
    if is_text:
        characters: dict[str, None] = {}
        for piece in TextFile(path, encoding=config.encoding).pieces():
            characters |= dict.fromkeys(piece)
        if not characters:
            raise CharlmError(f"corpus.vocabulary: the file {path} has no characters")
        return Vocab("".join(characters))
    try:
        return _of_model(find_model(str(path)))
    except ConfigError:
        named = one_line(repr(config.vocabulary))
        raise ConfigError(
            f"corpus.vocabulary is {named}, which is not found; allowed: a text file, a model file or a run "
            "that has a model"
        ) from None


def read_initial(config: Config, run: Run) -> tuple[CharLM | None, Vocab | None]:
    """Return the model from which a training in `run` starts, and the vocabulary that it begins with, if any.

    The vocabulary of a run that was saved is read from its last model, so that the files it was made from are
    no longer needed; its weights are restored from its state.
    """
    if (config.train.init_from or config.corpus.vocabulary) and run.last.is_file():
        return None, _of_model(run.last)
    if config.train.init_from:
        loaded = load_model(find_model(config.train.init_from))
        return loaded.model, loaded.vocab
    return None, read_vocabulary(config.corpus)


def _of_model(path: Path) -> Vocab:
    header = read_header(path)
    return Vocab(header.vocab, header.unknown_kinds)
