"""Measure what `charlm train TEXT --minutes M` reaches, against a random search in the same time.

    python benchmarks/budget.py quijote.txt names.txt --minutes 1 3 --search 6

Each configuration of the search is a random change of the chosen one that takes the same time: hidden size,
batch, length, dropouts, learning rate. Trainings run one after the other. "seconds" is the whole command.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from common import heading

from charlm.config import CorpusConfig
from charlm.nn.kernels.native import keep_memory
from charlm.study.budget import choose, interpolated, machine_speeds, text_size
from charlm.study.compare import markdown


def train(text, minutes, settings=()):
    """Return the configuration, the best val loss, the epochs and the seconds of the command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "charlm", "train", text, "--minutes", str(minutes)]
        command += ["--name", "run"]
        for setting in settings:
            command += ["--set", setting]
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        run = Path(folder) / "runs/run"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        evaluated = [row for row in rows if "val_loss" in row]
        config = yaml.safe_load((run / "config.yaml").read_text())
    best = min(evaluated, key=lambda row: row["val_loss"])
    return config, best["val_loss"], evaluated[-1]["epoch"], seconds


def random_settings(text, minutes, generator):
    """Return a random change of the chosen settings, with the steps that fit the time."""
    size = text_size(CorpusConfig(source=text))
    speeds = machine_speeds()
    values = choose(size, 60 * minutes, speeds).values
    before, model, batches = values["model"]["hidden_size"], values["model"], values["batches"]
    hidden = max(64, round(before * generator.choice([0.5, 0.75, 1, 1, 1.25, 1.5]) / 32) * 32)
    batch, length = generator.choice([16, 24, 32]), generator.choice([48, 64, 96, 128])
    dropout = min(0.6, max(0.0, model["dropout"] + generator.uniform(-0.15, 0.15)))
    lr = values["train"]["lr"] * generator.choice([0.5, 0.75, 1, 1.4])

    def rate(units):
        return interpolated(speeds, units) / (4 * units**2 + size.classes * units)

    characters_read = values["train"]["max_steps"] * batches["batch_size"] * batches["seq_len"]
    steps = max(int(characters_read * rate(hidden) / rate(before) / (batch * length)), 1)
    return [
        f"hidden_size={hidden}",
        f"batch_size={batch}",
        f"seq_len={length}",
        f"dropout={dropout:.2f}",
        f"weight_dropout={generator.choice([0, 0.1, 0.2])}",
        f"max_steps={steps}",
        f"eval_every={max(steps // 20, 1)}",
        f"lr={lr:.2g}",
    ]


def row(text, minutes, kind, result):
    config, loss, epochs, seconds = result
    model, batches, train = config["model"], config["batches"], config["train"]
    sizes = f"{model['hidden_size']}, {batches['batch_size']} × {batches['seq_len']}"
    dropout = f"{model['dropout']:g}, {model['weight_dropout']:g}"
    figures = [f"{loss:.4f}", f"{seconds:.0f}", f"{epochs:.1f}"]
    return [Path(text).stem, f"{minutes:g}", kind, *figures, sizes, dropout, f"{train['lr']:g}"]


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("texts", nargs="*", default=["sancho"])
    arguments.add_argument("--minutes", nargs="+", type=float, default=[1.0])
    arguments.add_argument("--search", type=int, default=0, help="random configurations for each")
    arguments.add_argument("--seed", type=int, default=1)
    options = arguments.parse_args()
    heading("charlm train TEXT --minutes M")
    keep_memory()
    generator, rows = random.Random(options.seed), []
    for text in (str(Path(name).absolute()) if Path(name).exists() else name for name in options.texts):
        for minutes in options.minutes:
            rows.append(row(text, minutes, "chosen", train(text, minutes)))
            print(*rows[-1], flush=True)
            for k in range(options.search):
                settings = random_settings(text, minutes, generator)
                rows.append(row(text, minutes, f"random {k + 1}", train(text, minutes, settings)))
                print(*rows[-1], flush=True)
    head = ["text", "minutes", "", "val, nats", "seconds", "epochs", "units, batch", "dropouts", "lr"]
    print("\n" + markdown(head, rows))


if __name__ == "__main__":
    main()
