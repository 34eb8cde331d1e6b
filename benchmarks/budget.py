r"""Measure what `charlm train TEXT --minutes M` reaches, against a random search in the same time.

    python benchmarks/budget.py quijote.txt tinyshakespeare.txt --minutes 1 3 --search 6
    python benchmarks/budget.py names.txt --set records=line
    BENCH_RECORD=benchmarks/results/quality.json python benchmarks/budget.py tinyshakespeare.txt \
        --minutes 3 10 --set "split=[0.9, 0.1, 0]"

The last one stores the figures. Each configuration of the search is a random change of the chosen one that
takes the same time: units, batch, length, dropouts, learning rate, weight decay, averaging. "seconds" is the
whole command. With --jobs N, N trainings run at a time, each with one thread: the steps are those of M
minutes with all threads, however long they take.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from common import heading, record

from charlm.config import Config, override
from charlm.nn.kernels.native import keep_memory
from charlm.study.budget import choose, interpolated, machine_speeds, text_size
from charlm.study.compare import markdown


def train(text, options):
    """Return the configuration, the best val loss, the epochs and the seconds of `charlm train`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "charlm", "train", text, "--name", "run", *options]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        seconds = time.perf_counter() - start
        run = Path(folder) / "runs/run"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        evaluated = [row for row in rows if "val_loss" in row]
        config = yaml.safe_load((run / "config.yaml").read_text())
    best = min(evaluated, key=lambda row: row["val_loss"])
    return config, best["val_loss"], evaluated[-1]["epoch"], seconds


def as_options(values):
    return [
        f"{section}.{key}={json.dumps(value)}" for section in values for key, value in values[section].items()
    ]


def random_settings(values, size, speeds, generator):
    """Return a random change of the chosen values, with the steps that fit the time."""
    model, batches, chosen = values["model"], values["batches"], values["train"]
    before = model["hidden_size"]
    hidden = max(32, round(before * generator.choice([0.5, 0.7, 0.85, 1, 1.15, 1.4]) / 32) * 32)
    batch, length = batches["batch_size"], batches["seq_len"]
    batch = max(1, round(batch * generator.choice([0.67, 1, 1.33, 2])))
    length = generator.choice([48, 64, 96, 128])
    dropout = min(0.6, max(0.0, model["dropout"] + generator.choice([-0.2, -0.1, 0, 0.1])))
    lr = chosen["lr"] * generator.choice([0.5, 0.7, 1, 1.4])
    rate = {
        units: interpolated(speeds, units) / (4 * units**2 + size.classes * units)
        for units in (hidden, before)
    }
    read = chosen["max_steps"] * batches["batch_size"] * (size.record or batches["seq_len"])
    steps = max(int(read * rate[hidden] / rate[before] / (batch * (size.record or length))), 1)
    return [
        f"hidden_size={hidden}",
        f"batch_size={batch}",
        f"seq_len={length}",
        f"dropout={dropout:.2f}",
        f"weight_dropout={generator.choice([0, 0.1, 0.2, 0.3])}",
        f"max_steps={steps}",
        f"eval_every={max(steps // 20, 1)}",
        f"lr={lr:.2g}",
        f"weight_decay={generator.choice([0.03, 0.1, 0.3])}",
        f"ema={generator.choice(['null', 0.99, 0.998])}",
    ]


def row(text, minutes, kind, result):
    config, loss, epochs, seconds = result
    model, batches, train = config["model"], config["batches"], config["train"]
    sizes = f"{model['hidden_size']}, {batches['batch_size']} × {batches['seq_len']}"
    dropout = f"{model['dropout']:g}, {model['weight_dropout']:g}"
    rates = f"{train['lr']:g}, {train['weight_decay']:g}, {train['ema']}"
    figures = [f"{loss:.4f}", f"{seconds:.0f}", f"{epochs:.1f}"]
    return [Path(text).stem, f"{minutes:g}", kind, *figures, sizes, dropout, rates]


def tasks(options):
    """Yield the text, the minutes, the name and the options of each training."""
    generator, speeds = random.Random(options.seed), machine_speeds()
    for text in (
        str(Path(name).absolute()) if os.sep in name or Path(name).exists() else name
        for name in options.texts
    ):
        size = text_size(override(Config(), [f"source={json.dumps(text)}", *options.set]).corpus)
        for minutes in options.minutes:
            values = choose(size, 60 * minutes, speeds).values
            common = [f"--set={each}" for each in options.set]
            if options.jobs:
                fixed = [*as_options(values), "time_limit=null"]
                common += ["--threads=1", *(f"--set={each}" for each in fixed)]
            else:
                common += [f"--minutes={minutes}"]
            for k in range(options.search + 1):
                changed = random_settings(values, size, speeds, generator) if k else []
                if k or not options.skip_chosen:
                    name = f"random {k}" if k else "chosen"
                    yield text, minutes, name, [*common, *(f"--set={each}" for each in changed)]


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("texts", nargs="*", default=["sancho"])
    arguments.add_argument("--minutes", nargs="+", type=float, default=[1.0])
    arguments.add_argument("--search", type=int, default=0, help="random configurations for each")
    arguments.add_argument("--skip-chosen", action="store_true", help="the random configurations only")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of charlm train"
    )
    arguments.add_argument("--jobs", type=int, default=0, help="trainings at a time, of one thread each")
    arguments.add_argument("--seed", type=int, default=1)
    options = arguments.parse_args()
    heading("charlm train TEXT --minutes M")
    keep_memory()

    def done(task):
        text, minutes, name, settings = task
        found = row(text, minutes, name, train(text, settings))
        print(*found, sep=" | ", flush=True)
        if name == "chosen" and not options.jobs:
            record(**{f"nats {found[0]} {found[1]}": float(found[3])})
        return found

    with ThreadPoolExecutor(max(options.jobs, 1)) as pool:
        rows = list(pool.map(done, tasks(options)))
    head = [
        "text",
        "minutes",
        "",
        "val, nats",
        "seconds",
        "epochs",
        "units, batch",
        "dropouts",
        "lr, decay, ema",
    ]
    print("\n" + markdown(head, rows))


if __name__ == "__main__":
    main()
