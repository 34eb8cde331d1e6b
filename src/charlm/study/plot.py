"""Draw the losses and perplexities of runs (needs the extra `plot`)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from charlm.errors import CharlmError, ConfigError
from charlm.files import write_atomically
from charlm.metrics import perplexity
from charlm.storage.log import Row, curve
from charlm.storage.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Along = Literal["step", "epoch", "seconds"]
Curves = dict[str, list[Row]]

# The colour-blind safe palette of Okabe & Ito; the last is for the ninth run and all after it.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6bb1", "#7f7f7f")


def curves(runs: dict[str, Run]) -> Curves:
    """Return the rows of each run's log that have a loss.

    Raises `CharlmError` for a run without an evaluation, and `ConfigError` for a fill-in model among others.
    """
    found = {name: curve(run) for name, run in runs.items()}
    for name, rows in found.items():
        if not any("val_loss" in row for row in rows):
            raise CharlmError(
                f"the run {name} has no val loss to draw; it is logged every train.eval_every steps, "
                "with a val split"
            )
    filling = [name for name, rows in found.items() if kind(rows)]
    if 0 < len(filling) < len(found):
        raise ConfigError(
            f"{', '.join(filling)} has model.direction: both; a pseudo-perplexity is not comparable with a "
            "perplexity; draw it in another picture"
        )
    return found


def kind(rows: list[Row]) -> str:
    """Return the prefix of the metrics' names: "pseudo-" for a fill-in model, else ""."""
    return "pseudo-" if any(key.startswith("val_pseudo_") for row in rows for key in row) else ""


def draw(curves: Curves, along: Along = "step") -> "Figure":
    """Return a figure with the loss on the left and the perplexity on the right, each run in one colour.

    The train curve has all rows, the val curve those of evaluations.

    along: the quantity on the horizontal axis.
    """
    from matplotlib.figure import Figure  # not pyplot: it needs no display
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(10, 4.4 + 0.22 * math.ceil(len(curves) / 2)), layout="constrained")
    panels = figure.subplots(1, 2)
    prefix = kind(next(iter(curves.values())))
    keys, worst = [], -math.inf
    scales: tuple[Callable[[float], float], ...] = (float, _drawn)
    for i, (name, rows) in enumerate(curves.items()):
        colour = _COLOURS[min(i, len(_COLOURS) - 1)]
        evaluated = [row for row in rows if "val_loss" in row]
        for panel, scale in zip(panels, scales, strict=True):
            for key, points, marker, look in (
                ("train_loss", rows, "x", {"ls": (0, (4, 2)), "lw": 0.9, "alpha": 0.8}),
                ("val_loss", evaluated, "o", {"ls": "-", "lw": 1.8}),
            ):
                x, y = [row[along] for row in points], [scale(row.get(key, math.nan)) for row in points]
                # A single point has no line.
                panel.plot(x, y, color=colour, marker=marker if len(points) == 1 else "", **look)
        best = min(row["val_loss"] for row in evaluated)
        worst = max(best, worst)
        worth = format(perplexity(best), ".2f" if best < 20 else ".3g")
        label = f"{name}: best val {best:.3f}, {prefix}perplexity {worth}"
        keys.append(Line2D([], [], color=colour, lw=2, label=label))
    for panel, title in zip(panels, ("loss, nats per character", f"{prefix}perplexity"), strict=True):
        panel.set(xlabel=along, title=title)
        panel.grid(alpha=0.3)
        if along == "step":
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    # The perplexity of an untrained model would leave no height for the rest.
    panels[1].set_ylim(top=min(panels[1].get_ylim()[1], 3 * perplexity(worst)))
    lines = [Line2D([], [], color="#444", ls=ls, label=name) for ls, name in (("-", "val"), ("--", "train"))]
    panels[0].legend(handles=lines)
    legend = figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 2), frameon=False)
    for shown in legend.get_texts():
        shown.set_parse_math(False)  # a run's name can contain $
    return figure


def _drawn(loss: float) -> float:
    """Return the perplexity, NaN if an axis with margins cannot hold it: a gap in the curve."""
    return value if (value := perplexity(loss)) < 1e300 else math.nan


def plot(curves: Curves, path: Path, along: Along = "step") -> None:
    """Draw `curves` to the image file `path`, in the format given by its suffix.

    Raises `CharlmError` as `check_plot` does, and for a file that cannot be written.
    """
    check_plot(path)
    save(draw(curves, along), path)


def save(figure: "Figure", path: Path) -> None:
    """Write `figure` to the image file `path`, as `plot` does."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=_suffix(path), dpi=150))


def check_plot(path: Path) -> None:
    """Raise `CharlmError` without matplotlib and `ConfigError` for an unknown suffix.

    Called before a training, so that the picture does not fail after it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CharlmError("a plot needs matplotlib: pip install 'charlm-torch[plot]'") from None
    known = Figure().canvas.get_supported_filetypes()
    if _suffix(path) not in known:
        raise ConfigError(f"cannot draw to {path}: the suffix must be one of .{', .'.join(known)}")


def _suffix(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()
