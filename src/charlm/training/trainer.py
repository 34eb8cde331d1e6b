"""The training loop: steps, evaluations, saves, going back, and going on from where a run stopped."""

import math
import shlex
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from charlm import config as configuration
from charlm.config import Config
from charlm.errors import CharlmError, Interrupted, one_line
from charlm.inference.evaluate import evaluate
from charlm.inference.sample import Sampling, generate
from charlm.metrics import Score, perplexity
from charlm.nn.layers import choose_implementation
from charlm.nn.model import num_parameters
from charlm.storage import log
from charlm.storage.log import Row
from charlm.storage.model_file import load_model
from charlm.storage.run import Run
from charlm.text.batches import val_characters
from charlm.text.corpus import Corpus
from charlm.training.distributed import ALONE, Group
from charlm.training.learner import Learner
from charlm.training.optim import set_lr
from charlm.training.progress import Progress
from charlm.training.reporting import Reporter, TensorBoard, caught_signals, check_tensorboard
from charlm.training.saves import Saves


@dataclass(frozen=True)
class Result:
    """How a training ended: the best model's figures, and its score on the test split if there is one.

    Only the first of several processes knows.
    """

    best: Row
    test: Score | None


class Trainer:
    """A training: `train` takes its `learner` to the end of its budget, and keeps a run's files.

    Of the processes of a `group` each makes one, and calls what the others call.

    Raises `CharlmError` as `Learner` does, and for a val split too short to score.
    """

    def __init__(self, config: Config, corpus: Corpus, group: Group = ALONE):
        if config.train.tensorboard:
            check_tensorboard()
        self.config, self.corpus, self.group = config, corpus, group
        self.val = corpus.val[: val_characters(config.batches)]
        if len(self.val) < 2:
            raise CharlmError(
                f"the val split has {len(self.val)} characters, too few to score; "
                "take a longer text or a larger val share in corpus.split"
            )
        self.learner = Learner(config, corpus, group)
        # What fills in characters has a pseudo-likelihood; its figures are not to be taken for the others'.
        self.kind = "pseudo_" if config.model.direction == "both" else ""
        self.figures: Row = {"step": 0}  # of the last save
        self.resumed = self.diverged_from_save = (
            False  # from a save; otherwise than that save would have gone on
        )

    def describe(self) -> list[str]:
        """What is trained on what, in short lines."""
        corpus, batches, model = self.corpus, self.config.batches, self.config.model
        learner = self.learner
        source = self.config.corpus.source
        if len(corpus.files) > 1:
            source = f"{source} ({len(corpus.files)} files)"
        sizes = f"train {len(corpus.train):,}, val {len(self.val):,}, test {len(corpus.test):,}"
        state = "carried" if learner.batches.carries_state else "afresh in each window"
        implementation, reason = choose_implementation(model, learner.device)
        precision = str(learner.precision).removeprefix("torch.")
        processes = f"{self.group.size} processes × batch " if self.group.size > 1 else ""
        size = f"{processes}{batches.batch_size} × {batches.seq_len}"
        lines = [
            f"corpus   {source}: {sizes} characters, {len(corpus.vocab)} different",
            f"model    {model.cell} {model.num_layers} × {model.hidden_size}, "
            f"{_DIRECTIONS[model.direction]}: {num_parameters(learner.model):,} parameters",
            f"         {implementation} ({reason})",
            f"batches  {batches.sampling}, {size}, state {state}; "
            f"{learner.steps_per_epoch:,} steps an epoch, {learner.total_steps:,} in all",
            f"device   {learner.device}, {precision} ({learner.precision_reason})",
        ]
        if corpus.unseen:
            lines.insert(1, f"         left out of val and test: {corpus.unseen} characters that train lacks")
        return lines

    @property
    def suggested_prefix(self) -> str:
        """A prefix that the model can read, to show how to generate."""
        known = self.corpus.vocab.characters
        letters = (char for char in known if char.isalpha())
        return "quijote " if set("quijote ") <= set(known) else next(letters, known[0])

    def train(self, run: Run, reporter: Reporter) -> Result:
        """Train to the end, leaving models, state and log in `run`'s folder.

        A step whose loss or gradient is not finite is passed over: the weights, their average, what the
        optimiser has gathered and the sums of the log are as before it, a carried state begins afresh, and
        the place in the data, the schedule and the generators go on. After ``train.max_bad_steps`` in a row,
        or a val loss that is not finite, the run goes back to its last good save with half the learning rate.

        Raises `Interrupted` after Ctrl-C or SIGTERM, once the step is finished and the state is saved, and
        `CharlmError` for a run that went back ``train.max_rollbacks`` times and files that cannot be written.
        """
        learner = self.learner
        eval_every = self.config.train.eval_every or learner.steps_per_epoch
        if self.config.train.tensorboard and self.group.first:
            reporter = TensorBoard(run.folder / "tensorboard", reporter)
        self._show(reporter)
        try:
            with caught_signals() as caught:
                self._begin(run)
                for x, y in learner.remaining_batches():
                    reporter.step(*learner.step(x, y))
                    # Once: a signal from here on is the next step's. Where one process stops, all do.
                    stop = self.group.largest(caught[0] if caught else 0)
                    step = learner.progress.step
                    if learner.problem and self._pass_over(run, reporter):
                        pass  # back at a save
                    elif step % eval_every == 0 or step == learner.total_steps:
                        self._evaluate(run, reporter)
                    else:
                        self._save_if_due(bool(stop))
                    if learner.finished:
                        break
                    if stop:
                        raise Interrupted(
                            f"stopped at step {learner.progress.step} of {learner.total_steps}; "
                            f"go on with: charlm train --resume {shlex.quote(str(run.folder))}",
                            stop,
                        )
        finally:
            reporter.end()
        return self._finish(run)

    def _show(self, reporter: Reporter) -> None:
        learner = self.learner
        reporter.begin(learner.progress.step, learner.total_steps, learner.steps_per_epoch)

    def _evaluate(self, run: Run, reporter: Reporter) -> None:
        """Score the val split, log a row, keep the model if it is the best, save."""
        learner, train = self.learner, self.config.train
        progress = learner.progress
        val = self._scored(self.val)
        if not math.isfinite(val.loss):
            self._go_back(run, reporter, f"the val loss is {val.loss}")
            return
        if learner.plateau:
            learner.plateau.step(val.loss)
        row: Row = {"step": progress.step, "epoch": round(progress.step / learner.steps_per_epoch, 4)}
        if progress.train_characters:  # none where all steps were passed over
            loss = progress.train_nats / progress.train_characters
            row |= {"train_loss": loss, f"train_{self.kind}perplexity": perplexity(loss)}
        row |= {
            "val_loss": val.loss,
            f"val_{self.kind}perplexity": val.perplexity,
            f"val_{self.kind}bits_per_character": val.bits_per_character,
            "lr": progress.lr,
        }
        if progress.train_characters:
            rate = progress.train_characters / progress.train_seconds
            row |= {"grad_norm": progress.grad_norm, "chars_per_second": rate}
        row["seconds"] = progress.seconds
        row |= {key: count for key in ("bad_steps", "rollbacks") if (count := getattr(progress, key))}
        if train.sample_chars and not self.kind and self.group.first:
            row["sample"] = self._sample(train.sample_chars)
        best = val.loss < progress.best_loss
        if best:
            progress.best_loss, progress.best_step = val.loss, progress.step
        progress.evaluations_since_best = 0 if best else progress.evaluations_since_best + 1
        progress.train_nats, progress.train_characters, progress.train_seconds = 0.0, 0, 0.0
        self._log(run, row)
        self.figures = _without(row, "seconds", "chars_per_second", "sample")
        self._save(sound=self._is_sound(val))
        reporter.evaluated(row, best)
        if "sample" in row:
            reporter.sample(row["sample"])

    def _sample(self, length: int) -> str:
        """A text by `scored`, from a generator of its own: training is the same without it."""
        generator = torch.Generator().manual_seed(self.config.train.seed + self.learner.progress.step)
        vocab = self.corpus.vocab
        start = vocab.encode("", "skip")
        return "".join(generate(self.learner.scored, vocab, start, length, Sampling(), generator))

    def _pass_over(self, run: Run, reporter: Reporter) -> bool:
        """Log that the last step was not taken; whether there were too many and the run has gone back."""
        progress, problem = self.learner.progress, self.learner.problem
        most = self.config.train.max_bad_steps
        what = {"event": "bad_step", "why": problem, "bad_steps": progress.bad_steps}
        self._log(run, {"step": progress.step, **what})
        reporter.say(
            f"step {progress.step} was not taken: {problem} "
            f"({progress.bad_steps_in_a_row} of {most} in a row)"
        )
        if progress.bad_steps_in_a_row < most:
            return False
        self._go_back(run, reporter, str(problem))
        return True

    def _go_back(self, run: Run, reporter: Reporter, why: str) -> None:
        """Take up the last good save, with half the learning rate, and save that."""
        learner, train = self.learner, self.config.train
        left = learner.progress
        if left.rollbacks >= train.max_rollbacks:
            tried = f", after going back {left.rollbacks} times with half the learning rate" * (
                left.rollbacks > 0
            )
            raise CharlmError(
                f"training diverged after step {left.step}: {why}{tried}; "
                "take a smaller train.lr or train.clip: norm"
            )
        source = self.saves.rollback_source(left)
        self._load(source)
        progress = learner.progress
        progress.rollbacks, progress.bad_steps = left.rollbacks + 1, left.bad_steps
        progress.bad_steps_in_a_row, progress.seconds = 0, left.seconds
        if learner.plateau:
            set_lr(learner.optimizer, learner.optimizer.param_groups[0]["lr"] / 2)
        what = {"event": "rollback", "from_step": left.step, "why": why, "rollbacks": progress.rollbacks}
        self._log(run, {"step": progress.step, **what, "bad_steps": progress.bad_steps})
        self._save(sound=True)
        reporter.say(
            f"back from step {left.step} to {progress.step}: {why}; the learning rate is now half of what it "
            f"was ({progress.rollbacks} of {train.max_rollbacks} times)"
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
        elif stop or (self.config.train.checkpoint_seconds and self.group.told(self.saves.due)):
            self._save(keep=not stop)

    def _is_sound(self, val: Score) -> bool:
        """Return whether a model with this score can be rolled back to: it is not far worse than guessing."""
        return val.loss < 2 * math.log(len(self.corpus.vocab)) + 1

    def _save(self, sound: bool = False, keep: bool = True) -> None:
        """Write the state and the models; `sound` and `keep` as in `Saves.write`."""
        progress = self.learner.progress
        if sound:
            progress.rollback_step = progress.step
        state = self._snapshot()
        if self.group.first:
            self.saves.write(progress, state, sound, keep)
        self._agree()

    def _agree(self) -> None:
        """Tell all processes what the first has saved and logged."""
        self.saves.step = self.group.told(lambda: self.saves.step)
        self.learner.progress = Progress(**self.group.told(lambda: asdict(self.learner.progress)))

    def _log(self, run: Run, row: Row) -> None:
        """Add a row to the log, which the first process writes."""
        if self.group.first:
            self.learner.progress.log_size = log.append(run, row)

    def _scored(self, ids: Tensor) -> Score:
        """The score of `ids` (N,), by the first process: in pieces, it would have other figures."""
        return Score(*self.group.told(lambda: astuple(evaluate(self.learner.scored, ids))))

    def _snapshot(self) -> dict[str, Any]:
        """Return the content of ``state.safetensors``: the learner's state and the last save's figures."""
        if self.figures["step"] != self.learner.progress.step:
            self.figures = {"step": self.learner.progress.step}
        return {**self.learner.state(), "figures": self.figures}

    def restore(self, run: Run, step: int | None = None, state: dict[str, Any] | None = None) -> None:
        """Restore the state that `run` saved last, or the checkpoint that it kept of `step`; write nothing.

        A run that was never saved begins at step 0. `Learner.load` documents what happens when the
        configuration or the number of processes is another.

        state: the content of that save, if it was read already.

        Raises `CharlmError` for a state that is missing, damaged, or of another corpus.
        """
        source = run
        if step is not None:
            source = run.saved_checkpoint(step) if self.group.first else run.checkpoint(step)
        elif not self.group.told(lambda: run.was_saved):
            return
        self._load(source, state)
        self.resumed = True
        self.diverged_from_save = self.diverged_from_save or step is not None

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
        result = self._test(run) if self.group.first else Result({}, None)
        self.learner.progress.concluded = True
        state = self._snapshot()
        if self.group.first:
            run.save_state(state)
        return result

    def _test(self, run: Run) -> Result:
        progress = self.learner.progress
        best = load_model(run.best, device=self.learner.device)
        test = evaluate(best.model, self.corpus.test) if len(self.corpus.test) > 1 else None
        if test:
            figures = {"test_loss": test.loss, f"test_{self.kind}perplexity": test.perplexity}
            figures[f"test_{self.kind}bits_per_character"] = test.bits_per_character
            log.append(run, {"step": progress.step, "best_step": progress.best_step, **figures})
        return Result(best.figures, test)


_DIRECTIONS = {
    "forward": "left to right",
    "backward": "right to left",
    "both": "both ways, to fill in characters",
}


def _without(row: Row, *keys: str) -> Row:
    return {key: value for key, value in row.items() if key not in keys}
