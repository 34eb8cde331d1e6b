"""Compare charlm with makemore's Transformer and GRU on a list of names, each trained for the same minutes.

    python benchmarks/names.py names.txt --makemore makemore.py --minutes 1 --seeds 1 2 3

For each seed 1,000 random names are held out. charlm chooses everything by `charlm train --minutes`, and
its seconds are the whole command. makemore's models, for the first seed, have the sizes, the optimizer and
the data loader of its main program, and train in a process of their own, with all threads, for the same
minutes; its evaluations and samples during the training are left out. The loss is the mean over all held-out
characters and the ends of the names. Compare on an idle machine: beside other work makemore's threads spin
while they wait for each other, which charlm's command prevents for its own, and the comparison is not fair.
"""

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
from common import heading
from torch.utils.data import DataLoader

import charlm
from charlm.nn.model import num_parameters
from charlm.study.compare import markdown

HELD_OUT = 1000


def split(names, seed):
    """Return the names to train on and those held out."""
    names = random.Random(seed).sample(names, len(names))
    return names[HELD_OUT:], names[:HELD_OUT]


def ours(train, held_out, minutes, seed):
    """Return the loss, the parameters and the seconds of a `charlm train`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, names in (("train.txt", train), ("held-out.txt", held_out)):
            (folder / file).write_text("".join(f"{each}\n" for each in names), encoding="utf-8")
        settings = ["records=line", "corpus.test=held-out.txt", "split=[0.97, 0.03, 0]", f"train.seed={seed}"]
        command = [sys.executable, "-m", "charlm", "train", "train.txt", "--minutes", str(minutes)]
        command += ["--name", "run", *(f"--set={setting}" for setting in settings)]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        seconds = time.perf_counter() - start
        rows = map(json.loads, (folder / "runs/run/metrics.jsonl").read_text().splitlines())
        loss = [row["test_loss"] for row in rows if "test_loss" in row][-1]
        return loss, num_parameters(charlm.load(folder / "runs/run").model), seconds


def load(path):
    """Return makemore's file as a module; TensorBoard, which only its main program uses, can be missing."""
    if importlib.util.find_spec("tensorboard") is None:
        sys.modules["torch.utils.tensorboard"] = SimpleNamespace(SummaryWriter=None)
    sys.path.append(str(path.parent))  # where the processes of its data loader find it too
    return importlib.import_module(path.stem)


def theirs(path, kind, train, held_out, minutes, seed):
    """Return the same of makemore's model of this kind, trained as its main program does by default."""
    makemore = load(path)
    torch.manual_seed(seed)
    characters, longest = sorted(set("".join(train + held_out))), max(map(len, train + held_out))
    sets = [makemore.CharDataset(names, characters, longest) for names in (train, held_out)]
    config = makemore.ModelConfig(block_size=longest + 1, vocab_size=len(characters) + 1)
    with redirect_stdout(None):
        model = makemore.RNN(config, "gru") if kind == "gru" else makemore.Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8)
    start = time.perf_counter()
    batches = makemore.InfiniteDataLoader(sets[0], batch_size=32, num_workers=4)
    while time.perf_counter() - start < 60 * minutes:
        x, y = batches.next()
        optimizer.zero_grad(set_to_none=True)
        model(x, y)[1].backward()
        optimizer.step()
    seconds, total, count = time.perf_counter() - start, 0.0, 0
    model.eval()
    with torch.inference_mode():
        for x, y in DataLoader(sets[1], batch_size=100):
            characters = int((y >= 0).sum())
            total += model(x, y)[1].item() * characters
            count += characters
    return total / count, sum(each.numel() for each in model.parameters()), seconds


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("names", type=Path, nargs="?", help="a name in each line")
    arguments.add_argument("--makemore", type=Path, metavar="FILE", help="makemore.py, to train its models")
    arguments.add_argument("--minutes", nargs="+", type=float, default=[1.0])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[1])
    options = arguments.parse_args()
    if options.names is None:  # as `make bench` runs it
        print("needs a list of names: python benchmarks/names.py names.txt; nothing measured")
        return
    heading("Names held out")
    names = [name for name in options.names.read_text(encoding="utf-8").split("\n") if name.strip()]
    rows = []
    for minutes in options.minutes:
        for seed in options.seeds:
            parts = split(names, seed)
            results = {"charlm": ours(*parts, minutes, seed)}
            for kind in ("transformer", "gru") if options.makemore and seed == options.seeds[0] else ():
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    task = process.submit(theirs, options.makemore.absolute(), kind, *parts, minutes, seed)
                    results[f"makemore {kind}"] = task.result()
            for name, (loss, parameters, seconds) in results.items():
                figures = [f"{loss:.4f}", f"{seconds:.0f}", f"{parameters:,}"]
                rows.append([name, f"{minutes:g}", f"{seed}", *figures])
                print(*rows[-1], sep=" | ", flush=True)
    print("\n" + markdown(["model", "minutes", "seed", "nats a character", "seconds", "parameters"], rows))


if __name__ == "__main__":
    main()
