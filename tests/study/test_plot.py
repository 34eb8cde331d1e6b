import math
import sys

import pytest

from charlm.errors import CharlmError, ConfigError
from charlm.storage import log
from charlm.storage.run import Run
from charlm.study.plot import curves, draw, plot

ROWS = {
    "rnn": [
        {"step": 10, "epoch": 0.5, "train_loss": 2.5, "val_loss": 2.6},
        {"step": 20, "epoch": 1, "train_loss": 2.0, "val_loss": 2.3},
    ],
    "gru": [{"step": 20, "epoch": 2, "train_loss": 1.9, "val_loss": 2.2}],
}


def lines(panel):
    return [[list(points) for points in line.get_data()] for line in panel.get_lines()]


def test_draws_both_losses_and_perplexities():
    figure = draw(ROWS)
    loss, perplexity = figure.axes
    assert lines(loss) == [[[10, 20], [2.5, 2.0]], [[10, 20], [2.6, 2.3]], [[20], [1.9]], [[20], [2.2]]]
    assert lines(perplexity)[1] == [[10, 20], [math.exp(2.6), math.exp(2.3)]]
    assert (loss.get_xlabel(), perplexity.get_title()) == ("step", "perplexity")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "rnn: best val 2.300, perplexity 9.97",
        "gru: best val 2.200, perplexity 9.03",
    ]
    first, second = ({line.get_color() for line in panel.get_lines()} for panel in figure.axes)
    assert first == second and len(first) == 2, "a colour a run, the same in both panels"
    loss, _ = draw(ROWS, "epoch").axes
    assert lines(loss)[0] == [[0.5, 1], [2.5, 2.0]] and loss.get_xlabel() == "epoch"


def test_train_curve_has_the_rows_between_evaluations():
    rows = [
        {"step": 1, "train_loss": 3.0},
        {"step": 2, "train_loss": 2.5},
        {"step": 3, "train_loss": 2.0, "val_loss": 2.1},
    ]
    train, val = draw({"a": rows}).axes[0].get_lines()
    assert [list(points) for points in train.get_data()] == [[1, 2, 3], [3.0, 2.5, 2.0]]
    assert [list(points) for points in val.get_data()] == [[3], [2.1]]
    assert (train.get_marker(), val.get_marker()) == ("", "o")


def test_curves_leave_out_rows_that_a_rollback_discarded(tmp_path):
    rows = [{"step": k, "train_loss": 2.0, "val_loss": 2.0} for k in (5, 10)]
    for row in [*rows, {"step": 5, "event": "rollback", "from_step": 12}, rows[1]]:
        log.append(Run(tmp_path), row)
    assert curves({"a": Run(tmp_path)}) == {"a": rows}


def test_high_first_perplexity_does_not_set_the_scale():
    rows = [{"step": step, "train_loss": loss, "val_loss": loss} for step, loss in ((1, 6.0), (2, 1.5))]
    _, perplexity = draw({"a": rows}).axes
    assert perplexity.get_ylim()[1] == pytest.approx(3 * math.exp(1.5))


@pytest.mark.parametrize("losses", [(800.0, 2.0), (800.0, 750.0), (709.0, 690.7)])
def test_perplexity_too_large_for_an_axis_is_a_gap(tmp_path, losses):
    rows = [{"step": k, "train_loss": loss, "val_loss": loss} for k, loss in enumerate(losses)]
    plot({"a": rows}, tmp_path / "a.png")  # without a warning
    drawn = lines(draw({"a": rows}).axes[1])[1][1]
    assert math.isnan(drawn[0]) and math.isnan(drawn[1]) == (losses[1] == 750)


def test_dollar_in_a_name_is_not_a_formula(tmp_path):
    plot({"$a^{2$": ROWS["gru"]}, tmp_path / "a.png")


def test_evaluation_without_train_loss_is_a_gap_in_the_train_curve():
    rows = [{"step": 1, "val_loss": 2.0}, {"step": 2, "train_loss": 1.0, "val_loss": 1.5}]
    train = lines(draw({"a": rows}).axes[0])[0][1]
    assert math.isnan(train[0]) and train[1] == 1.0


def test_suffix_chooses_the_format(tmp_path):
    plot(ROWS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot(ROWS, tmp_path / "curves.SVG")
    assert "<svg" in (tmp_path / "curves.SVG").read_text()
    with pytest.raises(ConfigError, match=r"curves.txt.* \.png"):
        plot(ROWS, tmp_path / "curves.txt")


def test_fill_in_model_is_not_drawn_with_others(tmp_path):
    runs = {name: Run(tmp_path / name) for name in ("a", "b")}
    for name, kind in (("a", ""), ("b", "pseudo_")):
        runs[name].folder.mkdir()
        log.append(
            runs[name], {"step": 1, "train_loss": 1.5, "val_loss": 1.0, f"val_{kind}perplexity": math.e}
        )
    with pytest.raises(ConfigError, match="b .*model.direction: both"):
        curves(runs)
    _, panel = draw(curves({"b": runs["b"]})).axes
    assert panel.get_title() == "pseudo-perplexity"


def test_run_without_an_evaluation_is_refused(tmp_path):
    log.append(Run(tmp_path), {"step": 1, "train_loss": 2.0})
    with pytest.raises(CharlmError, match="run a .*train.eval_every"):
        curves({"a": Run(tmp_path)})


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CharlmError, match=r"pip install 'charlm-torch\[plot\]'"):
        plot(ROWS, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_command_draws_to_the_output(charlm, trained):
    done = charlm("plot", "tiny", "--output", "tiny.svg", "--along", "seconds")
    assert (done.code, done.out, done.err) == (0, "", "wrote tiny.svg\n")
    assert charlm("plot", "nothing").code == 2
