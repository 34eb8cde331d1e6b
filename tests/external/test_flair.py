"""Tests with the real package (make test-interop): exported models load there, and its models load here."""

import re
from pathlib import Path

import pytest
import torch
from flair.data import Dictionary, Sentence
from flair.models import LanguageModel

from charlm.inference.evaluate import evaluate
from charlm.storage.model_file import load_model
from conftest import ROOT, settings

DOCS = (ROOT / "docs/export.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_flair_computes_the_logits_of_an_exported_model_and_its_embeddings(charlm, words, cell, direction):
    overrides = ("corpus.source=corpus.txt", "train.epochs=2", f"model.direction={direction}")
    more = (f"model.cell={cell}", "model.num_layers=2")
    assert charlm("train", "--name", "tiny", *settings(*overrides, *more)).code == 0
    assert charlm("export", "tiny", "--to", "flair").code == 0
    theirs, ours = (
        LanguageModel.load_language_model("tiny-flair.pt"),
        load_model(Path("runs/tiny/model.safetensors")),
    )
    assert theirs.is_forward_lm == (direction == "forward")
    text = words[:600] if direction == "forward" else words[:600][::-1]
    ids = torch.tensor(theirs.dictionary.get_idx_for_items(list(text)))
    own = ours.vocab.encode(text).long()
    with torch.inference_mode():
        found = theirs(ids[:, None], theirs.init_hidden(1))[0][:, 0]
        wanted, _ = ours.model(own[None], ours.model.initial_state(1))
    difference = float((found[:, 1:] - wanted[0]).abs().max())
    print(
        f"flair, {cell} {direction}: logits to {wanted.abs().max():.1f}, largest difference {difference:.2g}"
    )
    assert difference <= 1e-5
    score = evaluate(ours.model, ours.vocab.encode(words[:600]))
    assert theirs.calculate_perplexity(words[:600]) == pytest.approx(score.perplexity, rel=1e-5)

    sentence = Sentence("abc de")
    (script,) = [each for each in re.findall(r"```python\n(.*?)```", DOCS, re.S) if "flair" in each]
    names = {}
    exec(script.replace("first", "tiny"), names)
    names["embeddings"].embed(sentence)
    # The state after the word and the space behind it; of a backward model, before it and the space there.
    read = "\nabc " if direction == "forward" else "\ned cba "
    with torch.inference_mode():
        x = ours.model.embed(ours.vocab.encode(read).long()[None])
        states, _ = ours.model.recurrent(x, ours.model.initial_state(1))
    assert torch.allclose(sentence[0].embedding.cpu(), states[0, -1], atol=1e-5)


@pytest.mark.parametrize("nout", [None, 4])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_an_imported_flair_model_has_the_same_logits(charlm, words, kind, nout, tmp_path):
    dictionary = Dictionary()
    for char in [*sorted(set(words)), "two", "😀"]:
        dictionary.add_item(char)
    torch.manual_seed(5)
    theirs = LanguageModel(dictionary, False, 7, 2, 5, nout=nout, recurrent_type=kind).eval()
    dictionary.get_idx_for_items(["a"])  # fills what is pickled as a defaultdict
    path = tmp_path / "theirs.pt"
    theirs.save(path)
    done = charlm("import", path, "--from", "flair", "--output", "ours.safetensors")
    assert done.code == 0, done.err
    assert "'<unk>', 'two'" in done.err
    ours = load_model(Path("ours.safetensors"))
    text = words[:300][::-1]
    kept = [dictionary.get_idx_for_item(char) for char in ours.vocab.characters]
    with torch.inference_mode():
        ids = torch.tensor(dictionary.get_idx_for_items(list(text)))
        found = theirs(ids[:, None], theirs.init_hidden(1))[0][:, 0, kept]
        wanted, _ = ours.model(ours.vocab.encode(text).long()[None], ours.model.initial_state(1))
    assert (found - wanted[0]).abs().max() <= 1e-5
