import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from charlm.config import Config, ModelConfig
from charlm.errors import CharlmError
from charlm.inference.evaluate import evaluate
from charlm.inference.sample import Sampling, generate
from charlm.nn.model import CharLM
from charlm.storage import model_file
from charlm.storage.header import FORMAT, read_header
from charlm.storage.model_file import load_model, save_model
from charlm.storage.state_file import save_state
from charlm.text.vocab import Vocab
from corruption import join_file, seal_file, split_file

VOCAB = Vocab('ab \nñ😀"\\')


def make(path, fingerprint="", **options):
    config = Config(model=ModelConfig(**{"hidden_size": 6, "embedding_size": 6, **options}))
    model = CharLM(len(VOCAB), config.model).initialise(2)
    save_model(path, model, VOCAB, config, {"step": 3, "val_loss": 1.25}, fingerprint)
    return model, config


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("options", [{}, {"tie_weights": True}, {"input": "one_hot", "cell": "gru"}])
def test_round_trip(path, options):
    model, config = make(path, **options)
    loaded = load_model(path)
    assert loaded.config == config
    assert loaded.vocab.characters == VOCAB.characters
    assert loaded.figures == {"step": 3, "val_loss": 1.25}
    assert not loaded.model.training
    ours, theirs = dict(model.named_parameters()), dict(loaded.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_unknown_class_is_saved(path):
    vocab = Vocab("ab\ufffdc", 4000)
    config = Config(model=ModelConfig(hidden_size=6, embedding_size=6))
    save_model(path, CharLM(4, config.model).initialise(2), vocab, config, {})
    loaded = load_model(path)
    assert (loaded.vocab.characters, loaded.vocab.unknown) == (vocab.characters, (2, 4000))
    assert loaded.model.unknown == loaded.vocab.unknown and read_header(path).unknown_kinds == 4000
    make(path)
    assert "unknown_kinds" not in split_file(path.read_bytes())[1]
    assert load_model(path).vocab.unknown is None and load_model(path).model.unknown is None


def test_same_model_gives_same_bytes(path):
    make(path)
    first = path.read_bytes()
    make(path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file is left"


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(
    ("saved", "read"), [("scratch", "fused"), ("builtin", "scratch"), ("fused", "builtin")]
)
def test_file_loads_in_every_implementation(path, cell, num_layers, saved, read):
    make(path, cell=cell, num_layers=num_layers, implementation=saved)
    own, other = load_model(path), load_model(path, read)
    assert other.config.model.implementation == read
    ids = torch.randint(len(VOCAB), (200,))
    assert evaluate(own.model, ids).loss == pytest.approx(evaluate(other.model, ids).loss, abs=1e-6)
    greedy = Sampling(temperature=0)
    texts = ["".join(generate(each.model, VOCAB, ids[:3], 50, greedy)) for each in (own, other)]
    assert texts[0] == texts[1]


def test_gru_with_reset_before_does_not_load_in_torch(path):
    make(path, cell="gru", gru_reset="before", implementation="scratch")
    with pytest.raises(CharlmError, match="gru_reset: before"):
        load_model(path, "builtin")
    assert load_model(path, "auto").model.config.implementation == "scratch"


def rewrite(path, change):
    """Save the file again with its `charlm` entry changed by `change`, under the right checksums."""
    entries, text, body = split_file(path.read_bytes())
    change(text)
    path.write_bytes(seal_file(entries, text, body))


def rewrite_tensors(path, change):
    """Do the same with the entries of the tensors."""
    entries, text, body = split_file(path.read_bytes())
    change(entries)
    path.write_bytes(seal_file(entries, text, body))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def long_header(path, size):
    """Make a sparse file whose header has `size` bytes."""
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little") + b"{")
        file.truncate(8 + size)


def set_model(key, value):
    return lambda path: rewrite(path, lambda text: text["config"]["model"].update({key: value}))


def set_entry(**changes):
    return lambda path: rewrite_tensors(path, lambda each: each["head.bias"].update(changes))


def key_twice(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little") + 14
    path.write_bytes(size.to_bytes(8, "little") + b'{"a":{},"a":{},' + data[9:])


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), r"cut short: it has \d,"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "40 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"damaged: it has \d,"),
        (lambda path: flip(path, -7), "checksum of its tensors"),
        (lambda path: flip(path, 300), "checksum of its header"),
        (lambda path: path.write_bytes(b""), "safetensors"),
        (lambda path: path.write_text("Hola, Sancho amigo"), "safetensors"),
        (lambda path: torch.save({"a": 1}, path), "torch.save"),
        (lambda path: path.write_bytes(b"\x80\x04\x95" + b"." * 40), "torch.save"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: save_file(load_file(path), path), "not written by charlm"),
        (lambda path: save_state(path, {"a": torch.ones(3)}), "state file"),
        (lambda path: rewrite(path, lambda text: text.update(format=FORMAT + 1)), "upgrade charlm"),
        (lambda path: rewrite(path, lambda text: text.update(format=FORMAT - 1)), f"format {FORMAT - 1}"),
        (lambda path: rewrite(path, lambda text: text.update(format=True)), "invalid format"),
        (lambda path: rewrite(path, lambda text: text.pop("vocab")), "vocab"),
        (lambda path: rewrite(path, lambda text: text.update(vocab="aa")), "vocabulary"),
        (lambda path: rewrite(path, lambda text: text.update(vocab="abc")), "embedding.weight"),
        (lambda path: rewrite(path, lambda text: text.update(fingerprint=3)), "fingerprint"),
        *(
            (lambda path, kinds=kinds: rewrite(path, lambda text: text.update(unknown_kinds=kinds)), "kinds")
            for kinds in (-1, True, None, 2.0, "3", [2], 0x110001, 10**400)
        ),
        (lambda path: rewrite(path, lambda text: text.update(unknown_kinds=2)), "U\\+FFFD"),
        (lambda path: rewrite(path, lambda text: text.update(unknown_kinds=2, vocab="\ufffd")), "U\\+FFFD"),
        (lambda path: rewrite(path, lambda text: text["figures"].update(a=math.nan)), "NaN"),
        (lambda path: rewrite(path, lambda text: text["figures"].update(a=-math.inf)), "-Infinity"),
        (set_model("cell", "?"), "damaged.*model.cell"),
        (set_model("cell", "rnn"), "recurrent.weight"),
        (set_model("num_layers", 2), "l1"),
        (set_model("num_layers", 10**9), "num_layers"),
        (set_model("hidden_size", 2**20), "recurrent.weight"),
        (lambda path: rewrite(path, lambda text: text["config"].update(train={"lr": "x"})), "train.lr"),
        (lambda path: long_header(path, 2**34), "17,179,869,184 bytes"),
        (lambda path: long_header(path, 2**16), "invalid"),
        (set_entry(shape=[2**62, 4]), "head.bias"),
        (set_entry(shape=[0, 2**62]), "head.bias"),
        (set_entry(shape=[1] * 10**4), "head.bias"),
        (set_entry(dtype="F16"), "F16"),
        (lambda path: rewrite_tensors(path, lambda each: each.update(a={**each["head.bias"]})), "bytes of"),
        (key_twice, "twice"),
    ],
)
def test_invalid_file_is_refused_in_one_line(path, damage, part):
    make(path)
    damage(path)
    with pytest.raises(CharlmError, match=part) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_figures_that_are_not_finite_are_null(path):
    config = Config(model=ModelConfig(hidden_size=6, embedding_size=6))
    model = CharLM(len(VOCAB), config.model)
    save_model(path, model, VOCAB, config, {"val_perplexity": math.inf, "list": [math.nan, 1.5]})
    assert read_header(path).figures == {"val_perplexity": None, "list": [None, 1.5]}


def test_header_is_read_without_the_weights(path):
    model, config = make(path, fingerprint="f" * 64)
    flip(path, -1)
    found = read_header(path)
    assert (found.config, found.vocab, found.fingerprint) == (config, VOCAB.characters, "f" * 64)
    assert found.tensors == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_newer_format_is_named_whatever_else_is_new(path):
    make(path)
    entries, text, _ = split_file(path.read_bytes())
    path.write_bytes(join_file(entries, {"format": FORMAT + 1, "news": text}, b"elsewhere"))
    with pytest.raises(CharlmError, match="newer than this charlm reads.*upgrade"):
        read_header(path)


def test_safetensors_reads_the_weights(path):
    model, _ = make(path)
    tensors = load_file(path)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.named_parameters())


def test_file_may_be_replaced_while_it_is_read(path, monkeypatch):
    first, config = make(path)
    read = model_file.read_container

    def read_and_replace(file, path, kind):
        header = read(file, path, kind)
        save_model(path, CharLM(len(VOCAB), config.model).initialise(3), VOCAB, config, {})
        return header

    monkeypatch.setattr(model_file, "read_container", read_and_replace)
    assert torch.equal(load_model(path).model.head.weight, first.head.weight)


def test_model_loads_without_importing_torch_compiler():
    """torch imports its compiler to initialise tensors on the meta device, which takes three seconds."""
    code = (
        "import sys, torch; from charlm.nn.device import Uninitialised\n"
        "from charlm.nn.model import make_model\n"
        "from charlm.config import ModelConfig\n"
        "for place in ('meta', 'cpu'):\n"
        "    with Uninitialised(), torch.device(place): make_model(9, ModelConfig())\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
