"""The losses and perplexities of runs in one picture (needs the extra `plot`)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from charlm.errors import CharlmError, ConfigError
from charlm.files import write_atomically
from charlm.metrics import perplexity
from charlm.storage.log import Row, evaluations
from charlm.storage.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Along = Literal["step", "epoch", "seconds"]
Curves = dict[str, list[Row]]
_LARGEST = 1e300  # what an axis holds with its margins

# Of Okabe & Ito, told apart by all eyes; the last for what comes after the eighth.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6bb1", "#7f7f7f")


def curves(runs: dict[str, Run]) -> Curves:
    """For each run the rows of its log that an evaluation wrote; raises `CharlmError` where one has none."""
    found = {name: evaluations(run) for name, run in runs.items()}
    for name, rows in found.items():
        if not rows:
            raise CharlmError(
                f"the run {name} has no evaluation to draw yet; one comes every train.eval_every"
            )
    if len({kind(rows) for rows in found.values()}) > 1:
        filling = ", ".join(name for name, rows in found.items() if kind(rows))
        raise ConfigError(
            f"{filling} fills in characters: its pseudo-perplexity does not compare with a perplexity; "
            "draw it in a picture of its own"
        )
    return found


def kind(rows: list[Row]) -> str:
    """What stands before the names of the figures of a model that fills in characters."""
    # A log has no perplexity that is infinite.
    return "pseudo-" if any(key.startswith("val_pseudo_") for key in rows[0]) else ""


def draw(curves: Curves, along: Along = "step") -> "Figure":
    """A figure: the loss to the left, the perplexity to the right, each run in one colour.

    along: what the horizontal axis counts.
    """
    from matplotlib.figure import Figure  # not pyplot: a figure of its own draws with Agg, without a display
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    legend_rows = -(-len(curves) // 2)
    figure = Figure(figsize=(10, 4.4 + 0.22 * legend_rows), layout="constrained")
    panels = figure.subplots(1, 2)
    prefix = kind(next(iter(curves.values())))
    keys = []
    scales: tuple[Callable[[float], float], ...] = (float, _drawn)
    for i, (name, rows) in enumerate(curves.items()):
        colour, x = _COLOURS[min(i, len(_COLOURS) - 1)], [row[along] for row in rows]
        for panel, scale in zip(panels, scales, strict=True):
            for split, marker, look in (
                ("train", "x", {"ls": (0, (4, 2)), "lw": 0.9, "alpha": 0.8}),
                ("val", "o", {"ls": "-", "lw": 1.8}),
            ):
                y = [scale(row.get(f"{split}_loss", math.nan)) for row in rows]
                # A single evaluation makes no line.
                panel.plot(x, y, color=colour, marker=marker if len(rows) == 1 else "", **look)
        best = min(row["val_loss"] for row in rows)
        worth = format(perplexity(best), ".2f" if best < 20 else ".3g")
        label = f"{name}: best val {best:.3f}, {prefix}perplexity {worth}"
        keys.append(Line2D([], [], color=colour, lw=2, label=label))
    for panel, title in zip(panels, ("loss, nats per character", f"{prefix}perplexity"), strict=True):
        panel.set(xlabel=along, title=title)
        panel.grid(alpha=0.3)
        if along == "step":
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    # The first evaluations of a model that knows nothing yet would press all others to the floor.
    worst = max(min(row["val_loss"] for row in rows) for rows in curves.values())
    panels[1].set_ylim(top=min(panels[1].get_ylim()[1], 3 * perplexity(worst)))
    lines = [Line2D([], [], color="#444", ls=ls, label=name) for ls, name in (("-", "val"), ("--", "train"))]
    panels[0].legend(handles=lines)
    columns = min(len(keys), 2)
    legend = figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False)
    for shown in legend.get_texts():
        shown.set_parse_math(False)  # a $ is a $
    return figure


def _drawn(loss: float) -> float:
    """The perplexity as a point of a curve: a gap where no float or no axis holds it."""
    return value if (value := perplexity(loss)) < _LARGEST else math.nan


def plot(curves: Curves, path: Path, along: Along = "step") -> None:
    """Draw `curves` into the image file `path`, in the format that its ending names.

    Raises `CharlmError` as `check_plot` does, and for a file that cannot be written.
    """
    check_plot(path)
    figure = draw(curves, along)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=_ending(path), dpi=150))


def check_plot(path: Path) -> None:
    """Raise `CharlmError` where `plot` could not draw to `path`: to be called before hours of training."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CharlmError("a plot needs matplotlib: pip install 'charlm-torch[plot]'") from None
    known = Figure().canvas.get_supported_filetypes()
    if _ending(path) not in known:
        raise ConfigError(f"{path} must be an image, its name ending in one of .{', .'.join(known)}")


def _ending(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()
