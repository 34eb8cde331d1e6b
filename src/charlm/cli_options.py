"""Options that several commands share, and what they lead to."""

import sys
from typing import TYPE_CHECKING

import click

from charlm.completion import complete_runs

if TYPE_CHECKING:
    import torch

    from charlm.checkpoint import Loaded

model_option = click.option(
    "--model",
    "-m",
    metavar="PATH",
    shell_complete=complete_runs,
    help="A model file, a run's folder or name.  [default: the newest run]",
)
device_option = click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
implementation_option = click.option(
    "--implementation",
    type=click.Choice(["auto", "scratch", "builtin", "fused"]),
    help="Load the model in this implementation.  [default: the run's setting]",
)
unknown_option = click.option(
    "--unknown",
    type=click.Choice(["error", "skip", "replace"]),
    default="error",
    show_default=True,
    help="Characters that the model does not know: refuse, leave out, or put a space for each (the most "
    "frequent character, if it knows no space).",
)


def stdin_for_dash(argument: str) -> str:
    """`argument`, or where it is - what stdin holds, without the line end that echo adds."""
    from charlm import text

    return text.decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n") if argument == "-" else argument


def load(model: str | None, implementation: str | None, device: str) -> "Loaded":
    """The model that the options name, on the device that they name."""
    from charlm import runs
    from charlm.checkpoint import load_model
    from charlm.device import choose_device

    place: torch.device = choose_device(device)
    return load_model(runs.find_model(model), implementation, place)
