"""Compare the training perplexity of the six models of notebook 001 on Don Quijote with the notebook's.

Each model is trained with its recipe in configs/seeds/ for as many epochs as in the notebook, in its own run
in runs/. The training perplexity of an epoch is over all its characters, here and in the notebook.
"""

import argparse
from pathlib import Path

import torch

from charlm import config as configuration
from charlm.cli.train import TrainingDisplay
from charlm.storage import run as run_folders
from charlm.storage.log import evaluations
from charlm.study.compare import compare, markdown

EPOCHS = [1, 11, 50, 100]

# Training perplexity at EPOCHS, from notebook 001 (institutohumai/cursos-python, NLP/2_Redes_Recurrentes/
# RNN.ipynb), by recipe. The available copy prints epochs 1 to 11; epochs 50 and 100 are as reported
# elsewhere.
NOTEBOOK = {
    "rnn-scratch": [32.49, 10.79, 6.79, 5.77],
    "rnn": [22.64, 9.15, 6.41, 5.71],
    "lstm-scratch": [26.78, 10.13, 6.16, 5.09],
    "lstm": [20.85, 8.67, 5.91, 5.04],
    "gru-scratch": [23.42, 8.29, 5.25, 4.32],
    "gru": [20.02, 7.44, 4.94, 4.32],
}


def report(rows, runs):
    """Return the table, with a dash for an epoch that was not reached."""
    lines = []
    for row in rows:
        reached = {each["epoch"]: each for each in evaluations(runs[row.name])}
        cells, ratio = [], "-"
        for epoch, notebook in zip(EPOCHS, NOTEBOOK[row.name], strict=True):
            ours = reached[epoch]["train_perplexity"] if epoch in reached else None
            cells.append(f"{ours:.2f} / {notebook:.2f}" if ours else f"- / {notebook:.2f}")
            if ours and epoch == 100:
                ratio = f"{ours / notebook:.3f}"
        val = f"{row.val_perplexity:.2f}"
        lines.append([row.name, *cells, ratio, val, f"{row.best_epoch:g}", f"{row.seconds:.0f}"])
    header = ["model", *(f"epoch {epoch}" for epoch in EPOCHS), "ratio at 100", "val", "at epoch", "seconds"]
    return markdown(header, lines)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--corpus", metavar="PATH", help="the text of Don Quijote")
    arguments.add_argument("--epochs", type=int, default=100)
    arguments.add_argument("--output", type=Path, metavar="FILE.md", help="default: print the table")
    options = arguments.parse_args()
    if options.corpus is None:  # not an error: `make bench` runs every script without a text
        print("needs the book: python benchmarks/notebooks.py --corpus quijote.txt")
        return
    overrides = [f"corpus.source={options.corpus}", f"train.epochs={options.epochs}"]
    configs = {name: configuration.load(f"seeds/{name}.yaml", overrides) for name in NOTEBOOK}
    runs = {name: run_folders.new_run(None, f"notebook-{name}") for name in NOTEBOOK}
    rows = compare(configs, runs, TrainingDisplay())
    text = (
        "Training perplexity, charlm / the notebook; the ratio at epoch 100; the lowest val perplexity of\n"
        "charlm, on text not trained on, and its epoch; seconds of training, without evaluations\n"
        f"(CPU threads: {torch.get_num_threads()}, torch {torch.__version__}).\n\n{report(rows, runs)}\n"
    )
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
