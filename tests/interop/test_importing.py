import codecs
import functools
import io
import json
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from charlm.errors import CharlmError, ConfigError
from charlm.interop import importing, torchfile
from charlm.interop.importing import import_model
from charlm.interop.torchfile import Builder, read_pickle, read_torch_file
from charlm.nn.model import CharLM
from charlm.storage.model_file import load_model

CHARS = "ba \nñ😀"
H, E = 8, 5


class Plain(nn.Module):
    """A typical model: an embedding, a recurrent stack and a linear head, with other names."""

    def __init__(self, kind, V=6, E=E, L=2, **options):
        super().__init__()
        torch.manual_seed(7)
        self.drop = nn.Dropout(0.1)
        self.encoder = nn.Embedding(V, E)
        self.rnn = kind(E, H, L, **options)
        self.decoder = nn.Linear(H, V)

    def logits(self, ids, state=None):
        """Return the logits (T, V) of ids (T,)."""
        with torch.inference_mode():
            return self.decoder(self.rnn(self.encoder(ids), state)[0])


def logits_of(loaded, text):
    with torch.inference_mode():
        ids = loaded.vocab.encode(text).long()[None]
        return loaded.model(ids, loaded.model.initial_state(1))[0][0]


def vocab_file(folder, data):
    path = folder / "vocab.json"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def stanza_data(model, start=None, lower=False, forward=True):
    units = ["<PAD>", "<UNK>", "<EMPTY>", "<ROOT>", *CHARS]
    names = {"encoder": "char_emb", "rnn": "charlstm.lstm", "decoder": "decoder"}
    state = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": each for name, each in model.state_dict().items()
    }
    for name in ("charlstm_h_init", "charlstm_c_init"):
        state[name] = torch.zeros(2, 1, H) if start is None else start
    vocab = {"lower": lower, "_id2unit": units, "_unit2id": {unit: n for n, unit in enumerate(units)}}
    arguments = {"char_dropout": 0.05}
    return {
        "model": {"vocab": vocab, "args": arguments, "state_dict": state, "is_forward_lm": forward},
        "epoch": 3,
    }


@pytest.mark.parametrize("bare", [False, True])
def test_stanza(charlm, folder, bare):
    theirs = Plain(nn.LSTM, V=4 + len(CHARS))
    data = stanza_data(theirs, lower=True, forward=False)
    torch.save(data["model"] if bare else data, "es.pt", _use_new_zipfile_serialization=False)
    done = charlm("import", "es.pt", "--from", "stanza")
    assert done.code == 0 and "'<UNK>'" in done.err and "initial state" not in done.err, done.err
    ours = load_model(Path("es.safetensors"))
    assert ours.vocab.characters == CHARS and ours.figures == {"imported_from": "stanza"}
    assert (ours.config.model.direction, ours.config.model.dropout) == ("backward", 0.05)
    assert ours.config.corpus.lowercase and ours.config.corpus.normalize == "none"
    found = logits_of(ours, "abba ñ😀")
    wanted = theirs.logits(torch.tensor([4 + CHARS.index(char) for char in "abba ñ😀"]))[:, 4:]
    assert torch.allclose(found, wanted, atol=1e-6)
    assert charlm("generate", "--model", "es.safetensors", "--prefix", "AB", "-n", 5).code == 0
    Path("text.txt").write_text("ABBA\n")
    assert charlm("eval", "text.txt", "--model", "es.safetensors").code == 0
    done = charlm("import", "es.pt", "--from", "stanza")
    assert done.code == 2 and "es.safetensors exists" in done.err


def test_a_learned_initial_state_is_left_out_and_its_effect_is_reported(tmp_path, monkeypatch):
    theirs, start = Plain(nn.LSTM, V=4 + len(CHARS)), torch.full((2, 1, H), 0.5)
    torch.save(stanza_data(theirs, start), tmp_path / "m.pt")
    loaded, said = import_model(tmp_path / "m.pt", "stanza")
    # The same figure by hand, over all first characters alike.
    ids = torch.arange(len(CHARS))[None]
    ours, zeros = loaded.model, loaded.model.initial_state(len(CHARS))
    with torch.inference_mode():
        q = ours(ids.T, zeros)[0][:, 0].log_softmax(-1)
        p = ours(ids.T, tuple(z + 0.5 for z in zeros))[0][:, 0].log_softmax(-1)
    bits = float((p.exp() * (p - q)).sum(-1).mean()) / 0.6931
    (told,) = [float(each.split("after the first differs by ")[1].split(" bits")[0]) for each in said[1:]]
    assert told == pytest.approx(bits, rel=0.3)
    sizes = set()
    forward = CharLM.forward
    monkeypatch.setattr(CharLM, "forward", lambda *given: sizes.add(len(given[1])) or forward(*given))
    monkeypatch.setattr(importing, "_MAX_LOGITS", 5 * 32 * len(CHARS))
    assert import_model(tmp_path / "m.pt", "stanza")[1] == said and sizes == {5, 4}, "a few texts at a time"
    torch.save(stanza_data(theirs, start[:1]), tmp_path / "m.pt")
    with pytest.raises(CharlmError, match="initial state"):
        import_model(tmp_path / "m.pt", "stanza")


@pytest.fixture
def flair_dictionary(monkeypatch):
    """Saves data with a dictionary of Flair's class, without the package."""

    class Dictionary:
        pass

    Dictionary.__module__, Dictionary.__qualname__ = "flair.data", "Dictionary"
    package, module = types.ModuleType("flair"), types.ModuleType("flair.data")
    module.Dictionary, package.data = Dictionary, module
    made = Dictionary()
    made.idx2item = [b"<unk>", *(char.encode() for char in CHARS), b"two", b"\xff"]
    made.item2idx = {item: n for n, item in enumerate(made.idx2item)}
    made.item2idx_not_encoded = __import__("collections").defaultdict(int, a=2)

    def saved(data, path, **options):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "flair", package)
            patch.setitem(sys.modules, "flair.data", module)
            torch.save({**data, "dictionary": made}, path, **options)

    return saved


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_flair_of_any_protocol(tmp_path, flair_dictionary, protocol, zipped):
    theirs = Plain(nn.GRU, V=3 + len(CHARS))
    data = {"state_dict": theirs.state_dict(), "is_forward_lm": False, "dropout": 0.25}
    path, options = tmp_path / "lm.pt", {"_use_new_zipfile_serialization": zipped}
    flair_dictionary(data, path, pickle_protocol=protocol, **options)
    loaded, said = import_model(path, "flair")
    assert len(said) == 1 and said[0].endswith(": '<unk>', 'two', '\\udcff'")
    assert loaded.vocab.characters == CHARS
    model = loaded.config.model
    assert (model.cell, model.num_layers, model.direction, model.dropout) == ("gru", 2, "backward", 0.25)
    wanted = theirs.logits(torch.tensor([1 + CHARS.index(char) for char in "abba ñ😀"]))
    assert torch.allclose(logits_of(loaded, "abba ñ😀"), wanted[:, 1 : 1 + len(CHARS)], atol=1e-6)


def test_a_flair_projection_is_multiplied_into_the_head(tmp_path, flair_dictionary):
    theirs = Plain(nn.LSTM, V=3 + len(CHARS))
    projection = nn.Linear(H, H)
    state = {**theirs.state_dict(), "proj.weight": projection.weight, "proj.bias": projection.bias}
    theirs.decoder = nn.Sequential(projection, theirs.decoder)
    flair_dictionary({"state_dict": state, "nout": H}, tmp_path / "lm.pt")
    wanted = theirs.logits(torch.tensor([1, 2, 3]))[:, 1 : 1 + len(CHARS)]
    assert torch.allclose(logits_of(import_model(tmp_path / "lm.pt", "flair")[0], "ba "), wanted, atol=1e-6)
    for wrong in ({"decoder.bias": torch.ones(2)}, {"decoder.weight": torch.ones(H)}):
        flair_dictionary({"state_dict": {**state, **wrong}}, tmp_path / "lm.pt")
        with pytest.raises(CharlmError, match="projection"):
            import_model(tmp_path / "lm.pt", "flair")
    flair_dictionary({"state_dict": state, "has_decoder": False}, tmp_path / "lm.pt")
    with pytest.raises(CharlmError, match="decoder"):
        import_model(tmp_path / "lm.pt", "flair")


VOCABULARIES = [
    list(CHARS),
    CHARS,
    {char: n for n, char in enumerate(CHARS)},
    {str(n): char for n, char in enumerate(CHARS)},
]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_a_plain_model_under_any_names(tmp_path, kind, vocab):
    theirs = Plain(kind)
    state = {f"module.my_{name}": each for name, each in theirs.state_dict().items()}
    torch.save({"epoch": 3, "model_state": state}, tmp_path / "m.pt")
    loaded, said = import_model(tmp_path / "m.pt", "torch-char-rnn", vocab_file(tmp_path, vocab))
    assert not said and loaded.config.model.cell == kind.__name__.lower()
    ids = torch.tensor([CHARS.index(char) for char in "abba ñ😀"])
    assert torch.allclose(logits_of(loaded, "abba ñ😀"), theirs.logits(ids), atol=1e-6)


def one_hot(theirs):
    del theirs.encoder
    theirs.rnn = nn.LSTM(len(CHARS), H)
    theirs.encoder = lambda ids: nn.functional.one_hot(ids, len(CHARS)).float()


def tied(theirs):
    theirs.rnn, theirs.encoder = nn.LSTM(H, H), nn.Embedding(len(CHARS), H)
    theirs.decoder.weight = theirs.encoder.weight


def as_wide_as_deep(theirs):
    theirs.rnn, theirs.encoder = nn.LSTM(H, H), nn.Embedding(len(CHARS), H)


def without_biases(theirs):
    theirs.rnn, theirs.encoder = nn.LSTM(H, H, bias=False), nn.Embedding(len(CHARS), H)
    theirs.decoder = nn.Linear(H, len(CHARS), bias=False)


@pytest.mark.parametrize("change", [one_hot, tied, as_wide_as_deep, without_biases])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_plain_model_of_another_structure(tmp_path, monkeypatch, change, kind):
    monkeypatch.setattr(torch, "eye", None)  # of a large vocabulary it takes all memory
    theirs = Plain(nn.LSTM)
    change(theirs)
    state = theirs.state_dict()
    if kind == "safetensors":
        # which has a tied matrix once
        save_file(
            {k: each.clone() for k, each in state.items() if change is not tied or k != "decoder.weight"},
            tmp_path / "m",
        )
    else:
        torch.save(state, tmp_path / "m")
    loaded, _ = import_model(tmp_path / "m", "torch-char-rnn", vocab_file(tmp_path, CHARS))
    assert loaded.config.model.tie_weights == (change is tied)
    assert loaded.config.model.input == ("one_hot" if change is one_hot else "embedding")
    ids = torch.tensor([CHARS.index(char) for char in "abba ñ😀"])
    assert torch.allclose(logits_of(loaded, "abba ñ😀"), theirs.logits(ids), atol=1e-6)


def test_ids_that_are_not_a_character_are_left_out_with_their_rows(tmp_path):
    theirs = Plain(nn.GRU, V=4)
    torch.save(theirs.state_dict(), tmp_path / "m.pt")
    vocab = vocab_file(tmp_path, {"<pad>" + "d" * 999: 0, "a": 1, "b": 3})
    loaded, said = import_model(tmp_path / "m.pt", "torch-char-rnn", vocab)
    assert loaded.vocab.characters == "ab" and said[0].endswith(": '<pad>" + "d" * 34 + "…, None")
    wanted = theirs.logits(torch.tensor([1, 3, 3]))[:, [1, 3]]
    assert torch.allclose(logits_of(loaded, "abb"), wanted, atol=1e-6)


def test_one_hot_ids_that_are_not_a_character_are_left_out_with_their_columns(tmp_path):
    theirs = Plain(nn.GRU, V=4, E=4, L=1)
    del theirs.encoder
    theirs.encoder = lambda ids: nn.functional.one_hot(ids, 4).float()
    torch.save(theirs.state_dict(), tmp_path / "m.pt")
    vocab = vocab_file(tmp_path, {"<pad>": 0, "a": 1, "b": 3})
    loaded, _ = import_model(tmp_path / "m.pt", "torch-char-rnn", vocab)
    assert loaded.config.model.input == "one_hot" and loaded.model.recurrent.weight_ih_l0.shape[1] == 2
    wanted = theirs.logits(torch.tensor([1, 3, 3]))[:, [1, 3]]
    assert torch.allclose(logits_of(loaded, "abb"), wanted, atol=1e-6)


def test_settings_that_the_weights_do_not_determine_are_set(tmp_path):
    theirs = Plain(nn.RNN, nonlinearity="relu")
    torch.save(theirs.state_dict(), tmp_path / "m.pt")
    arguments = (tmp_path / "m.pt", "torch-char-rnn", vocab_file(tmp_path, CHARS))
    overrides = ("model.nonlinearity=relu", "direction=backward", "corpus.lowercase=true")
    loaded, _ = import_model(*arguments, overrides)
    assert loaded.config.model.direction == "backward" and loaded.config.corpus.lowercase
    assert torch.allclose(logits_of(loaded, "ba"), theirs.logits(torch.tensor([0, 1])), atol=1e-6)
    for wrong in ("model.hidden_size=9", "model.direction=both", "train.lr=1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            import_model(*arguments, (wrong,))


@pytest.mark.parametrize(
    ("change", "vocab", "reason"),
    [
        (lambda state: state.update({"norm.weight": torch.ones(3)}), CHARS, r"\(norm.weight\)"),
        (
            lambda state: state.update({"a\n\x1b[31m" + "b" * 999: torch.ones(3)}),
            CHARS,
            r"a \\x1b\[31mb*\\u2026",
        ),
        (lambda state: state.update({"\n\x1b[31m": torch.ones(6, 5)}), CHARS, r"stack it has .*\\x1b\[31m"),
        (lambda state: state.update({"rnn.bias_hh_l" + "7" * 999: torch.ones(8)}), CHARS, "7… is"),
        (lambda state: state.update({"b.weight_hh_l0": torch.ones(3)}), CHARS, "has 2 "),
        (lambda state: state.update({"rnn.weight_hh_l0_reverse": torch.ones(3)}), CHARS, "_l0_reverse"),
        (lambda state: state.update({"rnn.weight_hh_l0": torch.ones(5, H)}), CHARS, "1, 3 or 4 gates"),
        (lambda state: state.pop("rnn.weight_ih_l1"), CHARS, "weight_ih_l1 is missing"),
        (lambda state: state.pop("rnn.bias_hh_l0"), CHARS, "bias_hh_l0 is missing"),
        (lambda state: state.update({"rnn.bias_hh_l2": torch.ones(8)}), CHARS, "bias_hh_l2 is"),
        (lambda state: state.update({"n": torch.tensor(3)}), CHARS, "n is not"),
        (
            lambda state: state.update({"rnn.weight_hh_l0": torch.tensor(1.0)}),
            CHARS,
            "rnn.weight_hh_l0 is not",
        ),
        (lambda state: state.update({7: torch.ones(2)}), CHARS, "name of a weight"),
        (lambda state: state.update(a=torch.zeros(1).half().expand(9999)), CHARS, "more numbers"),
        (lambda state: state.update({f"a{n}": state["encoder.weight"] for n in range(999)}), CHARS, "bytes"),
        (lambda state: state.update(a=torch.ones(3, device="meta")), CHARS, "meta_tensor"),
        (lambda state: state.update(a=torch.eye(3).to_sparse()), CHARS, "sparse_tensor"),
        (lambda state: state.clear(), CHARS, "weight_hh_l0"),
        (lambda state: None, CHARS + "z", r"\(7, 5\).*\(7, 8\).*encoder.weight \(6, 5\)"),
        (lambda state: None, "bab ñ😀", "'b' .* more than once"),
        (lambda state: None, ["<a>"] * 6, "vocabulary"),
        (lambda state: None, {"a": "b"}, "must be a JSON list"),
        (lambda state: None, {"a": 0, "b": 0}, "must be a JSON list"),
        (lambda state: None, {"a": 10**12}, "must be a JSON list"),
        (lambda state: None, {"vocab": list(CHARS), "direction": 3}, "model.direction is 3"),
        (lambda state: None, {"vocab": list(CHARS), "cleaning": {"a.b": 3}}, "corpus.a.b"),
        (lambda state: None, 7, "must be a JSON list"),
    ],
)
def test_a_state_dict_of_another_model_is_refused(tmp_path, change, vocab, reason):
    state = Plain(nn.LSTM).state_dict()
    change(state)
    torch.save(dict(state), tmp_path / "m.pt")
    with pytest.raises(CharlmError, match=reason) as caught:
        import_model(tmp_path / "m.pt", "torch-char-rnn", vocab_file(tmp_path, vocab))
    told = str(caught.value).replace(str(tmp_path), "")
    assert told.isprintable() and len(told) < 500


def test_a_vocabulary_with_an_entry_that_is_not_a_text_is_refused(tmp_path):
    """The message would contain a list that a few bytes make very long."""
    data = stanza_data(Plain(nn.LSTM, V=4 + len(CHARS)))
    data["model"]["vocab"]["_id2unit"][3] = functools.reduce(lambda each, _: [each, each], range(9), "a")
    torch.save(data, tmp_path / "m.pt")
    with pytest.raises(CharlmError, match="vocabulary"):
        import_model(tmp_path / "m.pt", "stanza")


class Hostile:
    """Runs a command when `pickle` reads it."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("origin", ["stanza", "flair", "torch-char-rnn"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_asks_for_code_is_refused_and_runs_none(charlm, folder, origin, protocol, zipped):
    data = {**stanza_data(Plain(nn.LSTM, V=4 + len(CHARS))), "optimizer": Hostile()}
    torch.save(data, "m.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    vocab = ["--vocab", vocab_file(folder, CHARS)] if origin == "torch-char-rnn" else []
    done = charlm("import", "m.pt", "--from", origin, *vocab)
    assert done.code == 1 and "posix.mkdir" in done.err and done.err.count("\n") == 1
    assert not Path("pwned").exists() and not Path("m.safetensors").exists()
    torch.load("m.pt", weights_only=False)
    assert Path("pwned").exists(), "the file is hostile"


@pytest.mark.parametrize("origin", ["stanza", "flair"])
def test_a_file_of_another_kind_is_refused(tmp_path, origin, flair_dictionary):
    path = tmp_path / "m.pt"
    flair_dictionary({"state_dict": Plain(nn.LSTM).state_dict()}, path, pickle_protocol=4)
    whole = path.read_bytes()
    contents = [b"", b"Hola", whole[:-40], whole[: len(whole) // 2], b"PK\x03\x04", b"\x80\x04."]
    for data in ({}, [], 3, {"model": {"state_dict": 1}}, {"state_dict": {}, "dictionary": {}}):
        buffer = io.BytesIO()
        torch.save(data, buffer)
        contents.append(buffer.getvalue())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CharlmError) as caught:
            import_model(path, origin)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CharlmError, match="No such file"):
        import_model(path, origin)


def test_a_file_that_takes_more_memory_than_its_size_is_refused(tmp_path, monkeypatch):
    path, packed = tmp_path / "m.pt", tmp_path / "packed.pt"
    torch.save({"a": torch.zeros(9), "b": [bytes([n % 256, n // 256] * 99) for n in range(999)]}, path)
    read_torch_file(path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    with pytest.raises(CharlmError, match="compressed"):
        read_torch_file(packed)
    monkeypatch.setattr(torchfile, "_MAX_COPIED", 10**5)
    with pytest.raises(CharlmError, match="100,000"):
        read_torch_file(path)
    monkeypatch.setattr(torchfile, "_MAX_OPCODES", 999)
    with pytest.raises(CharlmError, match="999"):
        read_torch_file(path)


class Large:
    """Pickles as a call of a function."""

    def __init__(self, *made):
        self.made = made

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_call_that_allocates_much_is_refused(tmp_path, protocol, zipped):
    path, options = tmp_path / "m.pt", {"_use_new_zipfile_serialization": zipped}
    for large, reason in (
        (Large(bytearray, (10**4,)), "(__builtin__|builtins).bytearray"),
        (Large(torch.Tensor, (10**4,)), "torch.Tensor"),
        (Large(codecs.encode, (Large(codecs.encode, ("a", "latin-1")), "hex")), "damaged"),
    ):
        torch.save({"a": large}, path, pickle_protocol=protocol, **options)
        with pytest.raises(CharlmError, match=reason):
            read_torch_file(path)


def test_a_pickle_that_claims_more_than_the_file_has_is_damaged(tmp_path):
    """A MemoryError would blame the machine."""
    path = tmp_path / "m.pt"
    path.write_bytes(b"\x80\x04\x8e" + (2**45).to_bytes(8, "little"))
    with pytest.raises(CharlmError, match="damaged"):
        read_torch_file(path)


def test_files_of_the_older_format_cut_short_are_damaged(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"a": torch.zeros(9), "b": ["text"]}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(2, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CharlmError, match="damaged"):
            read_torch_file(path)


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value


def hostile_pickles():
    """Pickles, written by hand, that take the stack, the memory or the time of a naive reader."""
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n"
    shared = b")" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(200))  # t = (t, t), 200 times
    lists = b"](" * 200 + b"]" + b"".join(b"q%ch%ce" % (n, n) for n in range(200))
    return {
        "a deep key": b"})" + b"\x85" * 900_000 + b"Ns.",
        "a deep key among others": b"}(" + text(b"a") + b"N)" + b"\x85" * 900_000 + b"Nu.",
        "a shared key": b"}" + shared + b"Ns.",
        "a key of a list": b"}" + lists + b"Ns.",
        "a shared element of a set": b"c__builtin__\nset\n](" + shared + b"e\x85R.",
        "a shared key of a Counter": b"ccollections\nCounter\n](" + shared + b"e\x85R.",
        "a shared key of an OrderedDict": b"ccollections\nOrderedDict\n](](" + shared + b"Nee\x85R.",
        "a shared attribute": b"ccollections\nOrderedDict\n)R](](" + shared + b"Neeb.",
        "a shared persistent id": storage + shared + b"NK\x01tQ.",
        "a shared function": lists + b")R.",
        "a shared class": lists + b")\x81.",
        "a shared encoding": b"c_codecs\nencode\n" + text(b"a") + lists + b"\x86R.",
        "a shared shape": b"ctorch._utils\n_rebuild_tensor\n(NK\x00" + shared + b"q\xc8h\xc8tR.",
        "a frozenset": b"(" + shared + b"\x91.",
        "a long int as a key": b"}\x8a\xff" + b"\x7f" * 255 + b"Ns.",
        "a long int as a length": storage + text(b"0") + b"N\x8a\x7f" + b"\x7f" * 127 + b"tQ.",
        "a large storage": storage + text(b"0") + b"NJ\xff\xff\xff\x7ftQ.",
        "a large memo": b"Nr\xff\xff\xff\xffN.",
        "many lists": b"(" + b"]" * 3 * 10**6 + b"t.",
        "many copies": b"(c_codecs\nencode\nq\x00"
        + text(b"a" * 2**20)
        + text(b"latin1")
        + b"\x86q\x01"
        + b"h\x00h\x01R" * 10**5
        + b"t.",
        "many names": text(b"torch")
        + b"q\x00"
        + text(b"int" + b"1" * 2**20)
        + b"q\x01"
        + b"h\x00h\x01\x93" * 10**5
        + b".",
        "many persistent ids": b"(" + b"N" * 2**18 + b"tq\x00" + b"h\x00Q" * 10**5 + b".",
        "many arguments": b"ctorch\nSize\nq\x01(" + b"N" * 2**18 + b"tq\x00" + b"h\x01h\x00R" * 10**5 + b".",
        "marks alone": b"(" * 10**5 + b".",
    }


HARMLESS = {"a shared element of a set", "a shared key of a Counter", "a shared attribute", "a large memo"}


@pytest.mark.parametrize("name", hostile_pickles())
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_exhausts_a_reader_is_refused_in_one_line(tmp_path, name, zipped):
    path, pickled = tmp_path / "m.pt", b"\x80\x02" + hostile_pickles()[name]
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", pickled)
            archive.writestr("m/version", "3\n")
    else:
        whole = io.BytesIO()
        torch.save(0, whole, _use_new_zipfile_serialization=False)
        before, after = whole.getvalue().split(b"\x80\x02K\x00.")
        path.write_bytes(before + pickled + after)
    if name in HARMLESS:  # a part that is not needed, and that nothing looks at
        read_torch_file(path)
        return
    with pytest.raises(CharlmError, match="damaged|int111") as caught:
        read_torch_file(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_two_pickles_in_an_archive_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"a": 1}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    with pytest.raises(CharlmError, match="data.pkl"):
        read_torch_file(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_any_protocol_gives_the_same_values(protocol):
    text = "ñ" * 300
    value = [text, {"a": (1, -5, 2**70, 1.5, None, True), 7: ("a", [[]])}, text, b"\x00\xff" * 200, (), "😀"]
    ordered = OrderedDict(a=[1], b=value)
    file = io.BytesIO(pickle.dumps([*value, ordered], protocol) + b"rest")
    assert read_pickle(file, Builder(0)) == [*value, {"a": [1], "b": value}] and file.read() == b"rest"


def test_an_ordered_dict_of_python_2_is_read(tmp_path):
    """Its arguments are a list of pairs, and its texts are byte strings."""
    pickled = b"\x80\x02ccollections\nOrderedDict\n](](U\x01aK\x05e](U\x01bNee\x85R."
    assert read_pickle(io.BytesIO(pickled), Builder(0)) == {"a": 5, "b": None}


def test_a_parameter_with_an_attribute_is_read(tmp_path):
    weight = nn.Parameter(torch.ones(2))
    weight.tag = "x"
    torch.save({"a": weight}, tmp_path / "m.pt")
    assert torch.equal(read_torch_file(tmp_path / "m.pt")["a"], weight)


def test_only_plain_models_take_a_vocabulary_file(charlm, folder):
    torch.save(Plain(nn.LSTM).state_dict(), "m.pt")
    vocab = vocab_file(folder, CHARS)
    done = charlm("import", "m.pt", "--from", "torch-char-rnn")
    assert done.code == 2 and "--vocab FILE.json" in done.err
    assert charlm("import", "m.pt", "--from", "stanza", "--vocab", vocab).code == 2
    assert charlm("import", "m.pt", "--from", "torch-char-rnn", "--vocab", "no.json").code == 1
    for text, named in (("{", "vocab.json"), ('{"a": Infinity}', "Infinity"), ("[" * 10**5, "vocab.json")):
        vocab.write_text(text)
        done = charlm("import", "m.pt", "--from", "torch-char-rnn", "--vocab", vocab)
        assert done.code == 1 and named in done.err and done.err.count("\n") == 1
