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
from charlm.storage import model_file as checkpoint
from charlm.storage.header import FORMAT, read_header
from charlm.storage.model_file import load_model, save_model
from charlm.text.vocab import Vocab
from corruption import join_model, seal_model, split_model

VOCAB = Vocab('ab \nñ😀"\\')


def make(path, **options):
    config = Config(model=ModelConfig(**{"hidden_size": 6, "embedding_size": 6, **options}))
    model = CharLM(len(VOCAB), config.model).initialise(2)
    save_model(path, model, VOCAB, config, {"step": 3, "val_loss": 1.25})
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


def test_the_same_model_is_the_same_bytes(path):
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
def test_a_file_loads_in_every_implementation(path, cell, num_layers, saved, read):
    make(path, cell=cell, num_layers=num_layers, implementation=saved)
    own, other = load_model(path), load_model(path, read)
    assert other.config.model.implementation == read
    ids = torch.randint(len(VOCAB), (200,))
    assert evaluate(own.model, ids).loss == pytest.approx(evaluate(other.model, ids).loss, abs=1e-6)
    greedy = Sampling(temperature=0)
    texts = ["".join(generate(each.model, VOCAB, ids[:3], 50, greedy)) for each in (own, other)]
    assert texts[0] == texts[1]


def test_a_gru_that_torch_lacks_does_not_load_in_torch(path):
    make(path, cell="gru", gru_reset="before", implementation="scratch")
    with pytest.raises(CharlmError, match="gru_reset: before"):
        load_model(path, "builtin")
    assert load_model(path, "auto").model.config.implementation == "scratch"


def rewrite(path, change):
    """Save the file again with its `charlm` entry changed by `change`, under the right checksums."""
    entries, text, body = split_model(path.read_bytes())
    change(text)
    path.write_bytes(seal_model(entries, text, body))


def rewrite_tensors(path, change):
    """The same for the entries of the tensors."""
    entries, text, body = split_model(path.read_bytes())
    change(entries)
    path.write_bytes(seal_model(entries, text, body))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def long_header(path, size):
    """A file of one hole whose header has so many bytes."""
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little") + b"{")
        file.truncate(8 + size)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), r"cut short: it has \d,"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "cut short: it has 40 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"damaged: it has \d,"),
        (lambda path: flip(path, -7), "checksum of its weights"),
        (lambda path: flip(path, 300), "checksum of its header"),
        (lambda path: path.write_bytes(b""), "is no model file"),
        (lambda path: path.write_text("Hola, Sancho amigo"), "is no model file"),
        (lambda path: torch.save({"a": 1}, path), "pickle"),
        (lambda path: path.write_bytes(b"\x80\x04\x95" + b"." * 40), "pickle"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: save_file(load_file(path), path), "not written by charlm"),
        (lambda path: rewrite(path, lambda text: text.update(format=FORMAT + 1)), "upgrade charlm"),
        (lambda path: rewrite(path, lambda text: text.pop("vocab")), "damaged"),
        (lambda path: rewrite(path, lambda text: text.update(vocab="aa")), "damaged"),
        (lambda path: rewrite(path, lambda text: text.update(vocab="abc")), "do not fit.*embedding.weight"),
        (
            lambda path: rewrite(path, lambda text: text["config"]["model"].update(cell="?")),
            "damaged.*model.cell",
        ),
        (lambda path: rewrite(path, lambda text: text["config"]["model"].update(cell="rnn")), "do not fit"),
        (lambda path: rewrite(path, lambda text: text["config"]["model"].update(num_layers=2)), "do not fit"),
        (
            lambda path: rewrite(path, lambda text: text["config"]["model"].update(num_layers=10**9)),
            "num_layers is 1000000000",
        ),
        (
            lambda path: rewrite(path, lambda text: text["config"]["model"].update(hidden_size=2**20)),
            "do not fit",
        ),
        (
            lambda path: rewrite(path, lambda text: text["config"].update(train={"lr": "x"}, corpus=3)),
            "2 problems",
        ),
        (lambda path: rewrite(path, lambda text: text.update(format=1)), "has format 1,.* no checksums"),
        (lambda path: rewrite(path, lambda text: text.update(format=True)), "its format is no number"),
        (lambda path: long_header(path, 2**34), "header would take 17,179,869,184 bytes"),
        (lambda path: long_header(path, 2**16), "does not make sense"),
        (
            lambda path: rewrite_tensors(path, lambda each: each["head.bias"].update(shape=[2**62, 4])),
            "bytes of head.bias are not as many",
        ),
        (
            lambda path: rewrite_tensors(path, lambda each: each["head.bias"].update(dtype="F16")),
            "head.bias is no matrix",
        ),
        (
            lambda path: rewrite_tensors(path, lambda each: each.update({"a": {**each["head.bias"]}})),
            "bytes of (head.bias|a) are not as many",
        ),
        (
            lambda path: path.write_bytes(
                path.read_bytes().replace(b'{"__meta', b'{"a":{},"a":{},"__meta', 1)
            ),
            "does not make sense",
        ),
    ],
)
def test_what_is_no_whole_model_file_is_refused(path, damage, part):
    make(path)
    damage(path)
    with pytest.raises(CharlmError, match=part) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_header_alone_tells(path):
    model, config = make(path)
    found = read_header(path)
    assert (found.config, found.vocab) == (config, VOCAB.characters)
    assert found.tensors == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_a_newer_format_says_so_whatever_else_is_new(path):
    make(path)
    entries, text, _ = split_model(path.read_bytes())
    path.write_bytes(join_model(entries, {"format": FORMAT + 1, "news": text}, b"elsewhere"))
    with pytest.raises(CharlmError, match="newer than this charlm reads.*upgrade"):
        read_header(path)


def test_others_read_it_too(path):
    model, _ = make(path)
    tensors = load_file(path)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.named_parameters())


def test_a_newer_file_may_take_its_place_while_it_is_read(path, monkeypatch):
    first, config = make(path)
    read = checkpoint.read_opened

    def read_and_replace(file, path):
        header = read(file, path)
        save_model(path, CharLM(len(VOCAB), config.model).initialise(3), VOCAB, config, {})
        return header

    monkeypatch.setattr(checkpoint, "read_opened", read_and_replace)
    assert torch.equal(load_model(path).model.head.weight, first.head.weight)


def test_a_model_is_read_without_torch_s_compiler():
    """Which torch imports to initialise what has no memory, in three seconds."""
    code = (
        "import sys, torch; from charlm.nn.device import Uninitialised\n"
        "from charlm.nn.model import make_model\n"
        "from charlm.config import ModelConfig\n"
        "for place in ('meta', 'cpu'):\n"
        "    with Uninitialised(), torch.device(place): make_model(9, ModelConfig())\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
