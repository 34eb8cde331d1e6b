import dataclasses
import errno
import json
import math
import os
import pickletools
import re
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from charlm.config import Config, CorpusConfig, ModelConfig
from charlm.errors import CharlmError
from charlm.interop import export
from charlm.interop import onnx as onnx_graph
from charlm.interop.export import (
    check_format,
    export_model,
    flair_state,
    metadata,
    plain_weights,
    stanza_state,
)
from charlm.nn.model import make_model
from charlm.storage.model_file import Loaded, load_model, save_model
from charlm.text.vocab import Vocab
from conftest import ROOT

VOCAB = Vocab('ab \nñ😀"\\cdefghi')
DOCS = (ROOT / "docs/export.md").read_text(encoding="utf-8")


def make(corpus=None, **options):
    """A model whose greedy texts are varied, and whose biases are not 0."""
    options = {"hidden_size": 6, "embedding_size": 5, "dropout": 0.3, **options}
    config = Config(model=ModelConfig(**options), corpus=CorpusConfig(**(corpus or {})))
    model = make_model(len(VOCAB), config.model).initialise(3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    return Loaded(model, VOCAB, config, {"step": 9})


def save(loaded, path):
    path.parent.mkdir(parents=True)
    (path.parent / "config.yaml").touch()
    save_model(path, loaded.model, loaded.vocab, loaded.config, loaded.figures)


@pytest.mark.parametrize(
    ("to", "part", "without"), [("onnx", "onnxruntime", "torch"), ("torch", "char_rnn", "charlm")]
)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_the_script_in_the_docs_prints_the_text_of_charlm_generate(
    charlm, folder, monkeypatch, capfd, cell, to, part, without
):
    if to == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    save(make(cell=cell, num_layers=2), Path("runs/first/model.safetensors"))
    done = charlm("export", "first", "--to", to)
    assert done.code == 0 and done.out == "", done.err
    written = charlm("generate", "--prefix", "a b", "--temperature", 0, "--length", 500).out
    assert len(set(written)) > 3, "the text is varied"
    (script,) = [each for each in re.findall(r"```python\n(.*?)```", DOCS, re.S) if part in each]
    for name in [name for name in sys.modules if name.split(".")[0] == without]:
        monkeypatch.setitem(sys.modules, name, None)  # cannot be imported
    monkeypatch.delitem(sys.modules, "char_rnn", raising=False)
    monkeypatch.syspath_prepend(folder)
    exec(script.replace("quijote ", "a b"), {})
    assert capfd.readouterr().out == written.removesuffix("\n") + "\n"


OPTIONS = [
    {"cell": "rnn", "nonlinearity": "relu", "num_layers": 2},
    {"cell": "lstm", "tie_weights": True, "embedding_size": 6, "num_layers": 3},
    {"cell": "gru", "input": "one_hot"},
    {"cell": "gru", "gru_reset": "before", "num_layers": 2},
    {"cell": "lstm", "direction": "backward"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_onnx_computes_what_torch_computes(options):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    loaded = make(**options)
    content, _ = onnx_graph.checked_onnx(loaded, plain_weights(loaded.model), metadata(loaded))
    difference, largest = onnx_graph.compare(content, loaded)
    assert difference <= 1e-5 * max(1, largest)
    other = {**options, **({"gru_reset": "after"} if "gru_reset" in options else {"hidden_size": 6})}
    model = make(**other).model
    if model.config == loaded.model.config:
        torch.nn.init.normal_(model.head.bias)
    assert onnx_graph.compare(content, Loaded(model, VOCAB, loaded.config, {}))[0] > 0.01, (
        "the comparison sees other weights"
    )


def test_an_onnx_file_contains_the_vocabulary_and_is_not_written_if_its_logits_differ(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    loaded = make({"lowercase": True}, direction="backward")
    path = tmp_path / "m.onnx"
    monkeypatch.setattr(onnx_graph, "TOLERANCE", 0.0)
    monkeypatch.setattr(onnx_graph, "_RELATIVE_TOLERANCE", 0.0)
    with pytest.raises(CharlmError, match="onnxruntime"):
        export_model(loaded, "onnx", path)
    assert not path.exists()
    monkeypatch.undo()
    assert "differ from torch's by" in export_model(loaded, "onnx", path)[-1]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    metadata = {each.key: json.loads(each.value) for each in model.metadata_props}
    assert "".join(metadata["vocab"]) == VOCAB.characters
    assert metadata["direction"] == "backward" and metadata["cleaning"]["lowercase"] is True
    first = path.read_bytes()
    export_model(loaded, "onnx", path)
    assert path.read_bytes() == first, "the same model is the same bytes"


def test_an_onnx_file_with_nan_or_infinite_logits_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    loaded = make()
    run = onnxruntime.InferenceSession.run

    def one_nan(self, names, inputs):
        logits, *state = run(self, names, inputs)
        logits[1, 2, 3] = math.nan if inputs["ids"].shape[1] == 16 else 0
        return logits, *state

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime.InferenceSession, "run", one_nan)
        with pytest.raises(CharlmError, match="nan"):
            export_model(loaded, "onnx", tmp_path / "m.onnx")
    torch.nn.init.constant_(loaded.model.head.bias, math.inf)
    with pytest.raises(CharlmError, match="not finite"):
        export_model(loaded, "onnx", tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())


def test_a_model_too_large_for_onnx_is_refused_before_its_graph_is_built(tmp_path, monkeypatch):
    loaded = make(tie_weights=True, embedding_size=6)
    size = 4 * sum(parameter.numel() for parameter in loaded.model.parameters())
    monkeypatch.setattr(onnx_graph, "_MAX_WEIGHTS", size - 1)
    monkeypatch.setattr(onnx_graph, "build", None)
    with pytest.raises(CharlmError, match=f"{size:,}"):
        export_model(loaded, "onnx", tmp_path / "m.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_an_onnx_export_needs_onnx_and_runs_without_onnxruntime(tmp_path, monkeypatch, missing):
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, missing, None)
    path = tmp_path / "m.onnx"
    if missing == "onnx":
        with pytest.raises(CharlmError, match=r"pip install 'charlm-torch\[onnx\]'"):
            export_model(make(), "onnx", path)
    else:
        (note,) = export_model(make(), "onnx", path)
        assert "onnxruntime" in note and "charlm-torch[onnx]" in note
    assert path.exists() == (missing == "onnxruntime")


def by_hand(state, names, ids):
    """Logits (T, V) of an LSTM whose weights in `state` have the prefixes `names`, from zeros."""
    embedding, stack, head = names
    weights = {name.removeprefix(stack): each for name, each in state.items() if name.startswith(stack)}
    E, H = weights["weight_ih_l0"].shape[1], weights["weight_hh_l0"].shape[1]
    lstm = torch.nn.LSTM(E, H, len(weights) // 4)
    lstm.load_state_dict(weights)
    with torch.inference_mode():
        y, _ = lstm(state[embedding + "weight"][ids])
        return torch.nn.functional.linear(y, state[head + "weight"], state[head + "bias"])


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"input": "one_hot"}])
def test_stanza_and_flair_files_give_the_same_logits_and_no_probability_to_reserved_ids(monkeypatch, options):
    if "input" not in options:
        monkeypatch.setattr(torch, "eye", None)  # of a large vocabulary it takes all memory
    loaded = make({"lowercase": True}, **options)
    ids = VOCAB.encode("abba ñ😀").long()
    with torch.inference_mode():
        wanted = loaded.model(ids[None], loaded.model.initial_state(1))[0][0]
    stanza, flair = stanza_state(loaded)["model"], flair_state(loaded)
    assert stanza_state(loaded)["global_step"] == 9
    assert stanza_state(dataclasses.replace(loaded, figures={"step": None}))["global_step"] == 0
    assert stanza["vocab"]["_id2unit"] == ["<PAD>", "<UNK>", "<EMPTY>", "<ROOT>", *VOCAB.characters]
    assert stanza["vocab"]["_unit2id"]["a"] == 4 and stanza["vocab"]["lower"] is True
    assert flair["dictionary"].idx2item == [b"<unk>", *(char.encode() for char in VOCAB.characters)]
    assert flair["dictionary"].item2idx["ñ".encode()] == 5
    start = {name: stanza["state_dict"].pop(name) for name in ("charlstm_h_init", "charlstm_c_init")}
    assert all(each.shape == (options.get("num_layers", 1), 1, 6) for each in start.values())
    for state, names, first in (
        (stanza["state_dict"], ("char_emb.", "charlstm.lstm.", "decoder."), 4),
        (flair["state_dict"], ("encoder.", "rnn.", "decoder."), 1),
    ):
        found = by_hand(state, names, ids + first)
        assert torch.allclose(found[:, first:], wanted, atol=1e-6)
        assert found.softmax(-1)[:, :first].max() < 1e-20


@pytest.mark.parametrize("options", [{}, {"tie_weights": True, "embedding_size": 6}, {"input": "one_hot"}])
def test_the_unknown_of_a_model_is_that_of_stanza_and_flair(options):
    plain = make(**options)
    vocab = Vocab(VOCAB.characters.replace("ñ", "\ufffd"), 40)
    loaded = dataclasses.replace(plain, vocab=vocab)
    loaded.model.unknown = vocab.unknown
    at, ids = vocab.unknown.id, vocab.encode("abbañ Ω😀").long()
    with torch.inference_mode():
        wanted = loaded.model(ids[None], loaded.model.initial_state(1))[0][0]
    stanza, flair = stanza_state(loaded)["model"], flair_state(loaded)
    units, items = stanza["vocab"]["_id2unit"], flair["dictionary"].idx2item
    assert "\ufffd" not in units and [unit.encode() for unit in units[4:]] == items[1:]
    characters = vocab.characters
    assert units == ["<PAD>", "<UNK>", "<EMPTY>", "<ROOT>", *characters[:at], *characters[at + 1 :]]
    for state, names, first, unknown in (
        (stanza["state_dict"], ("char_emb.", "charlstm.lstm.", "decoder."), 4, 1),
        (flair["state_dict"], ("encoder.", "rnn.", "decoder."), 1, 0),
    ):
        state = {name: each for name, each in state.items() if "_init" not in name}
        place = torch.tensor([unknown if n == at else first + n - (n > at) for n in range(len(vocab))])
        found = by_hand(state, names, place[ids])
        assert torch.allclose(found[:, place], wanted, atol=1e-6)
        others = [n for n in range(first) if n != unknown]
        assert not others or found.softmax(-1)[:, others].max() < 1e-20


def test_a_flair_file_names_the_dictionary_class_of_flair_and_no_class_of_charlm(tmp_path):
    path = tmp_path / "m.pt"
    export_model(make(cell="gru"), "flair", path)
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        operations = list(pickletools.genops(archive.read(name)))
    assert {argument for opcode, argument, _ in operations if opcode.name == "GLOBAL"} == {
        "flair.data Dictionary",
        "_codecs encode",
        "collections OrderedDict",
        "torch FloatStorage",
        "torch._utils _rebuild_tensor_v2",
    }


@pytest.mark.parametrize(
    ("to", "options", "named"),
    [
        ("stanza", {"cell": "rnn"}, "model.cell: rnn; use --to onnx or torch,"),
        ("stanza", {"cell": "gru"}, "model.cell: gru; use --to onnx or torch or flair,"),
        ("flair", {"cell": "rnn"}, "model.cell: rnn; use --to onnx or torch,"),
        ("flair", {"cell": "gru", "gru_reset": "before"}, "model.gru_reset: before; use --to onnx,"),
        ("torch", {"cell": "gru", "gru_reset": "before"}, "model.gru_reset: before; use --to onnx,"),
        *((to, {"direction": "both"}, "direction: both") for to in ("onnx", "stanza", "flair", "torch")),
    ],
)
def test_a_model_that_a_format_cannot_represent_is_refused(to, options, named):
    with pytest.raises(CharlmError, match=named):
        check_format(to, Config(model=ModelConfig(**options)))


def test_settings_that_a_format_does_not_contain_are_reported(tmp_path):
    loaded = make({"lowercase": True, "keep": "a-z"})
    loaded = Loaded(make_model(3, loaded.config.model), Vocab("abc"), loaded.config, {})
    notes = " ".join(export_model(loaded, "stanza", tmp_path / "m.pt"))
    assert "corpus.keep: a-z" in notes and "lowercase" not in notes, "Stanza's vocabulary lowers"
    assert "newline" in notes and "space" in notes
    notes = " ".join(export_model(loaded, "flair", tmp_path / "m.pt"))
    assert "corpus.lowercase: true" in notes and "is_lower=True" in notes
    assert export_model(loaded, "torch", tmp_path / "m.pt") == []
    assert export_model(make(), "stanza", tmp_path / "m.pt") == []
    assert export_model(make({"normalize": "none"}), "stanza", tmp_path / "m.pt") == []
    (note,) = export_model(make({"normalize": "NFD"}), "stanza", tmp_path / "m.pt")
    assert "corpus.normalize: NFD" in note


def test_exported_files_have_the_name_of_the_run_and_existing_files_are_kept(charlm, folder):
    save(make(), folder / "runs/first/model.safetensors")
    assert charlm("export", "--to", "torch").code == 0
    files = {"first.pt", "first.json", "char_rnn.py"}
    assert {path.name for path in folder.iterdir()} == {*files, "runs", "corpus.txt"}
    assert charlm("export", "--to", "torch", "-o", "other.pt").code == 0, "char_rnn.py is the same for all"
    before = (folder / "first.json").read_bytes()
    (folder / "first.pt").unlink()
    done = charlm("export", "--to", "torch")
    assert done.code == 2 and "first.json exists" in done.err and "--force" in done.err
    assert charlm("export", "--to", "torch", "--force").code == 0 and (folder / "first.pt").exists()
    assert (folder / "first.json").read_bytes() == before
    (folder / "char_rnn.py").write_text("mine")
    assert charlm("export", "--to", "torch", "-o", "new.pt").code == 2
    assert (folder / "char_rnn.py").read_text() == "mine" and not (folder / "new.pt").exists()
    assert charlm("export", "--to", "torch", "-o", "new.json").code == 2
    assert charlm("export", "--to", "torch", "-o", "no/folder.pt").code == 1
    for command in (("export", "--to", "torch"), ("import", "first.pt", "--from", "stanza")):
        done = charlm(*command, "--output", "", "--force")
        assert done.code == 2 and "--output" in done.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_inside_native_code_ends_an_export_without_a_file(charlm, folder, monkeypatch, number, code):
    save(make(), folder / "runs/first/model.safetensors")

    def native(*_):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise SystemError("a callback has raised an exception") from None
        return b"graph", None

    monkeypatch.setattr(export, "checked_onnx", native)
    done = charlm("export", "first", "--to", "onnx")
    assert done.code == code and done.err.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {"runs", "corpus.txt"}


@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_full_disk_leaves_all_files_as_they_were(charlm, folder, monkeypatch, written, force):
    save(make(), folder / "runs/first/model.safetensors")
    names = ["m.pt", "m.json", "char_rnn.py"]
    if force:
        for name in names:
            Path(name).write_text("older")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    files = iter(range(written))

    def full(descriptor):
        if next(files, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = charlm("export", "first", "--to", "torch", "--output", "m.pt", *force)
    assert done.code == 1 and "No space left" in done.err
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    done = charlm("export", "first", "--to", "torch", "--output", "m.pt", *force)
    assert done.code == 0 and done.err == "wrote m.pt, m.json, char_rnn.py\n"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "corpus.txt", "runs"])


@pytest.mark.parametrize("options", [*OPTIONS[:3], OPTIONS[4]])
@pytest.mark.parametrize("to", ["stanza", "flair", "torch"])
def test_an_exported_model_is_imported_with_the_same_weights(charlm, folder, to, options):
    loaded = make({"lowercase": True}, **options)
    try:
        check_format(to, loaded.config)
    except CharlmError:
        return
    save(loaded, folder / "runs/first/model.safetensors")
    assert charlm("export", "first", "--to", to, "--output", "m.pt").code == 0
    vocab = ["--vocab", "m.json"] if to == "torch" else []
    done = charlm("import", "m.pt", "--from", to if to != "torch" else "torch-char-rnn", *vocab)
    assert done.code == 0, done.err
    back = load_model(Path("m.safetensors"))
    assert back.vocab.characters == VOCAB.characters
    assert (
        back.config.model.model_copy(
            update={key: getattr(loaded.config.model, key) for key in ("dropout", "embedding_size")}
        )
        == loaded.config.model
    )
    assert back.config.corpus.lowercase == (to != "flair")
    weights = dict(loaded.model.named_parameters())
    assert all(torch.equal(each, weights[name]) for name, each in back.model.named_parameters())
