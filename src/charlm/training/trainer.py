"""The training loop: steps, log rows, evaluations, saves and rollbacks, until the budget is spent."""

import math
import shlex
import time
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, Interrupted, one_line
from charlm.inference.evaluate import evaluate_split
from charlm.inference.sample import sample
from charlm.metrics import Score, perplexity
from charlm.nn.layers import choose_implementation
from charlm.nn.model import CharLM, num_parameters
from charlm.storage import log
from charlm.storage.log import Row
from charlm.storage.model_file import load_model
from charlm.storage.run import Run
from charlm.text.batches import val_characters
from charlm.text.corpus import Corpus
from charlm.text.vocab import UNKNOWN
from charlm.training.distributed import ALONE, Group
from charlm.training.learner import Learner
from charlm.training.optim import set_lr
from charlm.training.progress import Progress, Sums
from charlm.training.reporting import Reporter, TensorBoard, caught_signals, check_tensorboard
from charlm.training.saves import Saves

_FIRST_SCORED = 100_000  # characters of val scored before the first step of a training from a model


@dataclass(frozen=True)
class Result:
    """The metrics of the best model, and its score on the test split if there is one.

    On the processes after the first, `best` is empty and `test` is None.
    """

    best: Row
    test: Score | None


class Trainer:
    """A training: `train` runs its `learner` to the end of the budget and writes the files of a run.

    Each process of a `group` makes a trainer and calls the same methods.

    Raises `CharlmError` as `Learner` does, and for a val split that is too short to score.
    """

    def __init__(self, config: Config, corpus: Corpus, group: Group = ALONE, initial: CharLM | None = None):
        if config.train.tensorboard:
            check_tensorboard()
        self.config, self.corpus, self.group = config, corpus, group
        self.val = corpus.val[: val_characters(config.batches)]
        if len(self.val) < 2 and config.corpus.has_val:
            raise CharlmError(
                f"the val split has {len(self.val)} characters, and 2 are needed; "
                "use a longer text or a larger val part in corpus.split"
            )
        self.learner, self.initial = Learner(config, corpus, group, initial), initial
        # A model that fills in characters has a pseudo-likelihood. Its metrics have their own names, so that
        # they are not compared with a perplexity.
        self.kind = "pseudo_" if config.model.direction == "both" else ""
        self.figures: Row = {"step": 0}  # of the last save
        self.resumed = False
        self.diverged_from_save = False  # whether it resumes otherwise than the saved training would continue

    def describe(self) -> list[str]:
        """Return short lines that describe the corpus, the model, the batches and the device."""
        corpus, batches, model = self.corpus, self.config.batches, self.config.model
        learner = self.learner
        files = f" ({len(corpus.files)} files)" if len(corpus.files) > 1 else ""
        sizes = f"train {len(corpus.train):,}, val {len(self.val):,}, test {len(corpus.test):,}"
        implementation, reason = choose_implementation(model, learner.device)
        precision = str(learner.precision).removeprefix("torch.")
        processes = f"{self.group.size} processes × batch " if self.group.size > 1 else ""
        rare = f", one of them for {rare.kinds:,} rare characters" if (rare := corpus.vocab.unknown) else ""
        lines = [
            f"corpus   {self.config.corpus.source}{files}: {sizes} characters, "
            f"vocabulary of {len(corpus.vocab)}{rare}",
            f"model    {model.cell} {model.num_layers} × {model.hidden_size}, {model.direction}: "
            f"{num_parameters(learner.model):,} parameters",
            f"         {implementation} ({reason})",
            f"batches  {learner.batches.kind}, {processes}{batches.batch_size} × {learner.batches.seq_len}, "
            f"state {learner.batches.state}; {learner.steps_per_epoch:,} steps per epoch, "
            f"{learner.total_steps:,} in total",
            f"device   {learner.device}, {precision} ({learner.precision_reason})",
            *([f"memory   {learner.memory}"] if learner.memory else []),
        ]
        if self.initial:
            new = len(corpus.vocab) - self.initial.vocab_size
            start = f"from {self.config.train.init_from}, with {new} new character{'s' * (new != 1)}"
            if before := self._scored(self.val[:_FIRST_SCORED]):
                start += f"; val {before.loss:.3f} before the first step"
            lines.insert(2, f"         {start}")
        notes = list(corpus.notes)
        if corpus.unseen:
            notes.append(f"not in train, removed from val and test: {corpus.unseen} characters")
        lines[1:1] = [f"         {note}" for note in notes]
        return lines

    @property
    def suggested_prefix(self) -> str:
        """A prefix to show how to generate: words of a line of val and a space, or one character."""
        if self.corpus.boundary is not None:
            return self.corpus.vocab.decode(self.corpus.train[:1])
        ids = self.val if len(self.val) else self.corpus.train
        lines = self.corpus.vocab.decode(ids[:2000]).split("\n")
        # The split may start in the middle of a line.
        words = next((found for line in lines[1:] if len(found := line.split()) > 1), lines[0].split()[1:])
        prefix = "".join(c for c in " ".join(words[:3])[:40] if c.isprintable() and c != UNKNOWN)
        known = self.corpus.vocab.characters
        if not prefix:
            prefix = next((char for char in known if char.isalpha()), known[0])
        return f"{prefix} " if " " in known and words else prefix

    def train(self, run: Run, reporter: Reporter) -> Result:
        """Train to the end; write the models, the state and the log into the folder of `run`.

        A step whose loss or gradient is not finite is skipped: the weights, their average, the state of the
        optimiser and the sums of the log stay as they are, a carried state is reset, and the position in the
        data, the schedule and the generators advance. After ``train.max_bad_steps`` skipped steps in a row,
        or a val loss that is not finite, the run rolls back to its last sound save and halves the learning
        rate.

        Raises `Interrupted` after Ctrl-C or SIGTERM, once the step is finished and the state is saved, and
        `CharlmError` after ``train.max_rollbacks`` rollbacks and for files that cannot be written.
        """
        learner = self.learner
        eval_every = self.config.train.eval_every or learner.steps_per_epoch
        if self.config.train.tensorboard and self.group.first:
            reporter = TensorBoard(run.folder / "tensorboard", reporter)
        self._show(reporter)
        try:
            with caught_signals() as caught:
                self._begin(run)
                limit, started = self.config.train.time_limit_seconds, time.perf_counter()
                started -= learner.progress.elapsed
                for x, y in learner.remaining_batches():
                    reporter.step(*learner.step(x, y))
                    if limit < math.inf:
                        learner.progress.elapsed = self.group.from_first(
                            lambda: time.perf_counter() - started
                        )
                    # Read once: a later signal belongs to the next step. If one process stops, all do.
                    stop = self.group.largest(caught[0] if caught else 0)
                    step = learner.progress.step
                    if learner.skip_reason and self._log_skipped(run, reporter):
                        pass  # rolled back
                    elif step % eval_every == 0 or learner.finished:
                        self._evaluate(run, reporter)
                    else:
                        if step % self.config.train.log_every == 0:
                            self._log_step(run, reporter)
                        self._save_if_due(bool(stop))
                    if learner.finished and learner.progress.step == step:  # not rolled back
                        break
                    if stop:
                        raise Interrupted(
                            f"stopped at step {learner.progress.step} of {learner.total_steps}; "
                            f"resume with: charlm train --resume {shlex.quote(str(run.folder))}",
                            128 + stop,
                        )
        finally:
            reporter.end()
        return self._finish(run)

    def _show(self, reporter: Reporter) -> None:
        learner = self.learner
        reporter.begin(learner.progress.step, learner.total_steps, learner.steps_per_epoch)

    def _row(self, sums: Sums, val: Score | None = None) -> Row:
        """Return a row of the log: the training over `sums`, and the score of an evaluation."""
        progress = self.learner.progress
        row: Row = {"step": progress.step, "epoch": round(progress.step / self.learner.steps_per_epoch, 4)}
        if sums.characters:  # 0 if all steps were skipped
            row["train_loss"] = sums.nats / sums.characters
        if val and sums.characters:
            row[f"train_{self.kind}perplexity"] = perplexity(row["train_loss"])
        if val:
            row["val_loss"] = val.loss
            row[f"val_{self.kind}perplexity"] = val.perplexity
            row[f"val_{self.kind}bits_per_character"] = val.bits_per_character
        row["lr"] = progress.lr
        if sums.characters:
            row |= {"grad_norm": progress.grad_norm, "chars_per_second": sums.characters / sums.seconds}
        return row | {"seconds": progress.seconds}

    def _log_step(self, run: Run, reporter: Reporter) -> None:
        """Log the steps since the last row, without an evaluation."""
        progress = self.learner.progress
        if progress.since_row.characters:
            row = self._row(progress.since_row)
            progress.since_row = Sums()
            self._log(run, row, sync=False)  # the next save does it: a disk may take as long as ten steps
            reporter.logged(row)

    def _evaluate(self, run: Run, reporter: Reporter) -> None:
        """Score the val split, log a row, keep the model if it is the best, save.

        Without a val split, each model is the best.
        """
        learner, train, progress = self.learner, self.config.train, self.learner.progress
        val = self._scored(self.val)
        loss = val.loss if val else math.inf
        if val and not math.isfinite(loss):
            self._roll_back(run, reporter, f"the val loss is {loss}")
            return
        if learner.plateau:
            learner.plateau.step(loss)
        row = self._row(progress.since_evaluation, val)
        row |= {key: count for key in ("bad_steps", "rollbacks") if (count := getattr(progress, key))}
        if train.sample_chars and not self.kind and self.group.first:
            # A separate generator leaves the training unchanged.
            generator = torch.Generator().manual_seed(train.seed + progress.step)
            arguments = self.corpus.vocab, self.corpus.boundary, train.sample_chars, generator
            row["sample"] = sample(learner.scored, *arguments)
        best = not val or loss < progress.best_loss
        if best:
            progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_since_best = 0 if best else progress.evaluations_since_best + 1
        progress.since_evaluation, progress.since_row = Sums(), Sums()
        self._log(run, row)
        unsaved = ("seconds", "chars_per_second", "sample")
        self.figures = {key: value for key, value in row.items() if key not in unsaved}
        self._save(sound=self._is_sound(val))
        reporter.evaluated(row, best)
        if "sample" in row:
            reporter.sample(row["sample"])

    def _log_skipped(self, run: Run, reporter: Reporter) -> bool:
        """Log a skipped step; after too many in a row, roll back and return True."""
        progress, reason = self.learner.progress, self.learner.skip_reason
        limit = self.config.train.max_bad_steps
        event = {"event": "bad_step", "why": reason, "bad_steps": progress.bad_steps}
        self._log(run, {"step": progress.step, **event})
        reporter.say(
            f"step {progress.step} skipped: {reason} ({progress.bad_steps_in_a_row} of {limit} in a row)"
        )
        if progress.bad_steps_in_a_row < limit:
            return False
        self._roll_back(run, reporter, str(reason))
        return True

    def _roll_back(self, run: Run, reporter: Reporter, why: str) -> None:
        """Restore the last sound save, halve the learning rate, and save that."""
        learner, train = self.learner, self.config.train
        left = learner.progress
        if left.rollbacks >= train.max_rollbacks:
            tried = f", after {left.rollbacks} rollbacks" if left.rollbacks else ""
            raise CharlmError(
                f"training diverged at step {left.step}: {why}{tried}; "
                "use a smaller train.lr or train.clip: norm"
            )
        saved_last = self.saves.step == left.rollback_step
        self._load(run if saved_last else run.checkpoint(left.rollback_step))
        progress = learner.progress
        progress.rollbacks, progress.bad_steps = left.rollbacks + 1, left.bad_steps
        progress.bad_steps_in_a_row, progress.seconds = 0, left.seconds
        if learner.plateau:
            set_lr(learner.optimizer, learner.optimizer.param_groups[0]["lr"] / 2)
        event = {"event": "rollback", "from_step": left.step, "why": why, "rollbacks": progress.rollbacks}
        self._log(run, {"step": progress.step, **event, "bad_steps": progress.bad_steps})
        self._save(sound=True)
        reporter.say(
            f"rolled back from step {left.step} to {progress.step}: {why}; the learning rate is halved "
            f"(rollback {progress.rollbacks} of {train.max_rollbacks})"
        )
        reporter.end()
        self._show(reporter)

    def _begin(self, run: Run) -> None:
        """Save a new run, so that it can be resumed after a kill; restore the files of a resumed one."""
        progress = self.learner.progress
        self.saves = Saves(run, self.learner.scored, self.corpus, self.config)
        progress.concluded = False
        if self.group.first:
            run.remove_temporaries()
        if not self.resumed:
            self._save(sound=True)
            return
        if self.diverged_from_save:  # the save to roll back to may count other steps, or be gone
            progress.rollback_step = progress.step
        state = self._snapshot()
        if self.group.first:
            self.saves.resume(progress, state, self.diverged_from_save)
        self._agree()

    def _save_if_due(self, stop: bool) -> None:
        """Save if `stop`, or if ``train.checkpoint_every`` says so."""
        every, progress = self.config.train.checkpoint_steps, self.learner.progress
        if every and progress.step % every == 0:
            sound = not progress.bad_steps_in_a_row and self._is_sound(self._scored(self.val[:1000]))
            self._save(sound=sound)
        elif stop or (self.config.train.checkpoint_seconds and self.group.from_first(self.saves.due)):
            self._save(keep=not stop)

    def _is_sound(self, val: Score | None) -> bool:
        """Return whether the run can roll back to a model with this score, not far worse than guessing."""
        return val is None or val.loss < 2 * self.guessing + 1

    @property
    def guessing(self) -> float:
        """The loss of a model that takes all characters for equally probable, in nats."""
        vocab = self.corpus.vocab
        return math.log(len(vocab.writable) + (vocab.unknown.kinds if vocab.unknown else 0))

    def _save(self, sound: bool = False, keep: bool = True) -> None:
        """Write the state and the models; `sound` and `keep` as in `Saves.write`."""
        progress = self.learner.progress
        if sound:
            progress.rollback_step = progress.step
        state = self._snapshot()
        if self.group.first:
            log.sync(self.saves.run)
            self.saves.write(progress, state, sound, keep)
        self._agree()

    def _agree(self) -> None:
        """Tell all processes what the first has saved and logged."""
        self.saves.step = self.group.from_first(lambda: self.saves.step)
        self.learner.progress = Progress(**self.group.from_first(lambda: asdict(self.learner.progress)))

    def _log(self, run: Run, row: Row, sync: bool = True) -> None:
        """Add a row to the log, which the first process writes."""
        if self.group.first:
            self.learner.progress.log_size = log.append(run, row, sync)

    def _scored(self, ids: Tensor) -> Score | None:
        """Return the score of `ids` (N,), None if there are none.

        The first process computes it: in slices it would differ.
        """
        if not len(ids):
            return None
        scored, boundary = self.learner.scored, self.corpus.boundary
        return Score(*self.group.from_first(lambda: astuple(evaluate_split(scored, ids, boundary))))

    def _snapshot(self) -> dict[str, Any]:
        """Return the content of ``state.safetensors``: the learner's state and its figures at this step."""
        if self.figures["step"] != self.learner.progress.step:
            self.figures = {"step": self.learner.progress.step}
        return {**self.learner.state(), "figures": self.figures}

    def restore(self, run: Run, step: int | None = None, state: dict[str, Any] | None = None) -> None:
        """Restore the last state of `run`, or that of `step`, as `Learner.load` does; write nothing.

        A run that was never saved begins at step 0. state: the content of that save, if it was read already.

        Raises `CharlmError` for a state that is missing, damaged, or of another corpus.
        """
        source = run
        if step is not None:
            source = run.saved_checkpoint(step) if self.group.first else run.checkpoint(step)
        elif not self.group.from_first(lambda: run.was_saved):
            return
        self._load(source, state)
        self.resumed = True
        self.diverged_from_save |= step is not None

    def _load(self, source: Run, state: dict[str, Any] | None = None) -> None:
        """Load the state that `source` holds, or `state`, read from there; raises as `restore` does."""
        state = self.group.state(lambda: source.load_state() if state is None else state)
        try:
            if state["corpus"] != self.corpus.fingerprint:
                raise CharlmError(
                    f"the corpus has changed since the run {source.folder} was started; "
                    "restore the text, or start a new run"
                )
            before = configuration.from_data(state["config"], str(source.state))
            self.diverged_from_save = self.learner.load(state, before)
            self.figures = {"step": state["figures"]["step"], **state["figures"]}
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            why = one_line(str(error))
            raise CharlmError(f"{source.state} does not fit the run's configuration: {why}") from None

    def _finish(self, run: Run) -> Result:
        """Score the test split with the best model, log the score, and save that the training has ended."""
        progress, result = self.learner.progress, Result({}, None)
        if self.group.first:
            best = load_model(run.best, device=self.learner.device)
            split = self.corpus.test
            test = evaluate_split(best.model, split, self.corpus.boundary) if len(split) > 1 else None
            if test:
                row: Row = {"step": progress.step, "best_step": progress.best_step, "test_loss": test.loss}
                row[f"test_{self.kind}perplexity"] = test.perplexity
                row[f"test_{self.kind}bits_per_character"] = test.bits_per_character
                log.append(run, row)
            result = Result(best.figures, test)
        progress.concluded = True
        state = self._snapshot()
        if self.group.first:
            run.save_state(state)
        return result
