"""The commands export and import, which write and read the files of other programs."""

from pathlib import Path

import click

from charlm.cli.options import complete_runs, output_option, set_option
from charlm.errors import ConfigError, Interrupted

_FILE = click.Path(path_type=Path, dir_okay=False)
_force_option = click.option("--force", is_flag=True, help="Overwrite existing files.")


@click.command()
@click.argument("model", required=False, metavar="[RUN]", shell_complete=complete_runs)
@click.option(
    "--to",
    required=True,
    type=click.Choice(["onnx", "stanza", "flair", "torch"]),
    help="onnx: a graph with a state. stanza, flair: a character model of that package. torch: a state dict "
    "with the vocabulary (.json) and a module that loads both (char_rnn.py).",
)
@output_option(type=_FILE, help="The file to write.  [default: the run's name, here]")
@_force_option
def export(model: str | None, to: str, output: Path | None, force: bool) -> None:
    """Write a model to a file that another program loads.

    RUN is a run's name or folder, or a model file; the default is the newest run. The weights are copied
    unchanged, so that the logits are the same. A model that the format cannot represent is refused.
    """
    from charlm.training.reporting import caught_signals

    with caught_signals() as caught:  # an exception inside native code would end in a traceback
        from charlm.interop.export import ENDINGS, check_format, export_model, files_of, is_module
        from charlm.storage import run as runs
        from charlm.storage.header import read_header
        from charlm.storage.model_file import load_model

        def stop_if_interrupted() -> None:
            if caught:
                raise Interrupted("interrupted; no file was written", 128 + caught[0])

        stop_if_interrupted()
        path = runs.find_model(model)
        check_format(to, read_header(path).config)
        name = path.parent.name if path.name == "model.safetensors" else path.stem
        output = output or Path(name + ENDINGS[to])
        if to == "torch" and output.suffix in (".json", ".py"):
            raise ConfigError(f"--output {output}: use NAME.pt; .json and .py are the files beside it")
        files = files_of(to, output)
        # char_rnn.py is the same for all models.
        _check_output([path for path in files if not is_module(path)], force)
        notes = export_model(load_model(path), to, output, stop_if_interrupted)
    click.echo("\n".join([*notes, f"wrote {', '.join(map(str, files))}"]), err=True)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--from",
    "origin",
    required=True,
    type=click.Choice(["stanza", "flair", "torch-char-rnn"]),
    help="stanza, flair: a character model of that package. torch-char-rnn: a state dict of an nn.Embedding, "
    "an nn.RNN, LSTM or GRU, and an nn.Linear, saved by torch.save or safetensors.",
)
@click.option(
    "--vocab",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="For torch-char-rnn: a JSON list of characters, or a dictionary from characters to ids or back.",
)
@set_option(help="A setting that the file does not contain: corpus.lowercase=true, direction=backward.")
@output_option(type=_FILE, help="The model file to write.  [default: NAME.safetensors, here]")
@_force_option
def import_model(
    file: Path, origin: str, vocab: Path | None, overrides: tuple[str, ...], output: Path | None, force: bool
) -> None:
    """Convert a model of another program to a model file.

    All commands take the model file with --model. FILE is read without running code. Parts of the model that
    charlm does not have are refused, or left out and listed.
    """
    if (vocab is None) == (origin == "torch-char-rnn"):
        raise ConfigError(
            f"--from {origin}: torch-char-rnn alone needs --vocab FILE.json, the character of each id"
        )
    from charlm.interop.importing import import_model as read
    from charlm.storage.model_file import save_model

    output = output or Path(f"{file.stem}.safetensors")
    if output.resolve() == file.resolve():
        raise ConfigError(f"--output {output} is the imported file itself; use another name")
    _check_output([output], force)
    loaded, notes = read(file, origin, vocab, overrides)
    save_model(output, loaded.model, loaded.vocab, loaded.config, loaded.figures)
    model = loaded.config.model
    size = f"{model.cell} {model.num_layers} × {model.hidden_size}, {model.direction}"
    wrote = f"wrote {output}: {size}, {len(loaded.vocab)} characters; use it with --model {output}"
    click.echo("\n".join([*notes, wrote]), err=True)


def _check_output(files: list[Path], force: bool) -> None:
    """Raise `ConfigError` for a file without a name, and for one that exists unless `force` is set."""
    for path in files:
        if not path.name:
            raise ConfigError("--output is ''; give a file name, or omit --output")
        if path.exists() and not force:
            raise ConfigError(f"{path} exists; use another --output, or --force to overwrite it")
