"""The training loop: steps, evaluations, saves, and going on from where a run stopped."""

import copy
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm import config as configuration
from charlm import scheduled
from charlm.batches import make_batches, mix, share, val_characters
from charlm.cells import State
from charlm.checkpoint import load_model, load_weights
from charlm.config import Config
from charlm.corpus import Corpus
from charlm.device import autocast, choose_precision
from charlm.distributed import ALONE, Group
from charlm.errors import CharlmError, Interrupted
from charlm.evaluate import evaluate
from charlm.metrics import Score, perplexity
from charlm.model import CharLM, make_model, num_parameters
from charlm.native import keep_memory
from charlm.optim import (
    clip_gradients,
    load_optimizer,
    load_plateau,
    lr_factor,
    make_optimizer,
    make_plateau,
    set_lr,
    update_average,
)
from charlm.progress import Reporter, Row
from charlm.recurrent import choose_implementation
from charlm.resume import REORDERING, differences
from charlm.runs import Run
from charlm.sample import generate
from charlm.saves import Progress, Saves
from charlm.signals import caught_signals
from charlm.tensorboard import TensorBoard, check_tensorboard


@dataclass(frozen=True)
class Result:
    """How a training ended: the best model's figures, and its score on the test split if there is one.

    Only the first of several processes knows.
    """

    best: Row
    test: Score | None


class Trainer:
    """A model in training: `train` takes it from `progress.step` to the end of its budget.

    model: what is trained.
    scored: what is scored, sampled from and saved: `model`, or with ``train.ema`` its average.

    Of the processes of a `group` each makes one, and calls what the others call.

    Making one has the process keep the memory that it frees (`native.keep_memory`).

    Raises `CharlmError` for a device that is not here and a corpus too short for the batches.
    """

    def __init__(self, config: Config, corpus: Corpus, group: Group = ALONE):
        if config.train.tensorboard:
            check_tensorboard()
        self.config, self.corpus, self.group = config, corpus, group
        self.device = group.device(config.train.device)
        self.precision, self.precision_reason = choose_precision(config.train.precision, self.device)
        backward = config.model.direction == "backward"
        self.batches = make_batches(
            corpus.train, config.batches, backward, corpus.release, group.rank, group.size
        )
        self.val = corpus.val[: val_characters(config.batches)]
        if len(self.val) < 2:
            raise CharlmError(
                f"the val split has {len(self.val)} characters, too few to score; "
                "take a longer text or a larger val share in corpus.split"
            )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = config.train.max_steps or config.train.epochs * self.steps_per_epoch
        torch.manual_seed(group.seed(config.train.seed))  # dropout draws from torch's global generators
        keep_memory()
        model = make_model(len(corpus.vocab), config.model, self.device)
        self.model = model.initialise(config.train.seed).to(self.device)
        self.prediction = group.parallel(Prediction(self.model))
        self.scored = copy.deepcopy(self.model).to(self.device) if config.train.ema else self.model
        self.optimizer = make_optimizer(self.model, config.train)
        self.plateau = make_plateau(self.optimizer, config.train)
        # What fills in characters has a pseudo-likelihood; its figures are not to be taken for the others'.
        self.kind = "pseudo_" if config.model.direction == "both" else ""
        self.progress = Progress()
        self.carried: State | None = None
        self.problem: str | None = None  # what was not finite in the last step
        self.figures: Row = {"step": 0}  # of the last save
        self.resumed = self.branched = False  # from a save; otherwise than that save would have gone on

    def describe(self) -> list[str]:
        """What is trained on what, in short lines."""
        corpus, batches, model = self.corpus, self.config.batches, self.config.model
        source = self.config.corpus.source
        if len(corpus.files) > 1:
            source = f"{source} ({len(corpus.files)} files)"
        sizes = f"train {len(corpus.train):,}, val {len(self.val):,}, test {len(corpus.test):,}"
        state = "carried" if self.batches.carries_state else "afresh in each window"
        implementation, reason = choose_implementation(model, self.device)
        precision = str(self.precision).removeprefix("torch.")
        processes = f"{self.group.size} processes × batch " if self.group.size > 1 else ""
        size = f"{processes}{batches.batch_size} × {batches.seq_len}"
        lines = [
            f"corpus   {source}: {sizes} characters, {len(corpus.vocab)} different",
            f"model    {model.cell} {model.num_layers} × {model.hidden_size}, "
            f"{_DIRECTIONS[model.direction]}: {num_parameters(self.model):,} parameters",
            f"         {implementation} ({reason})",
            f"batches  {batches.sampling}, {size}, state {state}; "
            f"{self.steps_per_epoch:,} steps an epoch, {self.total_steps:,} in all",
            f"device   {self.device}, {precision} ({self.precision_reason})",
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

    @property
    def finished(self) -> str | None:
        """The setting that ended the training, with its value; None while there is more to do."""
        train, progress = self.config.train, self.progress
        if train.early_stopping and progress.evaluations_since_best >= train.early_stopping:
            return f"train.early_stopping={train.early_stopping}"
        if progress.step < self.total_steps:
            return None
        return f"train.max_steps={train.max_steps}" if train.max_steps else f"train.epochs={train.epochs}"

    def train(self, run: Run, reporter: Reporter) -> Result:
        """Train to the end, leaving models, state and log in `run`'s folder.

        A step whose loss or gradient is not finite is passed over: the weights, their average, what the
        optimiser has gathered and the sums of the log are as before it, a carried state begins afresh, and
        the place in the data, the schedule and the generators go on. After ``train.max_bad_steps`` in a row,
        or a val loss that is not finite, the run goes back to its last good save with half the learning rate.

        Raises `Interrupted` after Ctrl-C or SIGTERM, once the step is finished and the state is saved, and
        `CharlmError` for a run that went back ``train.max_rollbacks`` times and files that cannot be written.
        """
        eval_every = self.config.train.eval_every or self.steps_per_epoch
        if self.config.train.tensorboard and self.group.first:
            reporter = TensorBoard(run.folder / "tensorboard", reporter)
        reporter.begin(self.progress.step, self.total_steps, self.steps_per_epoch)
        try:
            with caught_signals() as caught:
                self._begin(run)
                for x, y in self.remaining_batches():
                    reporter.step(*self.step(x, y))
                    # Once: a signal from here on is the next step's. Where one process stops, all do.
                    stop = self.group.largest(caught[0] if caught else 0)
                    step = self.progress.step
                    if self.problem and self._pass_over(run, reporter):
                        pass  # back at a save
                    elif step % eval_every == 0 or step == self.total_steps:
                        self._evaluate(run, reporter)
                    else:
                        self._save_if_due(bool(stop))
                    if self.finished:
                        break
                    if stop:
                        raise Interrupted(
                            f"stopped at step {self.progress.step} of {self.total_steps}; "
                            f"go on with: charlm train --resume {shlex.quote(str(run.folder))}",
                            stop,
                        )
        finally:
            reporter.end()
        return self._finish(run)

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from `progress.step` on, epoch after epoch; where that was set back, from there."""
        while not self.finished:
            epoch, start = divmod(self.progress.step, self.steps_per_epoch)
            if start == 0:
                self.carried = None
            expected = self.progress.step
            for batch in self.batches.loader(self.config.train.seed, epoch, start):
                yield batch
                expected += 1
                if self.progress.step < expected:
                    break

    def step(self, x: Tensor, y: Tensor) -> tuple[float, int, float]:
        """One optimiser step on a batch (B, T), this process's share of one.

        Where the loss or the gradient is not finite, `problem` says so and nothing is learned from the batch.

        Returns the loss, over how many characters of all processes, in how many seconds.
        """
        began, progress, train = time.perf_counter(), self.progress, self.config.train
        if self.plateau is None:
            factor = lr_factor(progress.step, train, self.total_steps, self.steps_per_epoch)
            set_lr(self.optimizer, train.lr * factor * 0.5**progress.rollbacks)
        sequences = self._sequences(len(x))
        part = len(x) / sequences  # of the mean over all processes' characters
        if not part:  # its gradients are awaited all the same, and count for nothing
            x = y = x.new_zeros(1, x.shape[1])
        x, y = x.to(self.device), y.to(self.device)
        state = self.carried or self.model.initial_state(len(x))
        self.model.train()
        true_share = None
        if train.teacher_forcing < 1:
            true_share = scheduled.true_share(progress.step / self.total_steps, train)
        with autocast(self.device, self.precision):
            logits, y, state = self.prediction(x, y, state, true_share)
        if train.loss_on == "last":
            logits, y = logits[:, -1:], y[:, -1:]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        self.optimizer.zero_grad()
        # Of the gradients of this the processes take the mean.
        (loss * (part * self.group.size)).backward()  # type: ignore[no-untyped-call]
        norm = clip_gradients(self.model, train).item()
        nats, characters = self.group.sum(loss.item() * part), sequences * y.shape[1]
        finite = math.isfinite(nats) and math.isfinite(norm)
        self.problem = None if finite else f"the loss is {nats:.4g}, the gradient's norm {norm:.4g}"
        if finite:
            self.optimizer.step()
            if train.ema:
                update_average(self.scored, self.model, train.ema, progress.step)
            progress.train_nats += nats * characters
            progress.train_characters += characters
            progress.grad_norm = norm
        if self.batches.carries_state:
            self.carried = tuple(tensor.detach().float() for tensor in state) if finite else None
        seconds = time.perf_counter() - began
        progress.step += 1
        progress.lr = self.optimizer.param_groups[0]["lr"]
        progress.bad_steps += not finite
        progress.bad_steps_in_a_row = 0 if finite else progress.bad_steps_in_a_row + 1
        progress.train_seconds += seconds
        progress.seconds += seconds
        return nats, characters, seconds

    def _sequences(self, own: int) -> int:
        """How many sequences all processes together read in this step, `own` of them this process."""
        if self.group.size == 1:
            return own
        return self.batches.sequences(self.progress.step % self.steps_per_epoch)

    def _evaluate(self, run: Run, reporter: Reporter) -> None:
        """Score the val split, log a row, keep the model if it is the best, save."""
        progress, train = self.progress, self.config.train
        val = self._scored(self.val)
        if not math.isfinite(val.loss):
            self._go_back(run, reporter, f"the val loss is {val.loss}")
            return
        if self.plateau:
            self.plateau.step(val.loss)
        row: Row = {"step": progress.step, "epoch": round(progress.step / self.steps_per_epoch, 4)}
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
        self._save(good=self._is_sound(val))
        reporter.evaluated(row, best)
        if "sample" in row:
            reporter.sample(row["sample"])

    def _sample(self, length: int) -> str:
        """A text by `scored`, from a generator of its own: training is the same without it."""
        generator = torch.Generator().manual_seed(self.config.train.seed + self.progress.step)
        start = self.corpus.vocab.encode("", "skip")
        return "".join(generate(self.scored, self.corpus.vocab, start, length, 0.7, generator=generator))

    def _pass_over(self, run: Run, reporter: Reporter) -> bool:
        """Log that the last step was not taken; whether there were too many and the run has gone back."""
        progress, most = self.progress, self.config.train.max_bad_steps
        what = {"event": "bad_step", "why": self.problem, "bad_steps": progress.bad_steps}
        self._log(run, {"step": progress.step, **what})
        reporter.say(
            f"step {progress.step} was not taken: {self.problem} "
            f"({progress.bad_steps_in_a_row} of {most} in a row)"
        )
        if progress.bad_steps_in_a_row < most:
            return False
        self._go_back(run, reporter, str(self.problem))
        return True

    def _go_back(self, run: Run, reporter: Reporter, why: str) -> None:
        """Take up the last good save, with half the learning rate, and save that."""
        left, train = self.progress, self.config.train
        if left.rollbacks >= train.max_rollbacks:
            tried = f", after going back {left.rollbacks} times with half the learning rate" * (
                left.rollbacks > 0
            )
            raise CharlmError(
                f"training diverged after step {left.step}: {why}{tried}; "
                "take a smaller train.lr or train.clip: norm"
            )
        source = self.saves.good(left)
        self._load(self.group.state(source.load_state), source)
        progress = self.progress
        progress.rollbacks, progress.bad_steps = left.rollbacks + 1, left.bad_steps
        progress.bad_steps_in_a_row, progress.seconds = 0, left.seconds
        if self.plateau:
            set_lr(self.optimizer, self.optimizer.param_groups[0]["lr"] / 2)
        what = {"event": "rollback", "from_step": left.step, "why": why, "rollbacks": progress.rollbacks}
        self._log(run, {"step": progress.step, **what, "bad_steps": progress.bad_steps})
        self._save(good=True)
        reporter.say(
            f"back from step {left.step} to {progress.step}: {why}; the learning rate is now half of what it "
            f"was ({progress.rollbacks} of {train.max_rollbacks} times)"
        )
        reporter.end()
        reporter.begin(progress.step, self.total_steps, self.steps_per_epoch)
        reporter.end()
        reporter.begin(progress.step, self.total_steps, self.steps_per_epoch)

    def _begin(self, run: Run) -> None:
        """Save a new run for the first time, so that it can be resumed if it is killed; mend another."""
        self.saves = Saves(run, self.scored, self.corpus.vocab, self.config)
        self.progress.concluded = False
        if self.group.first:
            run.remove_temporaries()
        if not self.resumed:
            self._save(good=True)
            return
        if self.branched:  # the save that was good may be of another count of steps, or gone
            self.progress.good_step = self.progress.step
        state = self._snapshot()
        if self.group.first:
            self.saves.resume(self.progress, state, self.branched)
        self._agree()

    def _save_if_due(self, stop: bool) -> None:
        """Save where `stop` or ``train.checkpoint_every`` asks for it."""
        every, step = self.config.train.checkpoint_steps, self.progress.step
        if every and step % every == 0:
            sound = not self.progress.bad_steps_in_a_row and self._is_sound(self._scored(self.val[:1000]))
            self._save(good=sound)
        elif stop or (self.config.train.checkpoint_seconds and self.group.told(self.saves.due)):
            self._save(keep=not stop)

    def _is_sound(self, val: Score) -> bool:
        """Whether a model with this score is worth going back to: it is not far worse than guessing."""
        return val.loss < 2 * math.log(len(self.corpus.vocab)) + 1

    def _save(self, good: bool = False, keep: bool = True) -> None:
        """Write state and models; `good` and `keep` as in `Saves.write`."""
        if good:
            self.progress.good_step = self.progress.step
        state = self._snapshot()
        if self.group.first:
            self.saves.write(self.progress, state, good, keep)
        self._agree()

    def _agree(self) -> None:
        """Have all processes know what the first has saved and logged."""
        self.saves.step = self.group.told(lambda: self.saves.step)
        self.progress = Progress(**self.group.told(lambda: asdict(self.progress)))

    def _log(self, run: Run, row: Row) -> None:
        """Add a row to the log, which the first process writes."""
        if self.group.first:
            self.progress.log_size = run.log(row)

    def _scored(self, ids: Tensor) -> Score:
        """The score of `ids` (N,), by the first process: in pieces, it would have other figures."""
        return Score(*self.group.told(lambda: astuple(evaluate(self.scored, ids))))

    def _snapshot(self) -> dict[str, Any]:
        """All that the training depends on from here, of all processes: to be called by all.

        sequences: a step's. carried: their states, side by side (L, sequences, H).
        rng, cuda_rng: the states of the processes' generators, a row each.
        """
        cuda = self.device.type == "cuda"
        if self.figures["step"] != self.progress.step:
            self.figures = {"step": self.progress.step}
        return {
            "corpus": self.corpus.fingerprint,
            "config": self.config.model_dump(mode="json"),
            "steps_per_epoch": self.steps_per_epoch,
            "figures": self.figures,
            "progress": asdict(self.progress),
            "weights": _weights(self.model),
            "average": _weights(self.scored) if self.config.train.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau and self.plateau.state_dict(),
            "sequences": self.config.batches.batch_size * self.group.size,
            "carried": self.carried and tuple(map(self.group.side_by_side, self.carried)),
            "rng": self.group.gathered(torch.get_rng_state()),
            "cuda_rng": self.group.gathered(torch.cuda.get_rng_state(self.device)) if cuda else None,
        }

    def restore(self, run: Run, step: int | None = None) -> None:
        """Take up the state that `run` saved last, or the one that it kept of `step`; nothing is written.

        A run that was never saved begins at step 0. Where this trainer's configuration is not the state's,
        its own holds; where its batches are others, the epoch is begun again. Another number of processes may
        take the run up: each step reads the same sequences, and a process that was not there before begins
        with dropout of its own.

        Raises `CharlmError` for a state that is missing, damaged, or of another corpus.
        """
        source = run if step is None else run.kept(step) if self.group.first else run.checkpoint(step)
        if step is None and not self.group.told(lambda: run.begun):
            return
        self._load(self.group.state(source.load_state), source)
        self.resumed = True
        self.branched = self.branched or step is not None

    def _load(self, state: dict[str, Any], source: Run) -> None:
        try:
            if state["corpus"] != self.corpus.fingerprint:
                raise CharlmError(
                    f"the corpus has changed since the run {source.folder} was begun; "
                    "restore the text, or begin a new run"
                )
            before = configuration.from_data(state["config"], str(source.state))
            changed = set(differences(before, self.config))
            # Other processes may share the same steps, or as many others.
            changed -= {"batches.batch_size"}
            if state["sequences"] != self.config.batches.batch_size * self.group.size:
                changed |= {"batches.batch_size"}
            self.progress, self.figures = Progress(**state["progress"]), state["figures"]
            self.branched = bool(changed)
            load_weights(self.model, state["weights"])
            if self.config.train.ema:
                load_weights(self.scored, state["average"] or state["weights"])
            load_optimizer(self.optimizer, state["optimizer"])
            if self.plateau and state["plateau"]:
                load_plateau(self.plateau, state["plateau"])
            if changed & {"train.lr", "train.schedule"}:  # asked for now: not to be halved for what was
                self.progress.rollbacks = 0
                set_lr(self.optimizer, self.config.train.lr)
            self._load_processes(state)
            if changed & REORDERING or state["steps_per_epoch"] != self.steps_per_epoch:
                self._begin_epoch_again(state["steps_per_epoch"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CharlmError(f"{source.state} does not fit the run's configuration: {error}") from None

    def _load_processes(self, state: dict[str, Any]) -> None:
        """Take up what differs between the processes."""
        rank, carried = self.group.rank, state["carried"]
        own = share(state["sequences"], rank, self.group.size)
        self.carried = carried and tuple(tensor[:, own].contiguous().to(self.device) for tensor in carried)
        if rank < len(state["rng"]):
            torch.set_rng_state(state["rng"][rank].clone())  # torch reads a view of it wrongly
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"][rank].clone(), self.device)
        else:
            torch.manual_seed(mix(self.config.train.seed, rank, self.progress.step))

    def _begin_epoch_again(self, steps_per_epoch: int) -> None:
        """Go from a step counted in other batches to the beginning of its epoch, counted in these."""
        progress = self.progress
        progress.step = progress.step // steps_per_epoch * self.steps_per_epoch
        progress.train_nats, progress.train_characters, progress.train_seconds = 0.0, 0, 0.0
        self.carried = None

    def _finish(self, run: Run) -> Result:
        """Score the test split with the best model, log that, and note in the state that this is the end."""
        result = self._test(run) if self.group.first else Result({}, None)
        self.progress.concluded = True
        state = self._snapshot()
        if self.group.first:
            run.save_state(state)
        return result

    def _test(self, run: Run) -> Result:
        best = load_model(run.best, device=self.device)
        test = evaluate(best.model, self.corpus.test) if len(self.corpus.test) > 1 else None
        if test:
            figures = {"test_loss": test.loss, f"test_{self.kind}perplexity": test.perplexity}
            figures[f"test_{self.kind}bits_per_character"] = test.bits_per_character
            run.log({"step": self.progress.step, "best_step": self.progress.best_step, **figures})
        return Result(best.figures, test)


class Prediction(nn.Module):
    """A model's forward pass in training, as a module, for several processes to run together."""

    def __init__(self, model: CharLM):
        super().__init__()
        self.model = model

    def forward(
        self, x: Tensor, y: Tensor, state: State, true_share: float | None
    ) -> tuple[Tensor, Tensor, State]:
        """Logits (B, T, V) on a batch x, y (B, T), the ids that they predict, and the state after.

        true_share: of scheduled sampling; None where every character fed is a true one.
        """
        if true_share is None:
            return self.model.predict(x, y, state)
        logits, state = scheduled.forward(self.model, x, state, true_share)
        return logits, y, state


def _weights(model: CharLM) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


_DIRECTIONS = {
    "forward": "left to right",
    "backward": "right to left",
    "both": "both ways, to fill in characters",
}


def _without(row: Row, *keys: str) -> Row:
    return {key: value for key, value in row.items() if key not in keys}
