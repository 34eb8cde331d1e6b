"""The commands between charlm and other programs: export, import."""

from pathlib import Path

import click

from charlm.cli.options import complete_runs, output_option, set_option
from charlm.errors import ConfigError

_FILE = click.Path(path_type=Path, dir_okay=False)
_force_option = click.option("--force", is_flag=True, help="Write over files that exist.")


@click.command()
@click.argument("model", required=False, metavar="[RUN]", shell_complete=complete_runs)
@click.option(
    "--to",
    required=True,
    type=click.Choice(["onnx", "stanza", "flair", "torch"]),
    help="onnx: a graph of one or more steps. stanza, flair: what those packages load. torch: a state dict, "
    "with the vocabulary (.json) and a module that loads it (char_rnn.py) beside it.",
)
@output_option(type=_FILE, help="The file to write.  [default: the run's name, here]")
@_force_option
def export(model: str | None, to: str, output: Path | None, force: bool) -> None:
    """Write a model as a file that other programs load.

    RUN is a run's folder or name, or a model file; the newest run by default. The weights go over as they
    are, so that the logits are charlm's. What a format cannot hold is refused.
    """
    from charlm.interop.export import ENDINGS, files_of, is_module, refuse
    from charlm.interop.export import export as write
    from charlm.storage import run as runs
    from charlm.storage.header import read_header
    from charlm.storage.model_file import load_model

    _check_name(output)
    path = runs.find_model(model)
    refuse(to, read_header(path).config)
    if output is None:
        output = Path((path.parent.name if path.name == "model.safetensors" else path.stem) + ENDINGS[to])
    if to == "torch" and output.suffix in (".json", ".py"):
        raise ConfigError(f"--output {output} ends as the files beside the weights do: take NAME.pt")
    files = files_of(to, output)
    # char_rnn.py is the same for all models.
    _refuse_existing([path for path in files if not is_module(path)], force)
    for remark in write(load_model(path), to, output):
        click.echo(remark, err=True)
    click.echo(f"wrote {', '.join(map(str, files))}", err=True)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--from",
    "origin",
    required=True,
    type=click.Choice(["stanza", "flair", "torch-char-rnn"]),
    help="stanza, flair: those packages' character models. torch-char-rnn: a state dict of an nn.Embedding, "
    "an nn.RNN, LSTM or GRU, and an nn.Linear, by torch.save or safetensors.",
)
@click.option(
    "--vocab",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Of torch-char-rnn: JSON, a list of characters, or a dictionary from characters to ids or back.",
)
@set_option(help="A setting that the file does not hold, as corpus.lowercase=true or direction=backward.")
@output_option(type=_FILE, help="The model file to write.  [default: NAME.safetensors, here]")
@_force_option
def import_model(
    file: Path, origin: str, vocab: Path | None, overrides: tuple[str, ...], output: Path | None, force: bool
) -> None:
    """Make a model file of another program's model.

    All commands take it with --model. Files are read without running what they might hold; what charlm has no
    place for is refused, or left out and named.
    """
    if (vocab is None) == (origin == "torch-char-rnn"):
        raise ConfigError(
            "--from torch-char-rnn needs --vocab FILE.json, what each id stands for"
            if vocab is None
            else f"--vocab goes with --from torch-char-rnn; a file of {origin}'s holds its vocabulary"
        )
    _check_name(output)
    from charlm.interop.importing import import_model as read
    from charlm.storage.model_file import save_model

    output = output or Path(f"{file.stem}.safetensors")
    if output.resolve() == file.resolve():
        raise ConfigError(f"{output} is the file that is imported; give another --output FILE")
    _refuse_existing([output], force)
    loaded, remarks = read(file, origin, vocab, overrides)
    save_model(output, loaded.model, loaded.vocab, loaded.config, loaded.figures)
    for remark in remarks:
        click.echo(remark, err=True)
    model = loaded.config.model
    click.echo(
        f"wrote {output}: {model.cell} {model.num_layers} × {model.hidden_size}, {model.direction}, "
        f"{len(loaded.vocab)} characters; use it with --model {output}",
        err=True,
    )


def _check_name(output: Path | None) -> None:
    if output is not None and not output.name:
        raise ConfigError("--output '' names no file; give the one to write, or leave --output out")


def _refuse_existing(files: list[Path], force: bool) -> None:
    """Raise `ConfigError` for a file that exists, unless it may be written over."""
    if not force and (existing := [path for path in files if path.exists()]):
        raise ConfigError(f"{existing[0]} exists; give another --output FILE, or --force to write over it")
