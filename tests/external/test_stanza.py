"""Tests with the real package (make test-interop): exported models load there, and its models load here."""

import re
from pathlib import Path

import pytest
import torch
from stanza.models.common.char_model import CharacterLanguageModel, CharacterLanguageModelTrainer

from charlm.inference.evaluate import evaluate
from charlm.interop.export import STANZA_UNITS
from charlm.storage.model_file import load_model
from conftest import ROOT, settings

DOCS = (ROOT / "docs/export.md").read_text(encoding="utf-8")
FIRST = len(STANZA_UNITS)


def logits_of(model, ids, state=None):
    """Return the logits (T, V) that Stanza computes for ids (T,)."""
    with torch.inference_mode():
        return model(ids[None], [len(ids)], state)[2][0]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "options", [(), ("model.input=one_hot", "model.num_layers=2", "corpus.lowercase=true")]
)
def test_stanza_computes_the_logits_of_an_exported_model(charlm, words, direction, options):
    overrides = ("corpus.source=corpus.txt", "train.epochs=2", f"model.direction={direction}", *options)
    assert charlm("train", "--name", "tiny", *settings(*overrides)).code == 0
    assert charlm("export", "tiny", "--to", "stanza").code == 0
    theirs, ours = (
        CharacterLanguageModel.load("tiny-stanza.pt"),
        load_model(Path("runs/tiny/model.safetensors")),
    )
    assert theirs.is_forward_lm == (direction == "forward")
    text = words[:600] if direction == "forward" else words[:600][::-1]
    ids = torch.tensor(theirs.char_vocab().map(list(text)))
    found = logits_of(theirs, ids)
    with torch.inference_mode():
        own = ours.vocab.encode(text).long()
        wanted, _ = ours.model(own[None], ours.model.initial_state(1))
    difference = float((found[:, FIRST:] - wanted[0]).abs().max())
    print(f"stanza, {direction}: logits to {wanted.abs().max():.1f}, largest difference {difference:.2g}")
    assert difference <= 1e-5
    assert found.softmax(-1)[:, :FIRST].max() < 1e-20
    assert len(theirs.build_char_representation([["abc", "de"]])[0]) == 2


@pytest.mark.parametrize("recurrent_dropout", [0.0, 0.3])
@pytest.mark.parametrize("saved", ["model", "checkpoint"])
def test_an_imported_stanza_model_has_the_same_logits(charlm, words, tmp_path, recurrent_dropout, saved):
    charlm("train", "--name", "tiny", *settings("corpus.source=corpus.txt", "train.max_steps=1"))
    charlm("export", "tiny", "--to", "stanza")
    vocab = {"char": CharacterLanguageModel.load("tiny-stanza.pt").char_vocab()}
    args = {
        "char_emb_dim": 5,
        "char_hidden_dim": 7,
        "char_num_layers": 2,
        "char_dropout": 0.1,
        "char_rec_dropout": recurrent_dropout,
    }
    torch.manual_seed(4)
    theirs = CharacterLanguageModel(args, vocab, is_forward_lm=False)
    theirs.eval()  # which returns nothing
    torch.nn.init.normal_(theirs.charlstm_h_init, std=0.3)
    path = tmp_path / "theirs.pt"
    if saved == "model":
        theirs.save(str(path))
    else:
        optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
        criterion = torch.nn.CrossEntropyLoss()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        CharacterLanguageModelTrainer(theirs, None, optimizer, criterion, scheduler).save(str(path))
    done = charlm("import", path, "--from", "stanza", "--output", "ours.safetensors")
    assert done.code == 0, done.err
    assert "<UNK>" in done.err and re.search(r"initial state.* differs by 0\.\d+ bits", done.err)
    ours = load_model(Path("ours.safetensors"))
    assert ours.config.model.direction == "backward"
    ids = torch.tensor(vocab["char"].map(list(words[:300][::-1])))
    zeros = torch.zeros(2, 1, 7)
    found = logits_of(theirs, ids, (zeros, zeros))[:, FIRST:]
    nats = torch.nn.functional.cross_entropy(found[:-1], ids[1:] - FIRST, reduction="sum")
    score = evaluate(ours.model, ours.vocab.encode(words[:300]))
    assert score.nats == pytest.approx(float(nats), abs=1e-3)
    with torch.inference_mode():
        wanted, _ = ours.model((ids - FIRST)[None], ours.model.initial_state(1))
    assert (found - wanted[0]).abs().max() <= 1e-5
