import copy
import json
import math
import os
import signal

import pytest
import torch

from charlm.errors import CharlmError, Interrupted
from charlm.inference.evaluate import evaluate
from charlm.metrics import Score
from charlm.storage import run as runs
from charlm.storage.model_file import load_model
from charlm.storage.run import Run
from charlm.text.corpus import Corpus
from charlm.training import learner as learning
from charlm.training import saves
from charlm.training import trainer as module
from charlm.training.learner import Learner, Prediction
from charlm.training.trainer import Trainer
from conftest import configure


class Silent:
    """A reporter that shows nothing; `on_step` is called after each step."""

    def __init__(self, on_step=lambda: None):
        self.on_step, self.rows, self.between, self.samples, self.said = on_step, [], [], [], []

    def begin(self, step, total_steps, steps_per_epoch):
        pass

    def step(self, loss, characters, seconds):
        self.on_step()

    def logged(self, row):
        self.between.append(row)

    def evaluated(self, row, best):
        self.rows.append((row, best))

    def sample(self, text):
        self.samples.append(text)

    def say(self, line):
        self.said.append(line)

    def end(self):
        pass


@pytest.fixture
def train(tmp_path, words):
    """Train on the made-up words: train("key=value", ..., name=...) -> (trainer, run, reporter)."""

    def train(*overrides, name="run", on_step=lambda: None, resume=False):
        config, reporter = configure(*overrides), Silent(on_step)
        trainer, run = Trainer(config, Corpus.from_text(words)), Run(tmp_path / name)
        if resume:
            trainer.restore(run)
        else:
            runs.create(run, config)
        trainer.train(run, reporter)
        return trainer, run, reporter

    return train


def rows(run):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "chars_per_second")} for row in lines]


def same_weights(first, second):
    first, second = first.learner, second.learner
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    averages = zip(first.scored.parameters(), second.scored.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in (*pairs, *averages))


@pytest.mark.parametrize("sampling", ["sliding", "contiguous"])
def test_log_has_each_evaluation_and_the_test_of_the_best_model(train, sampling):
    trainer, run, reporter = train("train.epochs=3", f"batches.sampling={sampling}")
    *evaluations, test = [row for row in rows(run) if "val_loss" in row or "test_loss" in row]
    assert [row["epoch"] for row in evaluations] == [1, 2, 3]
    assert evaluations[2]["step"] == 3 * trainer.learner.steps_per_epoch
    named = {"step", "epoch", "train_loss", "val_loss", "lr", "grad_norm", "chars_per_second", "seconds"}
    assert named <= reporter.rows[0][0].keys()
    best = load_model(run.best)
    assert evaluate(best.model, trainer.corpus.val).loss == min(row["val_loss"] for row in evaluations)
    assert test["test_loss"] == evaluate(best.model, trainer.corpus.test).loss
    assert load_model(run.last).figures["step"] == trainer.learner.total_steps


def test_train_loss_is_the_mean_over_the_characters_since_the_last_row(words, tmp_path):
    seen = []

    class Recorder(Silent):
        def step(self, loss, characters, seconds):
            seen.append((loss, characters))

    config = configure("train.epochs=2", "batches.batch_size=9")
    trainer, run = Trainer(config, Corpus.from_text(words)), Run(tmp_path / "run")
    runs.create(run, config)
    trainer.train(run, Recorder())
    n = trainer.learner.steps_per_epoch
    assert len({characters for _, characters in seen}) == 2, "the last batch of an epoch is smaller"
    for row, part in zip(rows(run), (seen[:n], seen[n:]), strict=False):
        mean = sum(loss * size for loss, size in part) / sum(size for _, size in part)
        assert row["train_loss"] == pytest.approx(mean, rel=1e-12)


def test_rows_between_evaluations_have_the_loss_since_the_row_before(words, tmp_path, monkeypatch):
    poison(monkeypatch, {6, 13, 14, 15, 16})  # a skipped step, and a row of skipped steps only
    seen = []

    class Recorder(Silent):
        def step(self, loss, characters, seconds):
            seen.append(loss)

    overrides = [
        "train.log_every=4",
        "train.eval_every=10",
        "train.max_steps=20",
        "batches.max_val_windows=3",
    ]
    config = configure(*overrides)
    trainer, run, recorder = Trainer(config, Corpus.from_text(words)), Run(tmp_path / "run"), Recorder()
    runs.create(run, config)
    trainer.train(run, recorder)
    found = {row["step"]: row for row in rows(run) if "train_loss" in row}
    assert list(found) == [4, 8, 10, 12, 20], "no row without a taken step, no second row at an evaluation"
    assert [row["step"] for row in recorder.between] == [4, 8, 12]
    assert recorder.between[0].keys() == {
        "step", "epoch", "train_loss", "lr", "grad_norm", "chars_per_second", "seconds",
    }  # fmt: skip
    for step, begin in ((4, 0), (8, 4), (10, 0), (12, 10), (20, 10)):
        losses = [loss for loss in seen[begin:step] if math.isfinite(loss)]
        assert found[step]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_seconds_count_the_making_of_batches_and_no_evaluations(words, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(learning.time, "perf_counter", lambda: clock[0])
    config = configure("train.max_steps=4", "train.eval_every=2")
    trainer, run = Trainer(config, Corpus.from_text(words)), Run(tmp_path / "run")
    loader, forward = trainer.learner.batches.loader, Prediction.forward

    def slow_loader(*arguments):
        for batch in loader(*arguments):
            clock[0] += 3
            yield batch

    def slow_forward(self, *inputs):
        clock[0] += 5
        return forward(self, *inputs)

    def slow_evaluate(*arguments):
        clock[0] += 100
        return Score(2.0, 1)

    monkeypatch.setattr(trainer.learner.batches, "loader", slow_loader)
    monkeypatch.setattr(Prediction, "forward", slow_forward)
    monkeypatch.setattr(module, "evaluate_split", slow_evaluate)
    runs.create(run, config)
    reporter = Silent()
    trainer.train(run, reporter)
    assert [row["seconds"] for row, _ in reporter.rows] == [16, 32]
    assert [row["chars_per_second"] for row, _ in reporter.rows] == [4 * 8 / 8] * 2


@pytest.mark.parametrize(
    ("val", "prefix"),
    [
        ("f of a line\nel perro come\npan duro\n", "el perro come "),
        ("one long line without an end", "long line without "),
        ("abcabcabcabc", "a"),
        ("a line\n\n\nword\nit's 'so'\n", "it's 'so' "),
    ],
)
def test_suggested_prefix_is_the_beginning_of_a_line_of_val(val, prefix):
    train = "".join(sorted(set(val))) * 40
    shares = len(train) / (len(train) + len(val)), len(val) / (len(train) + len(val)), 0.0
    trainer = Trainer(configure(), Corpus.from_text(train + val, shares))
    assert trainer.suggested_prefix == prefix


@pytest.mark.parametrize("implementation", ["scratch", "builtin", "fused"])
def test_same_seed_gives_the_same_bits(train, implementation):
    overrides = ["train.max_steps=20", f"model.implementation={implementation}", "model.dropout=0.3"]
    files = [train(*overrides, name=name)[1].best.read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert files[0] != train(*overrides, "train.seed=2", name="c")[1].best.read_bytes()


def test_samples_do_not_change_the_training(train):
    plain, with_samples = (train("train.epochs=2", f"train.sample_chars={n}", name=f"s{n}") for n in (0, 30))
    assert same_weights(plain[0], with_samples[0])
    assert [len(text) for text in with_samples[2].samples] == [30, 30]


SETTINGS = {
    "windows": [],
    "streams": ["batches.sampling=contiguous"],
    "builtin": ["model.implementation=builtin", "batches.sampling=contiguous"],
    "scratch": ["model.implementation=scratch", "model.cell=gru", "model.num_layers=2"],
    "plateau": ["train.schedule=plateau", "train.lr=0.3", "train.eval_every=7", "train.plateau_patience=1"],
    "sampled": ["train.teacher_forcing=0.3", "batches.sampling=contiguous", "batches.truncation=random"],
    "regularised": [
        "model.num_layers=2",
        "model.locked_dropout=true",
        "model.weight_dropout=0.3",
        "model.embedding_dropout=0.2",
    ],
    "filling": ["model.direction=both"],
    "averaged": ["train.ema=0.98", "batches.sampling=contiguous", "model.num_layers=2"],
    "samples": ["train.sample_chars=9", "train.eval_every=9"],
    "adadelta": ["train.optimizer=adadelta", "train.lr=1.0", "train.schedule=constant"],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_run_ends_with_the_same_weights_and_log(train, setting):
    overrides = [*SETTINGS[setting], "train.max_steps=70", "model.dropout=0.3", "train.checkpoint_every=5"]
    overrides += ["train.log_every=9"]
    whole, run, _ = train(*overrides, name="whole")
    for stop_at in (5, 56, 60):  # an epoch has 56 steps
        steps = []

        def die(steps=steps, stop_at=stop_at):
            steps.append(1)
            if len(steps) == stop_at + 2:  # between two saves
                raise KeyboardInterrupt

        name = f"stopped-{stop_at}"
        with pytest.raises(KeyboardInterrupt):
            train(*overrides, name=name, on_step=die)
        resumed, second, _ = train(*overrides, name=name, resume=True)
        assert same_weights(whole, resumed)
        assert rows(second) == rows(run)
        assert second.best.read_bytes() == run.best.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_and_saves(train, tmp_path, number):
    steps, before = [], signal.getsignal(number)

    def interrupt():
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="--resume") as caught:
        train("train.max_steps=20", on_step=interrupt)
    assert caught.value.exit_code == 128 + number
    assert Run(tmp_path / "run").load_state()["progress"]["step"] == 7
    resumed, _, _ = train("train.max_steps=20", resume=True)
    assert same_weights(resumed, train("train.max_steps=20", name="whole")[0])
    assert signal.getsignal(number) == before


def test_early_stopping_waits_for_its_patience(train, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.3, 1.0])
    monkeypatch.setattr(module, "evaluate_split", lambda *args: Score(next(losses, 9.0), 1))
    _, run, reporter = train("train.epochs=50", "train.early_stopping=3")
    assert [best for _, best in reporter.rows] == [True, True, False, False, False]
    assert load_model(run.best).figures["val_loss"] == 2.0


def test_more_epochs_extend_a_finished_run(train):
    trainer, _, _ = train("train.epochs=2")
    longer, run, _ = train("train.epochs=3", resume=True)
    assert longer.learner.progress.step == 3 * trainer.learner.steps_per_epoch
    assert [row["epoch"] for row in rows(run) if "val_loss" in row] == [1, 2, 3]


def poison(monkeypatch, steps):
    """Make the loss NaN at `steps` of all that are tried; returns the learning rates of all."""
    rates, training, step, forward = [], [], Learner.step, Prediction.forward

    def noted(self, x, y):
        training[:] = [self]
        return step(self, x, y)

    def poisoned(self, *inputs):
        logits, y, state = forward(self, *inputs)
        rates.append(training[0].optimizer.param_groups[0]["lr"])
        return (logits * math.nan if len(rates) in steps else logits), y, state

    monkeypatch.setattr(Learner, "step", noted)
    monkeypatch.setattr(Prediction, "forward", poisoned)
    return rates


ALL_STEPS = range(1, 10**9)


def test_diverged_training_stops_with_advice(train, monkeypatch):
    poison(monkeypatch, ALL_STEPS)
    with pytest.raises(CharlmError, match=r"diverged.*train\.lr"):
        train()


def test_step_that_is_not_finite_is_skipped(words, monkeypatch):
    learner = Learner(configure("batches.sampling=contiguous", "train.ema=0.9"), Corpus.from_text(words))
    poison(monkeypatch, {3})
    batches = learner.remaining_batches()
    for _ in range(2):
        learner.step(*next(batches))
    before = copy.deepcopy(learner.state())
    learner.step(*next(batches))
    after = learner.state()
    assert "loss is nan" in learner.skip_reason and learner.carried is None
    for key in ("weights", "average"):
        assert all(torch.equal(after[key][name], before[key][name]) for name in before[key])
    for mine, theirs in zip(
        after["optimizer"]["state"].values(), before["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    same = {"grad_norm"}
    assert {k for k, v in after["progress"].items() if v == before["progress"][k]} >= same
    assert after["progress"]["step"] == 3 and after["progress"]["bad_steps"] == 1
    learner.step(*next(batches))
    assert learner.skip_reason is None and learner.progress.bad_steps_in_a_row == 0


def test_too_many_skipped_steps_roll_back_and_halve_the_learning_rate(train, monkeypatch):
    rates = poison(monkeypatch, {3, 8, 9, 10})
    overrides = ["train.eval_every=5", "train.max_bad_steps=3", "train.schedule=constant", "train.lr=0.01"]
    trainer, run, reporter = train(*overrides, "train.max_steps=12", "model.dropout=0.3")
    assert [row["event"] for row in rows(run) if "event" in row] == ["bad_step"] * 4 + ["rollback"]
    (back,) = (row for row in rows(run) if row.get("event") == "rollback")
    assert (back["from_step"], back["step"], back["bad_steps"], back["rollbacks"]) == (10, 5, 4, 1)
    assert rates == [0.01] * 10 + [0.005] * 7
    evaluations = [row for row in rows(run) if "val_loss" in row]
    assert [row.get("bad_steps") for row in evaluations] == [1, 4, 4]
    assert [row.get("rollbacks") for row in evaluations] == [None, 1, 1]
    assert any("from step 10 to 5" in line for line in reporter.said) and len(reporter.said) == 5
    assert trainer.learner.progress.step == 12


@pytest.mark.parametrize("stop_at", [7, 9, 13])
def test_rollback_does_not_depend_on_a_stop(train, monkeypatch, stop_at):
    bad, overrides = {8, 9, 10}, ["train.eval_every=5", "train.max_bad_steps=3", "train.max_steps=14"]
    with monkeypatch.context() as patch:
        poison(patch, bad)
        whole, run, _ = train(*overrides, name="whole")
    steps = poison(monkeypatch, bad)
    stop = lambda: os.kill(os.getpid(), signal.SIGINT) if len(steps) == stop_at else None
    with pytest.raises(Interrupted):
        train(*overrides, name="stopped", on_step=stop)
    resumed, second, _ = train(*overrides, name="stopped", resume=True)
    assert same_weights(whole, resumed) and rows(second) == rows(run)
    assert not (second.folder / "checkpoints").exists()


def test_saves_by_time_do_not_change_the_weights(train):
    plain, timed = (
        train("train.max_steps=9", *more, name=f"n{len(more)}")
        for more in ([], ["train.checkpoint_every=0.001s"])
    )
    assert same_weights(plain[0], timed[0])


def test_val_loss_that_is_not_finite_rolls_back(train, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "evaluate_split", lambda *args: Score(math.nan, 1))
    with pytest.raises(CharlmError, match="diverged at step 5: the val loss is nan, after 2 rollbacks"):
        train("train.max_steps=9", "train.eval_every=5", "train.max_rollbacks=2")
    assert Run(tmp_path / "run").load_state()["progress"]["step"] == 0
    assert [row["event"] for row in rows(Run(tmp_path / "run"))] == ["rollback"] * 2


def test_run_killed_between_two_writes_is_restored(train, monkeypatch):
    overrides = ["train.max_steps=12", "train.eval_every=4", "train.lr=0.02", "train.schedule=constant"]
    _, run, _ = train(*overrides, name="whole")
    with monkeypatch.context() as patch:  # after state.safetensors, before the models
        patch.setattr(saves.Saves, "_write_models", lambda *args: 1 / 0 if args[1].step == 12 else None)
        with pytest.raises(ZeroDivisionError):
            train(*overrides, name="killed")
    left = Run(run.folder.with_name("killed"))
    (left.folder / ".state.safetensors.01234567").write_text("half")
    _, mended, _ = train(*overrides, name="killed", resume=True)
    assert (mended.best.read_bytes(), mended.last.read_bytes()) == (
        run.best.read_bytes(),
        run.last.read_bytes(),
    )
    assert rows(mended) == rows(run)
    assert not list(left.folder.glob(".*"))


def test_run_killed_before_its_first_save_starts_at_step_0(train, tmp_path):
    runs.create(Run(tmp_path / "run"), configure())
    assert train("train.max_steps=2", resume=True)[0].learner.progress.step == 2


def test_other_batches_restart_the_epoch(train, words):
    trainer, run, _ = train("train.max_steps=80", "train.lr=0.01")
    config = configure(
        "train.max_steps=80", "train.lr=0.02", "batches.batch_size=8", "train.betas=[0.5, 0.9]"
    )
    other = Trainer(config, Corpus.from_text(words))
    other.restore(run)
    assert 80 // trainer.learner.steps_per_epoch == 1
    assert other.learner.progress.step == other.learner.steps_per_epoch == 28
    assert other.learner.optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    other.train(run, Silent())
    assert other.learner.progress.step == 80 and other.learner.progress.rollbacks == 0


@pytest.mark.parametrize("change", ["batches.seq_len=4", "train.max_rollbacks=1"])
def test_changed_run_can_roll_back_and_stops(train, words, tmp_path, monkeypatch, change):
    """Other batches count other steps; the run may have rolled back more often than is now allowed."""
    begin = ["train.max_steps=77", "train.max_bad_steps=2"]
    if "rollbacks" in change:
        poison(monkeypatch, ALL_STEPS)
        with pytest.raises(CharlmError, match="3 rollbacks"):
            train(*begin)
    else:
        train(*begin)
        poison(monkeypatch, ALL_STEPS)
    run = Run(tmp_path / "run")
    other = Trainer(configure("train.max_steps=400", *begin[1:], change), Corpus.from_text(words))
    other.restore(run)
    with pytest.raises(CharlmError, match="diverged .* 3 rollbacks"):
        other.train(run, Silent())


def test_run_resumes_from_a_kept_checkpoint(train, words):
    overrides = ["train.max_steps=12", "train.eval_every=3", "train.keep_last=2"]
    whole, run, _ = train(*overrides)
    assert run.checkpoints() == [9, 12]
    assert load_model(run.checkpoint(9).last).figures["step"] == 9
    end, own = run.last.read_bytes(), run.checkpoint(9).folder.with_name("step-00000009-mine")
    own.mkdir()
    again = Trainer(configure(*overrides), Corpus.from_text(words))
    with pytest.raises(CharlmError, match="step 3; its saves: 9, 12"):
        again.restore(run, 3)
    again.restore(run, 9)
    again.train(run, Silent())
    assert run.last.read_bytes() == end and same_weights(whole, again)
    assert [row["step"] for row in rows(run) if "val_loss" in row] == [3, 6, 9, 12]
    assert own.exists()


def test_run_killed_before_its_first_evaluation_can_be_resumed(train):
    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("train.max_steps=5", on_step=die)
    resumed, _, _ = train("train.max_steps=5", resume=True)
    assert same_weights(resumed, train("train.max_steps=5", name="whole")[0])


def test_logged_lr_is_the_one_used(train):
    _, run, _ = train("train.epochs=2", "train.schedule=step", "train.decay=0.1", "train.lr=0.01")
    assert [row["lr"] for row in rows(run) if "val_loss" in row] == [0.01, pytest.approx(0.001)]


def test_max_steps_overrides_epochs(train):
    assert train("train.epochs=1", "train.max_steps=70", "train.eval_every=70")[0].learner.progress.step == 70


def test_max_val_windows_limits_val(words):
    trainer = Trainer(configure("batches.max_val_windows=3", "batches.stride=2"), Corpus.from_text(words))
    assert len(trainer.val) == 2 * 2 + 8 + 1


def test_val_split_that_is_too_short_is_refused(words):
    with pytest.raises(CharlmError, match="val split has 1 characters"):
        Trainer(configure(), Corpus.from_text(words, (0.999, 0.0005, 0.0005)))


def test_resume_refuses_another_corpus(train, tmp_path):
    train("train.max_steps=2")
    other = Trainer(configure("train.max_steps=4"), Corpus.from_text("another text altogether " * 50))
    with pytest.raises(CharlmError, match="corpus has changed"):
        other.restore(Run(tmp_path / "run"))


WRONG = {
    "a batch of another size": lambda state: state.update(sequences=9),
    "no steps": lambda state: state.update(steps_per_epoch=0),
    "a step below 0": lambda state: state["progress"].update(step=-1),
    "a count that is a text": lambda state: state["progress"].update(bad_steps="1"),
    "figures without a step": lambda state: state.update(figures={}),
    "a weight for all": lambda state: state["weights"].update({"head.bias": torch.ones(1)}),
    "a moment of another shape": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(2)),
    "a learning rate that is a text": lambda state: state["optimizer"]["param_groups"][0].update(lr="1"),
    "a plateau that is a list": lambda state: state["plateau"].update(best=[]),
    "a hidden state for all": lambda state: state.update(carried=(torch.ones(1, 1, 1),) * 2),
    "half a hidden state": lambda state: state.update(carried=state["carried"][:1]),
    "a generator of floats": lambda state: state.update(rng=torch.ones(1, 9)),
}


@pytest.mark.parametrize("case", WRONG)
def test_state_that_does_not_fit_is_refused(train, words, tmp_path, case):
    overrides = ["train.max_steps=3", "train.schedule=plateau", "batches.sampling=contiguous"]
    _, run, _ = train(*overrides)
    state = run.load_state()
    WRONG[case](state)
    run.save_state(state)
    with pytest.raises(CharlmError, match="state.safetensors does not fit"):
        Trainer(configure(*overrides), Corpus.from_text(words)).restore(run)


def test_resume_refuses_another_model(train, words, tmp_path):
    train("train.max_steps=2")
    other = Trainer(configure("model.cell=rnn"), Corpus.from_text(words))
    with pytest.raises(CharlmError, match="does not fit"):
        other.restore(Run(tmp_path / "run"))


def test_metrics_of_a_filling_model_have_their_own_names(train):
    _, run, reporter = train("model.direction=both", "train.epochs=1", "train.sample_chars=9")
    evaluation, test = rows(run)
    assert "val_pseudo_perplexity" in evaluation and "test_pseudo_perplexity" in test
    assert not any("perplexity" in key and "pseudo" not in key for row in rows(run) for key in row)
    assert reporter.samples == []


def parameters(trainer):
    return [parameter.detach().clone() for parameter in trainer.learner.model.parameters()]


@pytest.mark.parametrize(
    "more", [[], ["model.direction=both"], ["model.tie_weights=true", "model.embedding_size=12"]]
)
def test_average_is_evaluated_and_saved_and_does_not_change_the_weights(words, tmp_path, more):
    results = []
    for ema in ("0.9", "null"):
        config = configure(f"train.ema={ema}", "train.max_steps=12", "train.eval_every=5", *more)
        trainer, run = Trainer(config, Corpus.from_text(words)), Run(tmp_path / ema)
        runs.create(run, config)
        weights = [parameters(trainer)]
        trainer.train(run, Silent(lambda t=trainer, w=weights: w.append(parameters(t))))
        results.append((trainer, run, weights))
    (averaged, run, weights), (plain, _, _) = results
    expected = [tensor.double() for tensor in weights[0]]
    for n, now in enumerate(weights[1:]):
        d = min(0.9, (1 + n) / (10 + n))
        expected = [d * mean + (1 - d) * tensor for mean, tensor in zip(expected, now, strict=True)]
    last = load_model(run.last).model
    for saved, mean in zip(last.parameters(), expected, strict=True):
        assert torch.allclose(saved.double(), mean, atol=1e-6)
    *_, final, _ = rows(run)
    assert final["val_loss"] == evaluate(last, averaged.corpus.val).loss
    assert evaluate(averaged.learner.model, averaged.corpus.val).loss != final["val_loss"]
    assert plain.learner.scored is plain.learner.model
    for ours, theirs in zip(
        averaged.learner.model.parameters(), plain.learner.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), "the training is the same"
