"""A model that learns: its steps over a corpus, and all that these depend on, to be saved and taken up."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.config import Config, ModelConfig, TrainConfig
from charlm.errors import ConfigError, one_line
from charlm.nn.cells import State
from charlm.nn.device import autocast, choose_precision
from charlm.nn.kernels.native import keep_memory
from charlm.nn.layers import one_sequence
from charlm.nn.model import CharLM, make_model
from charlm.storage.model_file import load_weights
from charlm.text.batches import make_batches, mix, rank_slice
from charlm.text.corpus import Corpus
from charlm.training.distributed import ALONE, Group
from charlm.training.optim import (
    clip_gradients,
    load_optimizer,
    load_plateau,
    lr_factor,
    make_optimizer,
    make_plateau,
    set_lr,
    update_average,
)
from charlm.training.progress import Progress


class Learner:
    """A model in training, a step at a time; nothing is written and nothing shown.

    model: what is trained.
    scored: what is scored, sampled from and saved: `model`, or with ``train.ema`` its average.
    carried: the state (L, B, H) that the next batch begins from; None where it begins afresh.
    problem: what was not finite in the last step; None where it was taken.

    Of the processes of a `group` each makes one, and calls what the others call.

    Making one has the process keep the memory that it frees (`native.keep_memory`).

    Raises `CharlmError` for a device that is not here and a corpus too short for the batches.
    """

    def __init__(self, config: Config, corpus: Corpus, group: Group = ALONE):
        self.config, self.corpus, self.group = config, corpus, group
        self.device = group.device(config.train.device)
        self.precision, self.precision_reason = choose_precision(config.train.precision, self.device)
        backward = config.model.direction == "backward"
        self.batches = make_batches(
            corpus.train, config.batches, backward, corpus.release, group.rank, group.size
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
        self.progress = Progress()
        self.carried: State | None = None
        self.problem: str | None = None

    @property
    def finished(self) -> str | None:
        """The setting that ended the training, with its value; None while there is more to do."""
        train, progress = self.config.train, self.progress
        if train.early_stopping and progress.evaluations_since_best >= train.early_stopping:
            return f"train.early_stopping={train.early_stopping}"
        if progress.step < self.total_steps:
            return None
        return f"train.max_steps={train.max_steps}" if train.max_steps else f"train.epochs={train.epochs}"

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
            true_share = share_fed_true(progress.step / self.total_steps, train)
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

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the training depends on; all processes must call this.

        sequences: how many sequences a step reads. carried: their hidden states (L, sequences, H).
        rng, cuda_rng: the states of the random generators, a row for each process.
        """
        cuda = self.device.type == "cuda"
        return {
            "corpus": self.corpus.fingerprint,
            "config": self.config.model_dump(mode="json"),
            "steps_per_epoch": self.steps_per_epoch,
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

    def load(self, state: dict[str, Any], config: Config) -> bool:
        """Load a `state` that was saved under `config`; return whether the training continues differently.

        If this learner's configuration is another, its own is used; if its batches are others, the epoch
        restarts. The number of processes may be another: each step reads the same sequences, and a process
        without a saved random generator gets a new seed.

        Raises AttributeError, ArithmeticError, LookupError, TypeError, ValueError or RuntimeError for a state
        that does not fit.
        """
        _check_types(state, {"sequences": 1, "steps_per_epoch": 1})
        _check_types(state["progress"], asdict(Progress()))
        changed = set(differences(config, self.config))
        # Another number of processes can read the same sequences in each step.
        changed -= {"batches.batch_size"}
        if state["sequences"] != self.config.batches.batch_size * self.group.size:
            changed |= {"batches.batch_size"}
        self.progress = Progress(**state["progress"])
        load_weights(self.model, state["weights"])
        if self.config.train.ema:
            load_weights(self.scored, state["average"] or state["weights"])
        self._load_optimizer(state["optimizer"])
        if self.plateau and state["plateau"]:
            own = self.plateau.state_dict()
            _check_types(state["plateau"], {key: own[key] for key in own.keys() & state["plateau"]})
            load_plateau(self.plateau, state["plateau"])
        if changed & {
            "train.lr",
            "train.schedule",
        }:  # set now: without the halvings of earlier rollbacks
            self.progress.rollbacks = 0
            set_lr(self.optimizer, self.config.train.lr)
        self._load_processes(state)
        if changed & REORDERING or state["steps_per_epoch"] != self.steps_per_epoch:
            self._begin_epoch_again(state["steps_per_epoch"])
        return bool(changed)

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the optimiser's moments, each of which has its parameter's shape or none."""
        load_optimizer(self.optimizer, state)
        for group in self.optimizer.param_groups:
            _check_types(group, {"lr": 0.0})
            for parameter in group["params"]:
                for name, tensor in self.optimizer.state[parameter].items():
                    if tensor.shape not in (torch.Size(), parameter.shape):
                        raise ValueError(f"the optimiser's {name} has the shape {tuple(tensor.shape)}")

    def _load_processes(self, state: dict[str, Any]) -> None:
        """Load the part of the state that differs between the processes."""
        rank, carried = self.group.rank, state["carried"]
        if carried:
            for tensor, zeros in zip(carried, self.model.initial_state(1), strict=True):
                if tensor.shape != (len(zeros), state["sequences"], zeros.shape[2]):
                    raise ValueError(f"a carried hidden state has the shape {tuple(tensor.shape)}")
        own = rank_slice(state["sequences"], rank, self.group.size)
        self.carried = carried and tuple(tensor[:, own].contiguous().to(self.device) for tensor in carried)
        if rank < len(state["rng"]):
            torch.set_rng_state(state["rng"][rank].clone())  # torch reads a view of it wrongly
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"][rank].clone(), self.device)
        else:
            torch.manual_seed(mix(self.config.train.seed, rank, self.progress.step))

    def _begin_epoch_again(self, steps_per_epoch: int) -> None:
        """Set the step, counted in other batches, to the beginning of its epoch, counted in these."""
        progress = self.progress
        progress.step = progress.step // steps_per_epoch * self.steps_per_epoch
        progress.train_nats, progress.train_characters, progress.train_seconds = 0.0, 0, 0.0
        self.carried = None


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
        logits, state = scheduled_forward(self.model, x, state, true_share)
        return logits, y, state


def _check_types(found: dict[str, Any], example: dict[str, Any]) -> None:
    """Raise `TypeError` unless `found` has values of the types of `example`, no negative integer."""
    for key, value in example.items():
        if type(found[key]) is not type(value) or (type(value) is int and found[key] < 0):
            raise TypeError(f"{key} is {one_line(repr(found[key]))}")


def _weights(model: CharLM) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def share_fed_true(done: float, config: TrainConfig) -> float:
    """The share of true characters to feed once `done` (0 to 1) of the training is over.

    It falls from 1 to ``teacher_forcing`` along a line, an exponential, or an inverse sigmoid: the paper's
    three shapes (section 2.4), scaled to begin and end there.
    """
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda d: 1 - d,
        "exponential": lambda d: math.exp(-5 * d),
        "inverse_sigmoid": lambda d: 1 / (1 + math.exp(10 * (d - 0.5))),
    }
    shape = shapes[config.teacher_forcing_schedule]
    left = (shape(done) - shape(1.0)) / (shape(0.0) - shape(1.0))
    return config.teacher_forcing + (1 - config.teacher_forcing) * left


@one_sequence()  # though it is read a character at a time
def scheduled_forward(model: CharLM, x: Tensor, state: State, share: float) -> tuple[Tensor, State]:
    """As ``model(x, state)``, but for what is fed: each character x_t, t > 0, is the true one with
    probability `share`, else drawn from the model's own prediction of it.

    x (B, T) and a state give logits (B, T, V) and the state after; no gradient flows through the drawing.
    Chance comes from torch's global generator.
    """  # noqa: D205
    fed, outputs = x[:, :1], []
    for t in range(x.shape[1]):
        logits, state = model(fed, state)
        outputs.append(logits)
        if t + 1 < x.shape[1]:
            # What is no number is not drawn from; the loss tells of it.
            p = logits[:, 0].detach().float().softmax(-1).nan_to_num(1.0)
            drawn = torch.multinomial(p, 1)
            truly = torch.rand(len(x), 1, device=x.device) < share
            fed = torch.where(truly, x[:, t + 1 : t + 2], drawn)
    return torch.cat(outputs, 1), state


# A run goes on as it began, but for its budget, its device, and where its text now is.
FREE = (
    *("train.epochs", "train.max_steps", "train.early_stopping", "train.device", "train.tensorboard"),
    "corpus.source",
)

# Steps are not the same steps after these: the epoch is begun again.
REORDERING = {
    *(f"batches.{key}" for key in ("sampling", "batch_size", "seq_len", "stride", "shuffle", "truncation")),
    "batches.max_train_windows",
    "train.seed",
}

_ADAPTABLE = {  # of the model's keys, those that another value can go on from
    f"model.{key}"
    for key in ("implementation", "dropout", "locked_dropout", "weight_dropout", "embedding_dropout")
}
_IMPOSSIBLE = {
    **{f"model.{key}": "the weights are those of another model" for key in ModelConfig.model_fields},
    **{f"model.{key}": "it takes effect at the beginning only" for key in ("init", "forget_bias")},
    "train.optimizer": "what one optimiser has gathered is nothing to another",
}


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The keys, as section.key, in which two configurations differ, each with its two values."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {
        f"{section}.{key}": (old[section][key], value)
        for section, values in new.items()
        for key, value in values.items()
        if value != old[section][key]
    }


def refuse_changes(before: Config, after: Config, allow: bool) -> None:
    """Raise `ConfigError`, with all differences, where a run made from `before` is not to go on as `after`.

    allow: only what cannot be changed is refused, with the reason.
    """
    changed = {key: values for key, values in differences(before, after).items() if key not in FREE}
    if not allow and changed:
        raise ConfigError(
            f"--resume would change {_shown(changed)}; only {', '.join(FREE)} change freely: "
            "leave the rest as it was, or say --allow-changes"
        )
    impossible = {key: why for key in changed if (why := _why_impossible(key))}
    if impossible:
        reasons = ", ".join(f"{_shown({key: changed[key]})} ({why})" for key, why in impossible.items())
        raise ConfigError(f"--resume cannot change {reasons}; begin a new run for that")


def _why_impossible(key: str) -> str | None:
    if key.startswith("corpus."):
        return "the text would be another, and with it the vocabulary"
    return None if key in _ADAPTABLE else _IMPOSSIBLE.get(key)


def _shown(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}: {_text(old)} → {_text(new)}" for key, (old, new) in changed.items())


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
