"""Print the targets with the figures that the other benchmarks reached: the last table of `make bench`.

Figures are read from the JSON file at $BENCH_RECORD, to which the other scripts add theirs, and otherwise
from benchmarks/results/quality.json, marked as kept (trainings that are too long to run every time).
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from common import RECORD, heading

from charlm.study.compare import markdown

KEPT = Path(__file__).parent / "results" / "quality.json"


class Target(NamedTuple):
    """A row of the table: a quantity and the values it has to reach."""

    key: str  # in the record
    what: str
    least: float
    aim: float
    form: str = "{:.2f}×"
    lower: bool = False  # lower is better
    minutes: float | None = None  # time limit; the record has the seconds


TARGETS = [
    Target("lstm_large_vs_plain", "training 2 × 512, LSTM, to a plain float32 loop", 2.0, 3.0),
    Target("gru_large_vs_plain", "training 2 × 512, GRU, to a plain float32 loop", 2.5, 3.0),
    Target("rnn_large_vs_plain", "training 2 × 512, RNN, to a plain float32 loop", 2.0, 3.0),
    Target("lstm_large_vs_bfloat16", "training 2 × 512, LSTM, to a plain bfloat16 loop", 1.15, 1.5),
    Target("lstm_small_vs_plain", "training 1 × 32, LSTM, to a plain float32 loop", 1.0, 1.5),
    Target("gru_small_vs_plain", "training 1 × 32, GRU, to a plain float32 loop", 1.0, 1.5),
    Target("rnn_small_vs_plain", "training 1 × 32, RNN, to a plain float32 loop", 1.0, 1.5),
    Target("share", "training 2 × 512, LSTM: share of the matrix products", 0.55, 0.75, "{:.1%}"),
    Target("lstm_scratch_vs_builtin", "LSTM 2 × 512 in float32, scratch to builtin", 0.5, 0.8),
    Target("gru_scratch_vs_builtin", "GRU 2 × 512 in float32, scratch to builtin", 0.5, 0.8),
    Target("rnn_scratch_vs_builtin", "RNN 2 × 512 in float32, scratch to builtin", 0.5, 0.8),
    Target("generation", "generation 2 × 512, to a plain nn step loop", 10.0, 20.0),
    Target("encoding", "encoding, MB/s a core", 100.0, 100.0, "{:,.0f}"),
    Target("loader", "the loader's share of a step, 1 × 32", 0.5, 0.1, "{:.1%}", True),
    Target(
        "nats tinyshakespeare 3", "tiny Shakespeare in 3 minutes, val nats", 1.43, 1.41, "{:.3f}", True, 3
    ),
    Target(
        "nats tinyshakespeare 10", "tiny Shakespeare in 10 minutes, val nats", 1.41, 1.39, "{:.3f}", True, 10
    ),
    Target("bfloat16_nats", "bfloat16 and float32, val nats apart", 0.01, 0.01, "{:.4f}", True),
]


def verdict(target, value):
    sign = -1 if target.lower else 1
    if sign * value >= sign * target.aim:
        return "aim"
    return "yes" if sign * value >= sign * target.least else "no"


def rows(figures, kept):
    for target in TARGETS:
        value = figures.get(target.key, kept.get(target.key))
        what = target.what
        if target.key == "share" and "share_of" in figures:
            what = f"{what} in {figures['share_of']}"
        least, aim = target.form.format(target.least), target.form.format(target.aim)
        if value is None:
            yield [what, least, aim, "not measured", "-"]
            continue
        source = figures if target.key in figures else kept
        shown, met = target.form.format(value), verdict(target, value)
        if target.minutes:
            seconds = source[target.key.replace("nats", "seconds")]
            shown += f" in {seconds:,.0f} s"
            met = met if seconds <= 60 * target.minutes else "no: too long"
        yield [what, least, aim, shown + ("" if source is figures else " (kept)"), met]


def main():
    figures, kept = (
        json.loads(path.read_text()) if path.is_file() else {}
        for path in (Path(os.environ.get(RECORD, "-")), KEPT)
    )
    heading("Targets")
    print(markdown(["", "at least", "aim", "reached", "met"], list(rows(figures, kept))))
    if figures.get("share_of") == "float32":
        print("\nThis CPU has no bfloat16 instructions: shares are of its float32 products.")


if __name__ == "__main__":
    main()
