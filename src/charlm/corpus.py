"""`Corpus`: a text as encoded train, val and test splits, with the vocabulary of the train split."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from charlm import text
from charlm.config import CorpusConfig
from charlm.errors import CharlmError
from charlm.vocab import Vocab


@dataclass(frozen=True)
class Corpus:
    """Encoded splits: contiguous stretches of the clean text, in its order.

    train, val, test: ids of shape (N,), in the smallest integer type that holds the vocabulary.
    unseen: how many characters of val and test the train split lacks; they are left out.
    fingerprint: SHA-256 of the clean text.
    """

    vocab: Vocab
    train: Tensor
    val: Tensor
    test: Tensor
    unseen: int
    fingerprint: str
    files: tuple[Path, ...]

    @classmethod
    def load(cls, config: CorpusConfig) -> "Corpus":
        """Read, clean, split and encode the text that `config` names.

        Raises `CharlmError` for files that cannot be read and for an empty text.
        """
        files = tuple(text.find_files(config.source))
        content = text.read(files)
        if config.start is not None:
            begin = content.find(config.start)
            if begin < 0:
                raise CharlmError(
                    f"corpus.start {config.start!r} does not stand in {', '.join(map(str, files[:4]))}; "
                    "give words that do, or leave it out"
                )
            content = content[begin:]
        content = text.clean(content, **config.cleaning)[: config.max_chars]
        if not content or content.isspace():
            raise CharlmError(f"the corpus is empty: no text in {', '.join(map(str, files[:4]))}")
        return cls.from_text(content, config.split, files)

    @classmethod
    def from_text(
        cls, content: str, split: tuple[float, float, float] = (0.9, 0.05, 0.05), files: tuple[Path, ...] = ()
    ) -> "Corpus":
        """Split and encode a clean text; `split` gives the shares of train, val and test."""
        first, second = round(len(content) * split[0]), round(len(content) * (split[0] + split[1]))
        parts = content[:first], content[first:second], content[second:]
        vocab = Vocab.from_text(parts[0])
        dtype = smallest_dtype(len(vocab))
        train, val, test = (vocab.encode(part, "skip", dtype=dtype) for part in parts)
        return cls(
            vocab=vocab,
            train=train,
            val=val,
            test=test,
            unseen=len(content) - len(train) - len(val) - len(test),
            fingerprint=fingerprint(content),
            files=files,
        )


def fingerprint(content: str) -> str:
    """The SHA-256 of a text in UTF-8, taken piece by piece: no second copy of it is made."""
    digest = hashlib.sha256()
    for start in range(0, len(content), 2**18):
        digest.update(content[start : start + 2**18].encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def smallest_dtype(vocab_size: int) -> torch.dtype:
    """The smallest integer type that holds ids below `vocab_size`."""
    if vocab_size <= 2**8:
        return torch.uint8
    return torch.int16 if vocab_size <= 2**15 else torch.int32
