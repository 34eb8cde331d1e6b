"""The commands: parse, call one function, print.

Modules that import torch are imported inside the commands, so that ``--help`` answers at once.
What a user pipes goes to stdout, all else to stderr.
"""

import contextlib
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charlm import __version__
from charlm.errors import CharlmError, ConfigError

if TYPE_CHECKING:
    import torch

    from charlm.checkpoint import Loaded
    from charlm.metrics import Score

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    _prepare_streams()
    try:
        cli.main(args=args, prog_name="charlm", standalone_mode=False)
        if sys.stdout:
            sys.stdout.flush()
        return 0
    except CharlmError as error:
        return _fail(str(error), error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message().replace("\n", " "), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except (BrokenPipeError, SystemExit):
        # Whoever read our output has gone; click exits then. Let the interpreter's last flush not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a fault of charlm's
        return _fail(
            "out of memory; take a smaller model.hidden_size, batches.batch_size or batches.seq_len", 1
        )


def _prepare_streams() -> None:
    """Files and pipes get UTF-8 whatever the locale; a terminal that lacks a character shows ? for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _fail(message: str, exit_code: int) -> int:
    with contextlib.suppress(OSError):
        click.echo(f"charlm: {message}", err=True)
    return exit_code


class Finite(click.FloatRange):
    """A range of floats that NaN and infinity are not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number that `value` is."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


@click.group(context_settings=CONTEXT, invoke_without_command=True)
@click.version_option(__version__, prog_name="charlm")
@click.pass_context
def cli(context: click.Context) -> None:
    r"""Train character-level language models with recurrent networks, and write text with them.

    \b
      charlm train --config lstm.yaml
      charlm generate --prefix "quijote "
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_model_option = click.option(
    "--model", "-m", metavar="PATH", help="A model file, a run's folder or name.  [default: the newest run]"
)
_device_option = click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
_implementation_option = click.option(
    "--implementation",
    type=click.Choice(["scratch", "builtin"]),
    help="Load the model in this implementation.  [default: the one it was trained in]",
)
_unknown_option = click.option(
    "--unknown",
    type=click.Choice(["error", "skip", "replace"]),
    default="error",
    show_default=True,
    help="Characters that the model does not know: refuse, leave out, or put a space for each.",
)


@cli.command()
@click.option(
    "--config",
    "-c",
    "recipe",
    metavar="FILE",
    help="A recipe: a path, or a name in ./configs or among those that ship.  [default: the defaults]",
)
@click.option(
    "--set", "-s", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, as train.lr=2e-3."
)
@click.option("--name", metavar="RUN", help="The run's name under runs/.  [default: RECIPE-DATE-TIME]")
@click.option("--resume", metavar="RUN", help="Go on with a run that stopped.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained and written; do nothing.")
def train(
    recipe: str | None, overrides: tuple[str, ...], name: str | None, resume: str | None, dry_run: bool
) -> None:
    """Train a model on a text.

    With no --config, an LSTM on the bundled Spanish corpus. The models, the log and the state to resume from
    are in runs/RUN. Ctrl-C finishes the step, saves and says how to go on.
    """
    from charlm import config as configuration
    from charlm import runs

    if resume:
        if recipe or name:
            raise ConfigError(
                "--resume goes on with a run's own configuration: give no --config and no --name"
            )
        run = runs.find_run(resume)
        before = run.load_config()
        config = configuration.override(before, overrides)
        _refuse_changes(before.model_dump(), config.model_dump())
    else:
        config = configuration.load(recipe, overrides)
        run = runs.new_run(name, Path(recipe).stem if recipe else config.model.cell)

    from charlm.corpus import Corpus
    from charlm.progress import TrainingDisplay
    from charlm.train import Trainer

    display = TrainingDisplay()
    trainer = Trainer(config, Corpus.load(config.corpus))
    if dry_run:
        click.echo(configuration.to_yaml(config))
        click.echo("\n".join(trainer.describe()))
        click.echo(
            f"would write {run.folder}/ with config.yaml, model.safetensors, last.safetensors, state.pt, "
            "metrics.jsonl"
        )
        return
    for line in trainer.describe():
        display.say(line)
    if resume:
        trainer.restore(run)
        if trainer.finished:
            raise ConfigError(
                f"the run {run.folder} is finished, at step {trainer.progress.step}, by {trainer.finished}; "
                "to train on, raise that with --set"
            )
        runs.save_config(run, config)
        display.say(f"resumed  {run.folder} at step {trainer.progress.step} of {trainer.total_steps}")
    else:
        run = runs.create(run, config, rename=name is None)
    result = trainer.train(run, display)
    display.finished(result.best, result.test, run.folder, trainer.suggested_prefix)


_CHANGEABLE = (
    "train.epochs", "train.max_steps", "train.early_stopping", "train.device", "corpus.source",
)  # fmt: skip


def _refuse_changes(before: dict[str, Any], after: dict[str, Any]) -> None:
    """A run goes on as it began, but for its budget, its device, and where its text now is."""
    changed = [
        f"{section}.{key}"
        for section, values in after.items()
        for key, value in values.items()
        if value != before[section][key] and f"{section}.{key}" not in _CHANGEABLE
    ]
    if changed:
        raise ConfigError(
            f"--resume cannot change {', '.join(changed)}, only {', '.join(_CHANGEABLE)}; "
            "begin a new run for the rest"
        )


@cli.command()
@click.option(
    "--prefix", "-p", default="", metavar="TEXT", help="What the text begins with; - reads it from stdin."
)
@click.option(
    "--length", "-n", type=click.IntRange(0), default=500, show_default=True, help="Characters to write."
)
@click.option(
    "--temperature",
    "-t",
    type=Finite(0),
    default=0.7,
    show_default=True,
    help="Below 1 plainer, above 1 wilder; 0 always takes the most probable character.",
)
@click.option("--top-k", type=click.IntRange(1), help="Draw among the K most probable characters.")
@click.option(
    "--top-p",
    type=Finite(0, 1, min_open=True),
    help="Draw among the fewest that hold P of the probability.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="The same seed, the same text.  [default: by chance]"
)
@click.option("--num-samples", type=click.IntRange(1), default=1, show_default=True, help="How many texts.")
@click.option("--stop", default="", metavar="TEXT", help="End a text once TEXT has been written.")
@_unknown_option
@_model_option
@_implementation_option
@_device_option
def generate(
    prefix: str,
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    num_samples: int,
    stop: str,
    unknown: str,
    model: str | None,
    implementation: str | None,
    device: str,
) -> None:
    """Write text with a trained model.

    The text goes to stdout as it is made; of several, sample k is drawn with seed + k, and a line of dashes
    parts them. A run that is still training can be used.
    """
    import torch

    from charlm import sample, text

    loaded = _load(model, implementation, device)
    cleaning = loaded.config.corpus.cleaning
    if prefix == "-":
        prefix = text.decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
    prefix = text.clean(prefix, **cleaning)
    ids = loaded.vocab.encode(prefix, unknown, "the prefix")  # type: ignore[arg-type]
    shown = loaded.vocab.decode(ids)
    stop = text.clean(stop, **{**cleaning, "keep": None})
    if never := set(stop) - set(loaded.vocab.characters):
        raise ConfigError(
            f"--stop {stop!r} can never be written: the model does not know {', '.join(map(repr, never))}"
        )
    for k in range(num_samples):
        generator = torch.Generator()
        generator.manual_seed((seed + k) % 2**63) if seed is not None else generator.seed()
        if k:
            click.echo("-" * 20)
        last = shown
        click.echo(shown, nl=False)
        for last in sample.generate(
            loaded.model, loaded.vocab, ids, length, temperature, top_k, top_p, stop, generator
        ):
            click.echo(last, nl=False)  # flushes
        if not last.endswith("\n"):
            click.echo()


@cli.command("eval")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_unknown_option
@_model_option
@_implementation_option
@_device_option
def evaluate(
    files: tuple[str, ...],
    as_json: bool,
    unknown: str,
    model: str | None,
    implementation: str | None,
    device: str,
) -> None:
    """Score texts: perplexity, bits per character and per byte.

    Each file is cleaned as the model's training text was and scored whole, the state carried: every character
    after the first once. FILE may be compressed, a folder, a glob, or - for stdin.
    """
    from charlm import text
    from charlm.evaluate import evaluate as score
    from charlm.metrics import Score

    loaded = _load(model, implementation, device)
    rows, total, total_bytes = [], Score(), 0
    for name in files:
        paths = [Path("-")] if name == "-" else text.find_files(name)
        for path in paths:
            content = text.decode(sys.stdin.buffer.read(), "stdin") if name == "-" else text.read_file(path)
            content = text.clean(text.strip_gutenberg(content), **loaded.config.corpus.cleaning)
            ids = loaded.vocab.encode(content, unknown, str(path))  # type: ignore[arg-type]
            if len(ids) < 2 and len(paths) > 1:
                click.echo(f"left out: {path} has {len(ids)} characters, too few to score", err=True)
                continue
            if len(ids) < 2:
                raise CharlmError(f"{path} has {len(ids)} characters to score; it takes two or more")
            result = score(loaded.model, ids)
            num_bytes = len(loaded.vocab.decode(ids[1:]).encode())
            rows.append(_score_row(str(path), result, num_bytes))
            total, total_bytes = total + result, total_bytes + num_bytes
    total_row = _score_row("total", total, total_bytes)
    if as_json:
        click.echo(json.dumps({"files": rows, "total": total_row}, indent=2))
        return
    click.echo(
        f"{'characters':>12} {'nats/char':>10} {'perplexity':>11} {'bits/char':>10} {'bits/byte':>10}  file"
    )
    for row in [*rows, total_row] if len(rows) > 1 else rows:
        click.echo(
            f"{row['characters']:>12,} {row['loss']:>10.4f} {row['perplexity']:>11.4g} "
            f"{row['bits_per_character']:>10.4f} {row['bits_per_byte']:>10.4f}  {row['path']}"
        )


def _score_row(path: str, score: "Score", num_bytes: int) -> dict[str, Any]:
    return {
        "path": path,
        "characters": score.characters,
        "nats": score.nats,
        "loss": score.loss,
        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
        "bits_per_character": score.bits_per_character,
        "bits_per_byte": score.bits_per_byte(num_bytes),
    }


@cli.command()
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(model: str | None, as_json: bool) -> None:
    """Show what is in a model file: configuration, parameters, vocabulary, figures.

    MODEL is a model file, a run's folder or name; the newest run by default. Only the file's header is read.
    """
    from math import prod

    from charlm import runs
    from charlm.checkpoint import read_header
    from charlm.config import to_yaml

    path = runs.find_model(model)
    header = read_header(path)
    parameters = sum(prod(shape) for shape in header.tensors.values())
    if as_json:
        shown = {
            "path": str(path),
            "parameters": parameters,
            "tensors": {name: list(shape) for name, shape in header.tensors.items()},
            "vocab": header.vocab,
            "config": header.config.model_dump(mode="json"),
            "figures": header.figures,
        }
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    click.echo(f"{path}: {parameters:,} parameters")
    for name, shape in header.tensors.items():
        click.echo(f"  {name:<28} {' × '.join(map(str, shape))}")
    click.echo(f"\nvocabulary: {len(header.vocab)} characters, the most frequent first\n  {header.vocab!r}")
    click.echo("\nfigures" + "".join(f"\n  {key:<28} {value}" for key, value in header.figures.items()))
    click.echo(f"\nconfiguration\n{to_yaml(header.config)}", nl=False)


def _load(model: str | None, implementation: str | None, device: str) -> "Loaded":
    """The model that the options name, on the device that they name."""
    from charlm import runs
    from charlm.checkpoint import load_model
    from charlm.device import choose_device

    place: torch.device = choose_device(device)
    return load_model(runs.find_model(model), implementation, place)
