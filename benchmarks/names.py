"""Compare charlm with makemore's Transformer and GRU on a list of names, each trained for the same minutes.

    python benchmarks/names.py names.txt --makemore makemore.py --minutes 1 --seeds 1 2 3

For each seed 1,000 random names are held out. charlm chooses everything by `charlm train --minutes`;
makemore's models have the sizes and the optimiser of its main program, the same number of threads and the
same time. The loss is the mean over all held-out characters and the ends of the names.
"""

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
            (folder / file).write_text("".join(f"{each}\n" for each in names))
        settings = ["records=line", "corpus.test=held-out.txt", "split=[0.97, 0.03, 0]", f"train.seed={seed}"]
        command = [sys.executable, "-m", "charlm", "train", "train.txt", "--minutes", str(minutes)]
        command += ["--name", "run", *(f"--set={setting}" for setting in settings)]
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        rows = map(json.loads, (folder / "runs/run/metrics.jsonl").read_text().splitlines())
        loss = [row["test_loss"] for row in rows if "test_loss" in row][-1]
        return loss, num_parameters(charlm.load(folder / "runs/run").model), seconds


def theirs(path, kind, train, held_out, minutes, seed):
    """Return the same of makemore's model of this kind, trained as its main program does by default."""
    start = time.perf_counter()
    spec = importlib.util.spec_from_file_location("makemore", path)
    makemore = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(makemore)
    torch.manual_seed(seed)
    characters, longest = sorted(set("".join(train))), max(map(len, train + held_out))
    sets = [makemore.CharDataset(names, characters, longest) for names in (train, held_out)]
    config = makemore.ModelConfig(block_size=longest + 1, vocab_size=len(characters) + 1)
    model = makemore.RNN(config, "gru") if kind == "gru" else makemore.Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8)
    while time.perf_counter() - start < 60 * minutes:
        for x, y in DataLoader(sets[0], batch_size=32, shuffle=True):
            optimizer.zero_grad(set_to_none=True)
            model(x, y)[1].backward()
            optimizer.step()
            if time.perf_counter() - start >= 60 * minutes:
                break
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
    arguments.add_argument("names", type=Path)
    arguments.add_argument("--makemore", metavar="FILE", help="makemore.py, whose models are trained too")
    arguments.add_argument("--minutes", nargs="+", type=float, default=[1.0])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[1])
    options = arguments.parse_args()
    heading("Names held out")
    names, rows = options.names.read_text().split("\n"), []
    names = [name for name in names if name.strip()]
    for minutes in options.minutes:
        for seed in options.seeds:
            parts = split(names, seed)
            results = {"charlm": ours(*parts, minutes, seed)}
            for kind in ("transformer", "gru") if options.makemore and seed == options.seeds[0] else ():
                results[f"makemore {kind}"] = theirs(options.makemore, kind, *parts, minutes, seed)
            for name, (loss, parameters, seconds) in results.items():
                rows.append(
                    [name, f"{minutes:g}", f"{seed}", f"{loss:.4f}", f"{parameters:,}", f"{seconds:.0f}"]
                )
                print(*rows[-1], sep=" | ", flush=True)
    print("\n" + markdown(["model", "minutes", "seed", "nats a character", "parameters", "seconds"], rows))


if __name__ == "__main__":
    main()
