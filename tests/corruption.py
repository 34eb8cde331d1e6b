"""Damage model and state files at random and count how charlm reads them: refuse, load something else, crash.

    python tests/corruption.py --count 1000 --seed 1

prints the counts for each kind of damage, and the process's peak memory. A "crafted" file has a changed value
and correct checksums, which no accident produces: it can load as something else, but must not crash.
`test_corruption` tries a few files of each kind.
"""

import argparse
import copy
import hashlib
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from charlm.config import Config, ModelConfig
from charlm.errors import CharlmError
from charlm.nn.model import make_model
from charlm.storage.header import read_header
from charlm.storage.model_file import load_model, save_model
from charlm.storage.run import Run
from charlm.text.vocab import Vocab

ZEROS = "0" * 64


def split_file(data):
    """Return a file's header without the `charlm` entry, that entry, and the tensors' bytes."""
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:begin])
    return entries, json.loads(entries.pop("__metadata__")["charlm"]), data[begin:]


def join_file(entries, content, body):
    """Undo `split_file`, with the checksums that `content` has."""
    header = json.dumps({"__metadata__": {"charlm": json.dumps(content)}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + body


def seal_file(entries, content, body):
    """Undo `split_file`, with the right checksums, made as the docstring of `header` says."""
    content = {**content, "header_sha256": ZEROS, "data_sha256": hashlib.sha256(body).hexdigest()}
    content["header_sha256"] = hashlib.sha256(join_file(entries, content, b"")[8:]).hexdigest()
    return join_file(entries, content, body)


def place(draw, data):
    """Return a position in `data`, two times of three near its beginning or its end."""
    return draw.choice([draw.randrange(len(data)), draw.randrange(2000), -draw.randrange(1, 800)]) % len(data)


def truncated(draw, data, other):
    return data[: place(draw, data)]


def one_bit_flipped(draw, data, other, count=1):
    data = bytearray(data)
    for _ in range(count):
        data[place(draw, data)] ^= 1 << draw.randrange(8)
    return bytes(data)


def bits_flipped(draw, data, other):
    return one_bit_flipped(draw, data, other, draw.randint(2, 64))


def bytes_inserted(draw, data, other):
    at = place(draw, data)
    return data[:at] + draw.randbytes(draw.randint(1, 64)) + data[at:]


def bytes_removed(draw, data, other):
    at = place(draw, data)
    return data[:at] + data[at + draw.randint(1, 64) :]


def bytes_zeroed(draw, data, other):
    at = place(draw, data)
    return data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :]


def stretches_exchanged(draw, data, other):
    size = draw.randint(1, 200)
    first, second = sorted(draw.sample(range(len(data) - 2 * size), 2))
    second += size
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def end_of_another(draw, data, other):
    at = place(draw, data)
    return data[:at] + other[at:]


def bytes_appended(draw, data, other):
    return data + draw.choice([draw.randbytes(draw.randint(1, 64)), b"\0" * 512, data])


def model_fields_exchanged(draw, data, other):
    """Exchange two values of a section, two characters of the vocabulary, or two tensors' places."""
    entries, content, body = split_file(data)
    where = draw.choice(["config", "figures", "vocab", "offsets", "checksums"])
    if where == "vocab":
        vocab = list(content["vocab"])
        i, j = draw.sample(range(len(vocab)), 2)
        vocab[i], vocab[j] = vocab[j], vocab[i]
        content["vocab"] = "".join(vocab)
        return join_file(entries, content, body)
    section, i, j = content, "header_sha256", "data_sha256"
    if where == "offsets":
        i, j = draw.sample(sorted(entries), 2)
        section = entries
    elif where != "checksums":
        section = content["figures"] if where == "figures" else draw.choice(list(content["config"].values()))
        i, j = draw.sample(sorted(section), 2)
    section[i], section[j] = section[j], section[i]
    return join_file(entries, content, body)


def state_fields_exchanged(draw, data, other):
    """Exchange two values of the state."""
    entries, content, body = split_file(data)
    state = content["state"]
    section = draw.choice([state, state["weights"], state["progress"]])
    i, j = draw.sample(sorted(section), 2)
    section[i], section[j] = section[j], section[i]
    return join_file(entries, content, body)


def tensors_exchanged(draw, data, other):
    """Exchange the bytes of two tensors of one size; the header stays as it is."""
    begin = 8 + int.from_bytes(data[:8], "little")
    places = [tuple(entry["data_offsets"]) for entry in split_file(data)[0].values()]
    pairs = [(a, b) for a in places for b in places if a < b and a[1] - a[0] == b[1] - b[0]]
    (a, a_end), (b, b_end) = draw.choice(pairs)
    body = data[begin:]
    return data[:begin] + body[:a] + body[b:b_end] + body[a_end:b] + body[a:a_end] + body[b_end:]


ANYWHERE = [
    truncated,
    one_bit_flipped,
    bits_flipped,
    bytes_inserted,
    bytes_removed,
    bytes_zeroed,
    stretches_exchanged,
    end_of_another,
    bytes_appended,
]
MODEL_DAMAGE = [*ANYWHERE, model_fields_exchanged, tensors_exchanged]
STATE_DAMAGE = [*ANYWHERE, state_fields_exchanged, tensors_exchanged]

NASTY = [None, True, -1, 0, 2, 10**9, 10**30, 1e308, float("nan"), "", "cpu", "\0" * 9, "x" * 3000]
NASTY += [[], {}, [[]], {"a": 1}, [10**18, 10**18], [0, 2**63], "a]|(x+x+)+y[", "../../x"]
NASTY += [{"$tensor": "rng"}, {"$tuple": 3}, {"$pairs": [[[], 0]]}, {"$float": "nan", "a": 0}]


def crafted(draw, data, other):
    """Change a value in the header and correct the checksums."""
    entries, content, body = split_file(data)
    section = draw.choice([entries, content])
    while True:
        key = draw.choice(sorted(section) if isinstance(section, dict) else range(len(section)))
        if not (isinstance(section[key], dict | list) and section[key] and draw.random() < 0.8):
            break
        section = section[key]
    if isinstance(section, dict) and draw.random() < 0.3:
        value = section.pop(key)
        section.update({draw.choice(["weights", "x" * 500, "\x1b[2J", "$tuple"]): value})
    else:
        section[key] = copy.deepcopy(draw.choice(NASTY))
    return seal_file(entries, content, body)


def make_files(folder):
    """Make two model files and two states, of the same shapes and with different content."""
    vocab = Vocab("ab \nñ😀\ufffd", 5)
    for k in (0, 1):
        run = Run(folder / f"run{k}")
        run.folder.mkdir()
        config = Config(model=ModelConfig(hidden_size=8, embedding_size=5, num_layers=2))
        model = make_model(len(vocab), config.model).initialise(k)
        save_model(run.best, model, vocab, config, {"step": k, "epoch": 1.5, "val_loss": 1.25 + k})
        optimizer = torch.optim.AdamW(model.parameters())
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()
        run.save_state(
            {
                "progress": {"step": k, "best_loss": 1.5, "log_size": 7},
                "weights": {name: tensor.detach() for name, tensor in model.named_parameters()},
                "optimizer": optimizer.state_dict(),
                "carried": (torch.ones(2, 4, 8), torch.zeros(2, 4, 8)),
                "rng": torch.get_rng_state(),
            }
        )
    return [folder / "run0" / name for name in ("model.safetensors", "state.safetensors")]


def model_content(path):
    loaded = load_model(path)
    header = read_header(path)
    assert (header.config, header.vocab, header.figures) == (
        loaded.config,
        loaded.vocab.characters,
        loaded.figures,
    )
    assert header.unknown_kinds == (loaded.vocab.unknown.kinds if loaded.vocab.unknown else 0)
    tensors = {name: tensor.detach() for name, tensor in loaded.model.named_parameters()}
    vocab = [loaded.vocab.characters, header.unknown_kinds]
    return [loaded.config.model_dump(), vocab, loaded.figures, tensors]


def state_content(path):
    return Run(path.parent).load_state()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def try_file(path, intact, damage, seed):
    """Put a damaged file at `path` and read it; return refused, identical, other or crashed, and the message.

    intact: the file's bytes, and its content.
    """
    read = state_content if path.name == "state.safetensors" else model_content
    draw = random.Random(f"{damage.__name__} {seed}")
    data, content = intact
    other = (path.parents[1] / "run1" / path.name).read_bytes()
    bad = data
    while bad in (data, other):
        bad = damage(draw, data, other)
    path.write_bytes(bad)
    try:
        found = read(path)
    except CharlmError as error:
        message = str(error)
        one_line = "\n" not in message and message.isprintable() and len(message) < 1000
        return ("refused" if one_line and str(path) in message else "crashed"), message
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    return ("identical" if same(found, content) else "other"), ""


def read_intact(path):
    """Return the argument `intact` of `try_file`."""
    read = state_content if path.name == "state.safetensors" else model_content
    return path.read_bytes(), read(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=1000, help="how many models, states and crafted files of each"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=0, help="how many messages of each kind to print")
    options = parser.parse_args()
    failed = 0
    print(f"{'file':<18} {'damage':<24} {'refused':>8} {'identical':>10} {'other':>6} {'crashed':>8}")
    with tempfile.TemporaryDirectory() as folder:
        model, state = make_files(Path(folder))
        for path, kinds in [
            (model, MODEL_DAMAGE), (state, STATE_DAMAGE), (model, [crafted]), (state, [crafted])
        ]:  # fmt: skip
            intact = read_intact(path)
            for kind in kinds:
                ends = Counter()
                for seed in range(kinds.index(kind), options.count, len(kinds)):
                    end, message = try_file(path, intact, kind, f"{options.seed} {seed}")
                    ends[end] += 1
                    # A crafted file may load as something else.
                    if end == "crashed" or (end == "other" and kind is not crafted):
                        failed += 1
                        print(f"  {end}: seed {options.seed} {seed}: {message!r}")
                    elif sum(ends.values()) <= options.show:
                        print(f"  {message}")
                columns = zip(("refused", "identical", "other", "crashed"), (8, 10, 6, 8), strict=True)
                row = " ".join(f"{ends[end]:>{width}}" for end, width in columns)
                print(f"{path.name:<18} {kind.__name__:<24} {row}", flush=True)
            path.write_bytes(intact[0])
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak memory {peak / 1024:,.0f} MB")
    except ImportError:
        pass
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
