"""The training loop: steps, evaluations, saves, and going on from where a run stopped."""

import copy
import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from charlm import scheduled
from charlm.batches import make_batches, val_characters
from charlm.cells import State
from charlm.checkpoint import load_model, load_weights, save_model
from charlm.config import Config
from charlm.corpus import Corpus
from charlm.device import autocast, choose_device, choose_precision
from charlm.errors import CharlmError, Interrupted
from charlm.evaluate import evaluate
from charlm.metrics import Score, perplexity
from charlm.model import CharLM, make_model, num_parameters
from charlm.native import keep_memory
from charlm.optim import clip_gradients, make_optimizer, make_schedule, update_average
from charlm.progress import Reporter, Row
from charlm.recurrent import choose_implementation
from charlm.runs import Run
from charlm.sample import generate
from charlm.tensorboard import TensorBoard, check_tensorboard


@dataclass
class Progress:
    """What the loop remembers between steps, apart from tensors.

    train_nats, train_characters, train_seconds: sums since the last evaluation.
    seconds: time spent in steps, in all.
    """

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0
    train_nats: float = 0.0
    train_characters: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    log_size: int = 0


@dataclass(frozen=True)
class Result:
    """How a training ended: the best model's figures, and its score on the test split if there is one."""

    best: Row
    test: Score | None


class Trainer:
    """A model in training: `train` takes it from `progress.step` to the end of its budget.

    model: what is trained.
    scored: what is scored, sampled from and saved: `model`, or with ``train.ema`` its average.

    Making one has the process keep the memory that it frees (`native.keep_memory`).

    Raises `CharlmError` for a device that is not here and a corpus too short for the batches.
    """

    def __init__(self, config: Config, corpus: Corpus):
        if config.train.tensorboard:
            check_tensorboard()
        self.config, self.corpus = config, corpus
        self.device = choose_device(config.train.device)
        self.precision, self.precision_reason = choose_precision(config.train.precision, self.device)
        backward = config.model.direction == "backward"
        self.batches = make_batches(corpus.train.flip(0) if backward else corpus.train, config.batches)
        self.val = corpus.val[: val_characters(config.batches)]
        if len(self.val) < 2:
            raise CharlmError(
                f"the val split has {len(self.val)} characters, too few to score; "
                "take a longer text or a larger val share in corpus.split"
            )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = config.train.max_steps or config.train.epochs * self.steps_per_epoch
        torch.manual_seed(config.train.seed)  # dropout draws from torch's global generators
        keep_memory()
        model = make_model(len(corpus.vocab), config.model, self.device)
        self.model = model.initialise(config.train.seed).to(self.device)
        self.scored = copy.deepcopy(self.model).to(self.device) if config.train.ema else self.model
        self.optimizer = make_optimizer(self.model, config.train)
        self.schedule = make_schedule(self.optimizer, config.train, self.total_steps, self.steps_per_epoch)
        # What fills in characters has a pseudo-likelihood; its figures are not to be taken for the others'.
        self.kind = "pseudo_" if config.model.direction == "both" else ""
        self.progress = Progress()
        self.carried: State | None = None
        self.grad_norm, self.lr = 0.0, config.train.lr

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
        lines = [
            f"corpus   {source}: {sizes} characters, {len(corpus.vocab)} different",
            f"model    {model.cell} {model.num_layers} × {model.hidden_size}, "
            f"{_DIRECTIONS[model.direction]}: {num_parameters(self.model):,} parameters",
            f"         {implementation} ({reason})",
            f"batches  {batches.sampling}, {batches.batch_size} × {batches.seq_len}, state {state}; "
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

        Raises `Interrupted` after Ctrl-C or SIGTERM, once the step is finished and the state is saved, and
        `CharlmError` for a loss that is not finite and files that cannot be written.
        """
        progress, every = self.progress, self.config.train
        eval_every = every.eval_every or self.steps_per_epoch
        if every.tensorboard:
            reporter = TensorBoard(run.folder / "tensorboard", reporter)
        reporter.begin(progress.step, self.total_steps, self.steps_per_epoch)
        try:
            with _caught_signals() as caught:
                if progress.step == 0:
                    self._save(run)  # a run that is killed early can be resumed too
                for x, y in self.remaining_batches():
                    reporter.step(*self.step(x, y))
                    stop = caught[0] if caught else None  # once: a signal from here on is the next step's
                    if progress.step % eval_every == 0 or progress.step == self.total_steps:
                        self._evaluate(run, reporter)
                    elif stop or (every.checkpoint_every and progress.step % every.checkpoint_every == 0):
                        self._save(run)
                    if self.finished:
                        break
                    if stop:
                        raise Interrupted(
                            f"stopped at step {progress.step} of {self.total_steps}; "
                            f"go on with: charlm train --resume {shlex.quote(str(run.folder))}",
                            stop,
                        )
        finally:
            reporter.end()
        return self._finish(run)

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from `progress.step` on, epoch after epoch."""
        while self.progress.step < self.total_steps:
            epoch, start = divmod(self.progress.step, self.steps_per_epoch)
            if start == 0:
                self.carried = None
            yield from self.batches.loader(self.config.train.seed, epoch, start)

    def step(self, x: Tensor, y: Tensor) -> tuple[float, int, float]:
        """One optimiser step on a batch (B, T): its loss, over how many characters, in how many seconds."""
        began = time.perf_counter()
        x, y = x.to(self.device), y.to(self.device)
        state = self.carried or self.model.initial_state(len(x))
        self.model.train()
        with autocast(self.device, self.precision):
            logits, y, state = self._predict(x, y, state)
        if self.config.train.loss_on == "last":
            logits, y = logits[:, -1:], y[:, -1:]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        grad_norm = clip_gradients(self.model, self.config.train)
        nats = loss.item()
        progress = self.progress
        self.grad_norm, self.lr = grad_norm.item(), self.optimizer.param_groups[0]["lr"]
        if not (math.isfinite(nats) and math.isfinite(self.grad_norm)):
            raise _diverged(
                progress.step, f"the loss is {nats:.4g}, the gradient's norm {self.grad_norm:.4g}"
            )
        self.optimizer.step()
        if self.config.train.ema:
            update_average(self.scored, self.model, self.config.train.ema, self.progress.step)
        if not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()
        if self.batches.carries_state:
            self.carried = tuple(tensor.detach().float() for tensor in state)
        seconds = time.perf_counter() - began
        progress.step += 1
        progress.train_nats += nats * y.numel()
        progress.train_characters += y.numel()
        progress.train_seconds += seconds
        progress.seconds += seconds
        return nats, y.numel(), seconds

    def _predict(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Logits on a batch, what they predict, and the state after; with scheduled sampling if asked for."""
        train = self.config.train
        if train.teacher_forcing == 1:
            return self.model.predict(x, y, state)
        share = scheduled.true_share(self.progress.step / self.total_steps, train)
        logits, state = scheduled.forward(self.model, x, state, share)
        return logits, y, state

    def _evaluate(self, run: Run, reporter: Reporter) -> None:
        """Score the val split, log a row, keep the model if it is the best, save."""
        progress = self.progress
        val = evaluate(self.scored, self.val)
        if not math.isfinite(val.loss):
            raise _diverged(progress.step, f"the val loss is {val.loss}")
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(val.loss)
        train_loss = progress.train_nats / progress.train_characters
        row: Row = {
            "step": progress.step,
            "epoch": round(progress.step / self.steps_per_epoch, 4),
            "train_loss": train_loss,
            f"train_{self.kind}perplexity": perplexity(train_loss),
            "val_loss": val.loss,
            f"val_{self.kind}perplexity": val.perplexity,
            f"val_{self.kind}bits_per_character": val.bits_per_character,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "chars_per_second": progress.train_characters / progress.train_seconds,
            "seconds": progress.seconds,
        }
        best = val.loss < progress.best_loss
        if best:
            progress.best_loss, progress.best_step, progress.evaluations_since_best = (
                val.loss,
                progress.step,
                0,
            )
        else:
            progress.evaluations_since_best += 1
        progress.train_nats, progress.train_characters, progress.train_seconds = 0.0, 0, 0.0
        progress.log_size = run.log(row)
        if best:
            save_model(run.best, self.scored, self.corpus.vocab, self.config, _timeless(row))
        self._save(run, row)
        reporter.evaluated(row, best)
        if self.config.train.sample_chars and not self.kind:
            reporter.sample(self._sample(self.config.train.sample_chars))

    def _sample(self, length: int) -> str:
        """A text by `scored`, from a generator of its own: training is the same without it."""
        generator = torch.Generator().manual_seed(self.config.train.seed + self.progress.step)
        start = self.corpus.vocab.encode("", "skip")
        return "".join(generate(self.scored, self.corpus.vocab, start, length, 0.7, generator=generator))

    def _save(self, run: Run, row: Row | None = None) -> None:
        """Write ``last.safetensors`` and ``state.pt``; the latter alone is enough to go on from."""
        figures = _timeless(row or {"step": self.progress.step})
        save_model(run.last, self.scored, self.corpus.vocab, self.config, figures)
        run.save_state(
            {
                "corpus": self.corpus.fingerprint,
                "progress": asdict(self.progress),
                "weights": _weights(self.model),
                "average": _weights(self.scored) if self.config.train.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "carried": self.carried,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            }
        )

    def restore(self, run: Run) -> None:
        """Take up the state that `run` saved last, and cut its log back to it.

        Raises `CharlmError` for a state that is missing, damaged, or of another corpus.
        """
        state = run.load_state()
        try:
            if state["corpus"] != self.corpus.fingerprint:
                raise CharlmError(
                    f"the corpus has changed since the run {run.folder} was begun; "
                    "restore the text, or begin a new run"
                )
            self.progress = Progress(**state["progress"])
            load_weights(self.model, state["weights"])
            if self.config.train.ema:
                load_weights(self.scored, state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            carried = state["carried"]
            self.carried = carried and tuple(tensor.to(self.device) for tensor in carried)
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"]:
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CharlmError(f"{run.state} does not fit the run's configuration: {error}") from None
        run.cut_log(self.progress.log_size)

    def _finish(self, run: Run) -> Result:
        """Score the test split with the best model and log that."""
        best = load_model(run.best, device=self.device)
        test = evaluate(best.model, self.corpus.test) if len(self.corpus.test) > 1 else None
        if test:
            figures = {"test_loss": test.loss, f"test_{self.kind}perplexity": test.perplexity}
            figures[f"test_{self.kind}bits_per_character"] = test.bits_per_character
            run.log({"step": self.progress.step, "best_step": self.progress.best_step, **figures})
        return Result(best.figures, test)


def _weights(model: CharLM) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def _diverged(step: int, what: str) -> CharlmError:
    return CharlmError(
        f"training diverged after step {step}: {what}; take a smaller train.lr or train.clip: norm"
    )


_DIRECTIONS = {
    "forward": "left to right",
    "backward": "right to left",
    "both": "both ways, to fill in characters",
}


def _timeless(row: Row) -> Row:
    """`row` without what differs from one run of the same command to the next."""
    return {key: value for key, value in row.items() if key not in ("seconds", "chars_per_second")}


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM in a list for the loop to look at; a second one acts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python hands signals to the main thread only
        return

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, catch) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
