"""The commands that examine models and machines: gradcheck, gradflow, compare, bench."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from charlm.cli.options import (
    CellChoice,
    config_option,
    device_option,
    json_option,
    set_option,
    threads_option,
)
from charlm.errors import CharlmError, ConfigError
from charlm.files import json_text

if TYPE_CHECKING:
    from charlm.config import BatchesConfig, ModelConfig

SIX = ["rnn.yaml", "rnn-scratch.yaml", "lstm.yaml", "lstm-scratch.yaml", "gru.yaml", "gru-scratch.yaml"]


@click.command()
@config_option("recipe")
@set_option()
@click.option("--entries", type=click.IntRange(1), default=10, help="Entries to check per tensor.")
@click.option("--tolerance", type=click.FloatRange(0), default=1e-6, help="Largest relative error allowed.")
def gradcheck(recipe: str | None, overrides: tuple[str, ...], entries: int, tolerance: float) -> None:
    """Check the gradients of a model: numeric against analytic, in float64.

    Checks every parameter tensor of the configured model, untrained. Exits with 1 if a relative error is
    above the tolerance.
    """
    from charlm import config as configuration
    from charlm.study.gradcheck import gradcheck as check

    checks = check(configuration.load(recipe, overrides), entries)
    click.echo(f"{'parameter':<30} {'numeric':>14} {'analytic':>14} {'relative error':>15}")
    for row in checks:
        click.echo(
            f"{row.parameter:<30} {row.numeric:>14.6e} {row.analytic:>14.6e} {row.relative_error:>15.2e}"
        )
    if wrong := [row.parameter for row in checks if not row.relative_error <= tolerance]:
        raise CharlmError(
            f"the relative error of the gradients of {', '.join(wrong)} is above --tolerance {tolerance:g}"
        )


@click.command()
@config_option("recipe", help="A recipe: the text and the sizes.  [default: the defaults]")
@set_option()
@click.option("--steps", type=click.IntRange(1), default=50, help="Steps back in time.")
@click.option("--train-steps", type=click.IntRange(0), default=300, help="Training steps.")
@click.option("--scale", type=float, default=4.0, help="Factor for recurrent weights that explode.")
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

    Prints the norm of the gradient of the last step's loss with respect to the hidden state h (and the cell
    state c of the LSTM) k steps back, for RNN, LSTM and GRU, untrained and trained, and for an RNN whose
    recurrent weights are too large.
    """
    from charlm import config as configuration
    from charlm.nn.kernels.native import keep_memory
    from charlm.study import plot as plotting
    from charlm.study.gradflow import gradflow_by_cell, plot

    if picture:
        plotting.check_plot(Path(picture))
    keep_memory()
    curves = gradflow_by_cell(configuration.load(recipe, overrides), steps, train_steps, scale)
    shown = [k for k in (0, 1, 2, 5, 10, 20, 30, 40, 50, 75, 100, 200) if k <= steps]
    click.echo(f"{'steps back':<20}" + "".join(f"{k:>10}" for k in shown))
    for name, norms in curves.items():
        click.echo(f"{name:<20}" + "".join(f"{norms[k]:>10.1e}" for k in shown))
    if picture:
        plot(curves, Path(picture))
        click.echo(f"wrote {picture}", err=True)


@click.command()
@config_option("recipes", multiple=True, help="A recipe; give two or more.")
@click.option("--all", "all_six", is_flag=True, help="Compare RNN, LSTM and GRU, built in and from scratch.")
@set_option()
@click.option("--format", "form", type=click.Choice(["markdown", "csv", "json"]), default="markdown")
@click.option("--plot", "picture", metavar="FILE", help="Draw the losses (needs the extra `plot`).")
def compare(
    recipes: tuple[str, ...], all_six: bool, overrides: tuple[str, ...], form: str, picture: str | None
) -> None:
    """Train several recipes on the same data, seed and budget, and print one table.

    Each recipe is trained in its own run in runs/. --set applies to all recipes.
    """
    from charlm import config as configuration
    from charlm.cli.display import TrainingDisplay
    from charlm.nn.kernels.native import keep_memory
    from charlm.storage import run as runs
    from charlm.study import compare as comparison
    from charlm.study import plot as plotting

    chosen = [*recipes, *(SIX if all_six else [])]
    if len(chosen) < 2:
        raise ConfigError(
            f"compare needs two or more recipes, got {len(chosen)}; give --config A --config B, or --all"
        )
    if picture:
        plotting.check_plot(Path(picture))
    names = [str(Path(recipe).with_suffix("")).replace("/", "-") for recipe in chosen]
    if len(set(names)) < len(names):
        raise ConfigError(f"a recipe is given twice in {', '.join(chosen)}; give each once")
    configs = {
        name: configuration.load(recipe, overrides) for name, recipe in zip(names, chosen, strict=True)
    }
    folders = {name: runs.new_run(None, name) for name in names}
    keep_memory()
    rows = comparison.compare(configs, folders, TrainingDisplay())
    click.echo(comparison.table(rows, form))  # type: ignore[arg-type]
    if picture:
        plotting.plot(plotting.curves(folders), Path(picture))
        click.echo(f"wrote {picture}", err=True)


@click.command()
@click.option("--cell", "cells", multiple=True, type=CellChoice(), help="Can be repeated.  [default: all]")
@click.option("--hidden-size", type=click.IntRange(1), default=192)
@click.option("--num-layers", type=click.IntRange(1), default=1)
@click.option("--batch-size", type=click.IntRange(1), default=32)
@click.option("--seq-len", type=click.IntRange(1), default=64)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=3.0,
    help="Training time for each row of the table; generation takes a third of it.",
)
@click.option("--profile", is_flag=True, help="Show where the time of a training step goes, for each cell.")
@device_option
@threads_option
@json_option()
def bench(
    cells: tuple[str, ...],
    hidden_size: int,
    num_layers: int,
    batch_size: int,
    seq_len: int,
    seconds: float,
    profile: bool,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how fast this machine trains and generates, in each implementation.

    Prints the characters per second of training steps and of generation, and the share of the machine's rate
    of matrix products that training reaches (6 operations per weight and character). The rows alternate;
    figures are medians of three rounds. With --profile, prints the parts of a training step instead. Run
    nothing else at the same time.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would print its starts and stops

    import torch

    from charlm.config import CELL_NAMES, BatchesConfig, ModelConfig
    from charlm.nn.device import choose_threads
    from charlm.nn.kernels.native import keep_memory
    from charlm.study import bench as benchmark
    from charlm.study.compare import markdown

    keep_memory()
    model = ModelConfig(hidden_size=hidden_size, num_layers=num_layers)
    torch.set_num_threads(choose_threads(threads, model, batch_size)[0])
    batches = BatchesConfig(batch_size=batch_size, seq_len=seq_len, stride=seq_len)
    title = f"{num_layers} × {hidden_size}, batch {batch_size} × {seq_len}"
    if profile:
        _print_profiles(cells or tuple(CELL_NAMES), model, batches, device, seconds, title, as_json)
        return
    report = benchmark.bench(cells or CELL_NAMES, model, batches, device, seconds)
    if as_json:
        click.echo(json_text(asdict(report), indent=2))
        return
    rates = ", ".join(f"{name} {rate / 1e9:,.1f}" for name, rate in report.products.items())
    click.echo(
        f"{report.machine}\n{title}, {report.device}, {report.precision}\nmatrix products, GFLOP/s: {rates}\n"
    )
    columns = {
        "cell": "{.cell}",
        "implementation": "{.implementation}",
        "training, chars/s": "{.trained:,.0f}",
        "vs. builtin": "{.ratio:.2f}",
        "of products": "{.share:.1%}",
        "generation, chars/s": "{.written:,.0f}",
    }
    rows = [[column.format(row) for column in columns.values()] for row in report.rows]
    click.echo(markdown([*columns], rows))


def _print_profiles(
    cells: tuple[str, ...],
    model: "ModelConfig",
    batches: "BatchesConfig",
    device: str,
    seconds: float,
    title: str,
    as_json: bool,
) -> None:
    """Print the parts of a training step of each cell."""
    from charlm.config import Config, TrainConfig
    from charlm.study import bench as benchmark
    from charlm.study.compare import markdown

    train, found = TrainConfig(device=device, lr=1e-4, schedule="constant"), {}
    for cell in cells:
        config = Config(model=model.model_copy(update={"cell": cell}), batches=batches, train=train)
        found[cell] = benchmark.profile(config, seconds)
    if as_json:
        click.echo(json_text({c: {"seconds": p, "share": s} for c, (p, s) in found.items()}, indent=2))
        return
    click.echo(f"{benchmark.machine()}\n{title}\n")
    for cell, (parts, share) in found.items():
        total = sum(parts.values())
        rows = [[name, f"{1e3 * part:.2f}", f"{part / total:.1%}"] for name, part in parts.items()]
        click.echo(markdown([cell, "ms", "share"], rows))
        click.echo(f"\n{share:.1%} of the machine's rate of matrix products\n")
