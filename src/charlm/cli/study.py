"""The commands that study models and machines: gradcheck, gradflow, compare, bench."""

import itertools
from dataclasses import asdict
from pathlib import Path

import click

from charlm.cli.options import CellChoice, config_option, json_option, set_option
from charlm.errors import CharlmError, ConfigError
from charlm.files import json_text

SIX = ["rnn.yaml", "rnn-scratch.yaml", "lstm.yaml", "lstm-scratch.yaml", "gru.yaml", "gru-scratch.yaml"]


@click.command()
@config_option()
@set_option()
@click.option(
    "--entries", type=click.IntRange(1), default=10, show_default=True, help="Numbers a tensor to check."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=1e-6,
    show_default=True,
    help="The largest relative error.",
)
def gradcheck(recipe: str | None, overrides: tuple[str, ...], entries: int, tolerance: float) -> None:
    """Check the gradients of a model: numeric against analytic, in float64.

    For every parameter tensor of the configured model, untrained. Exit code 1 above the tolerance.
    """
    from charlm import config as configuration
    from charlm.study.gradcheck import gradcheck as check

    checks = check(configuration.load(recipe, overrides), entries)
    click.echo(f"{'parameter':<30} {'numeric':>14} {'analytic':>14} {'relative error':>15}")
    for row in checks:
        click.echo(
            f"{row.parameter:<30} {row.numeric:>14.6e} {row.analytic:>14.6e} {row.relative_error:>15.2e}"
        )
    wrong = [row.parameter for row in checks if not row.relative_error <= tolerance]
    if wrong:
        raise CharlmError(f"the gradients of {', '.join(wrong)} are off by more than {tolerance:g}")


@click.command()
@config_option(help="A recipe: the text and the sizes.  [default: the defaults]")
@set_option()
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="How far back to look.")
@click.option(
    "--train-steps", type=click.IntRange(0), default=300, show_default=True, help="Steps to train for."
)
@click.option(
    "--scale", type=float, default=4.0, show_default=True, help="Of the recurrent weights that explode."
)
@click.option("--plot", "picture", metavar="FILE", help="Draw the table (needs the extra `plot`).")
def gradflow(
    recipe: str | None,
    overrides: tuple[str, ...],
    steps: int,
    train_steps: int,
    scale: float,
    picture: str | None,
) -> None:
    """Show how gradients vanish or explode on their way back through time.

    The norm of the gradient of the last step's loss with respect to the hidden state h (and the LSTM's cell
    state c) k steps back, for RNN, LSTM and GRU, untrained and trained, and for an RNN whose recurrent
    weights are too large.
    """
    import torch

    from charlm import config as configuration
    from charlm.nn.model import CharLM
    from charlm.study import plot as plotting
    from charlm.study.gradflow import gradflow as flow
    from charlm.study.gradflow import plot
    from charlm.text.corpus import Corpus
    from charlm.training.learner import Learner

    if picture:
        plotting.check_plot(Path(picture))
    base = configuration.load(recipe, overrides)
    corpus = Corpus.load(base.corpus)
    if len(corpus.val) < steps + 2:
        raise ConfigError(
            f"--steps {steps} needs {steps + 2} characters, and the val split has {len(corpus.val)}"
        )
    starts = torch.linspace(0, len(corpus.val) - steps - 2, 32).long()
    ids = corpus.val.unfold(0, steps + 2, 1)[starts].long()
    curves: dict[str, list[float]] = {}

    def look(name: str, model: CharLM) -> None:
        for state, norms in flow(model, ids, steps).items():
            curves[f"{name}, {state}"] = norms

    for cell in configuration.CELL_NAMES:
        changes = [
            f"model.cell={cell}",
            "model.direction=forward",
            "model.dropout=0.0",
            f"train.max_steps={max(train_steps, 1)}",
        ]
        config = configuration.override(base, changes)
        learner = Learner(config, corpus)
        look(cell, learner.model)
        if cell == "rnn":
            large = Learner(config, corpus).model
            weights = large.state_dict()
            large.load_state_dict({k: weights[k] * (scale if "weight_hh" in k else 1) for k in weights})
            look(f"rnn, W_hh × {scale:g}", large)
        if train_steps:
            for x, y in itertools.islice(learner.remaining_batches(), train_steps):
                learner.step(x, y)
            look(f"{cell}, trained", learner.model)
    shown = [k for k in (0, 1, 2, 5, 10, 20, 30, 40, 50, 75, 100, 200) if k <= steps]
    click.echo(f"{'steps back':<20}" + "".join(f"{k:>10}" for k in shown))
    for name, norms in curves.items():
        click.echo(f"{name:<20}" + "".join(f"{norms[k]:>10.1e}" for k in shown))
    if picture:
        plot(curves, Path(picture))
        click.echo(f"drawn in {picture}", err=True)


@click.command()
@config_option("--config", "-c", "recipes", multiple=True, help="A recipe; give two or more.")
@click.option("--all", "all_six", is_flag=True, help="The six: RNN, LSTM and GRU, built in and from scratch.")
@set_option()
@click.option(
    "--format", "form", type=click.Choice(["markdown", "csv", "json"]), default="markdown", show_default=True
)
@click.option("--plot", "picture", metavar="FILE", help="Draw the losses (needs the extra `plot`).")
def compare(
    recipes: tuple[str, ...], all_six: bool, overrides: tuple[str, ...], form: str, picture: str | None
) -> None:
    """Train several recipes on the same data, seed and budget, and print one table.

    Each is a run of its own, under runs/. --set goes on top of every recipe.
    """
    from charlm import config as configuration
    from charlm.cli.train import TrainingDisplay
    from charlm.storage import run as runs
    from charlm.study import compare as comparison
    from charlm.study import plot as plotting

    chosen = [*recipes, *(SIX if all_six else [])]
    if len(chosen) < 2:
        raise ConfigError("a comparison takes two recipes or more: give --config A --config B, or --all")
    if picture:
        plotting.check_plot(Path(picture))
    names = [str(Path(recipe).with_suffix("")).replace("/", "-") for recipe in chosen]
    if len(set(names)) < len(names):
        raise ConfigError(f"a recipe stands twice in {', '.join(chosen)}")
    configs = {
        name: configuration.load(recipe, overrides) for name, recipe in zip(names, chosen, strict=True)
    }
    folders = {name: runs.new_run(None, name) for name in names}
    rows = comparison.compare(configs, folders, TrainingDisplay())
    click.echo(comparison.table(rows, form))  # type: ignore[arg-type]
    if picture:
        plotting.plot(plotting.curves(folders), Path(picture))
        click.echo(f"drawn in {picture}", err=True)


@click.command()
@click.option(
    "--cell",
    "cells",
    multiple=True,
    type=CellChoice(),
    help="May be given again.  [default: all]",
)
@click.option("--hidden-size", type=click.IntRange(1), default=192, show_default=True)
@click.option("--num-layers", type=click.IntRange(1), default=1, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--seq-len", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=3.0,
    show_default=True,
    help="How long each row of the table trains; it writes a third as long.",
)
@click.option("--device", metavar="NAME", default="auto", show_default=True, help="cuda, mps or cpu.")
@json_option()
def bench(
    cells: tuple[str, ...],
    hidden_size: int,
    num_layers: int,
    batch_size: int,
    seq_len: int,
    seconds: float,
    device: str,
    as_json: bool,
) -> None:
    """Measure how fast this machine trains and writes, in each implementation.

    Characters a second of training steps and of writing, and the share of the machine's rate of matrix
    products that training reaches (6 operations a weight a character). The rows take turns; figures are
    medians of three rounds. With several cores, leave the machine alone meanwhile.
    """
    from charlm.config import CELL_NAMES, BatchesConfig, ModelConfig
    from charlm.study import bench as benchmark
    from charlm.study.compare import markdown

    report = benchmark.bench(
        cells or CELL_NAMES,
        ModelConfig(hidden_size=hidden_size, num_layers=num_layers),
        BatchesConfig(batch_size=batch_size, seq_len=seq_len, stride=seq_len),
        device,
        seconds,
    )
    if as_json:
        click.echo(json_text(asdict(report), indent=2))
        return
    rates = ", ".join(f"{name} {rate / 1e9:,.1f}" for name, rate in report.products.items())
    click.echo(
        f"{report.machine}\n{num_layers} × {hidden_size}, batch {batch_size} × {seq_len}, {report.device}, "
        f"{report.precision}\nmatrix products, GFLOP/s: {rates}\n"
    )
    header = [
        "cell",
        "implementation",
        "trained, chars/s",
        "to builtin",
        "of the products",
        "written, chars/s",
    ]
    rows = [
        [
            row.cell,
            row.implementation,
            f"{row.trained:,.0f}",
            f"{row.ratio:.2f}",
            f"{row.share:.1%}",
            f"{row.written:,.0f}",
        ]
        for row in report.rows
    ]
    click.echo(markdown(header, rows))
