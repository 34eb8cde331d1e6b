"""The training step: a model, its batches and its optimiser, with a state that can be saved and loaded.

`Learner` takes steps; it neither writes files nor prints. `scheduled_forward` is the forward pass of
scheduled sampling. `refuse_changes` says which settings can change when a run is resumed.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from charlm.config import Config, CorpusConfig, ModelConfig, TrainConfig
from charlm.errors import ConfigError, one_line
from charlm.nn.cells import State
from charlm.nn.device import autocast, choose_precision
from charlm.nn.functional import cross_entropy, one_sequence
from charlm.nn.layers import choose_implementation
from charlm.nn.model import CharLM, copy_weights, make_model
from charlm.storage.model_file import load_weights
from charlm.text.batches import make_batches, mix, rank_slice
from charlm.text.corpus import Corpus
from charlm.training import optim
from charlm.training.distributed import ALONE, Group
from charlm.training.memory import check_memory
from charlm.training.progress import Progress, Sums


class Learner:
    """A model in training, one step at a time.

    model: the model that is trained.
    scored: the model that is evaluated, sampled from and saved: `model`, or with ``train.ema`` its average.
    carried: the state (L, B, H) that the next batch starts from; None for zeros.
    initial: a model whose weights are the first ones, of the first characters of the corpus's vocabulary.
    skip_reason: why the last step was skipped, or None if it was taken.
    memory: a line about the memory that a step needs; empty on other devices than the CPU.

    Each process of a `group` makes a learner and calls the same methods.

    A learner leaves the process's allocator alone. A program that trains on Linux calls `native.keep_memory`
    once before: without it, a step takes up to a third longer, because its memory is mapped anew each time.

    Raises `CharlmError` for a device that is not available, for a corpus too short for the batches and for
    batches that need more memory than is free.
    """

    def __init__(self, config: Config, corpus: Corpus, group: Group = ALONE, initial: CharLM | None = None):
        self.config, self.corpus, self.group = config, corpus, group
        self.device = group.device(config.train.device)
        self.precision, self.precision_reason = choose_precision(config.train.precision, self.device)
        backward = config.model.direction == "backward"
        self.batches = make_batches(
            corpus.train, config.batches, backward, corpus.release, group.rank, group.size, corpus.boundary
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = config.train.max_steps or config.train.epochs * self.steps_per_epoch
        self.memory = ""
        if self.device.type == "cpu":
            how = choose_implementation(config.model, self.device)[0], self.precision
            self.memory = check_memory(
                config,
                len(corpus.vocab),
                -(-self.batches.sequences(0) // group.size),
                self.batches.seq_len,
                *how,
            )
        torch.manual_seed(group.seed(config.train.seed))  # dropout draws from torch's global generators
        model = make_model(len(corpus.vocab), config.model, self.device)
        model.initialise(config.train.seed)
        model.unknown = corpus.vocab.unknown
        if initial:
            try:
                copy_weights(initial, model)
            except ValueError as error:
                raise ConfigError(
                    f"{config.train.init_from} does not fit the settings of model: its {error}"
                ) from None
        self.model = model.to(self.device)
        self.prediction = group.parallel(Prediction(self.model))
        self.scored = copy.deepcopy(self.model).to(self.device) if config.train.ema else self.model
        self.optimizer = optim.make_optimizer(self.model, config.train)
        self.plateau = optim.make_plateau(self.optimizer, config.train)
        self.progress = Progress()
        self.carried: State | None = None
        self.skip_reason: str | None = None
        self._batch_seconds = 0.0  # that the batch of the next step took to make

    @property
    def finished(self) -> str | None:
        """The setting that ended the training, with its value, or None if the training is not finished."""
        train, progress = self.config.train, self.progress
        if train.early_stopping and progress.evaluations_since_best >= train.early_stopping:
            return f"train.early_stopping={train.early_stopping}"
        if progress.elapsed >= train.time_limit_seconds:
            return f"train.time_limit={train.time_limit}"
        if progress.step < self.total_steps:
            return None
        return f"train.max_steps={train.max_steps}" if train.max_steps else f"train.epochs={train.epochs}"

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches from `progress.step` on, epoch after epoch; follow a step that was set back."""
        while not self.finished:
            started = time.perf_counter()
            epoch, start = divmod(self.progress.step, self.steps_per_epoch)
            if start == 0:
                self.carried = None
            expected = self.progress.step
            for batch in self.batches.loader(self.config.train.seed, epoch, start):
                self._batch_seconds = time.perf_counter() - started
                yield batch
                started = time.perf_counter()
                expected += 1
                if self.progress.step < expected:
                    break

    def step(self, x: Tensor, y: Tensor) -> tuple[float, int, float]:
        """Take an optimiser step on a batch (B, T), of which this process has its slice.

        An id of -1 in y is padding, which does not count in the loss. If the loss or the gradient is not
        finite, the weights stay as they are and `skip_reason` is set.

        Returns the loss (nats per character), the number of characters, both over all processes, and the
        seconds, with those that `remaining_batches` took to make the batch.
        """
        started, progress, train = time.perf_counter(), self.progress, self.config.train
        if self.plateau is None:
            factor = optim.lr_factor(progress.step, train, self.total_steps, self.steps_per_epoch)
            optim.set_lr(self.optimizer, train.lr * factor * 0.5**progress.rollbacks)
        empty = not len(x)
        if empty:  # the other processes wait for its gradients, which count nothing
            x = y = x.new_zeros(1, x.shape[1])
        x, y = x.to(self.device), y.to(self.device)
        state = self.carried or self.model.initial_state(len(x))
        self.model.train()
        true_probability = None
        if train.teacher_forcing < 1:
            true_probability = true_character_probability(progress.step / self.total_steps, train)
        with autocast(self.device, self.precision):
            logits, y, state = self.prediction(x, y, state, true_probability)
        if train.loss_on == "last":
            logits, y = logits[:, -1:], y[:, -1:]
        characters, weight = self._share(y, empty)
        if self.batches.pads and not (real := y >= 0).all():
            logits, y = logits[real], y[real]
        loss = cross_entropy(logits, y)
        self.optimizer.zero_grad()
        # The processes take the mean of the gradients.
        (loss * (weight * self.group.size)).backward()  # type: ignore[no-untyped-call]
        norm = optim.gradient_norm(self.model)
        nats = self.group.sum(self._nats(loss, y) * weight)
        finite = math.isfinite(nats) and math.isfinite(norm)
        self.skip_reason = None if finite else f"the loss is {nats:.4g}, the norm of the gradient {norm:.4g}"
        if finite:
            optim.update(self.model, self.optimizer, train, norm, self.scored, progress.step)
            progress.grad_norm = norm
        if self.batches.carries_state:
            self.carried = tuple(tensor.detach().float() for tensor in state) if finite else None
        seconds = self._batch_seconds + time.perf_counter() - started
        self._batch_seconds = 0.0
        progress.step += 1
        progress.lr = self.optimizer.param_groups[0]["lr"]
        progress.bad_steps += not finite
        progress.bad_steps_in_a_row = 0 if finite else progress.bad_steps_in_a_row + 1
        progress.seconds += seconds
        for sums in (progress.since_evaluation, progress.since_row):
            sums.add(nats if finite else 0.0, characters if finite else 0, seconds)
        return nats, characters, seconds

    def _nats(self, loss: Tensor, y: Tensor) -> float:
        """Return the mean of -ln p of the characters of y (…), of which `loss` predicts the ids."""
        unknown = self.model.unknown  # its constant has no gradient
        return loss.item() + (float(unknown.nats(y).mean()) if unknown else 0.0)

    def _share(self, y: Tensor, empty: bool) -> tuple[int, float]:
        """Return the characters of a step and this process's share of them, from its targets y (B, T)."""
        own = 0 if empty else int((y >= 0).sum()) if self.batches.pads else y.numel()
        if self.group.size == 1:
            return own, 1.0
        if self.batches.pads:
            characters = int(self.group.sum(own))
        else:
            characters = self.batches.sequences(self.progress.step % self.steps_per_epoch) * y.shape[1]
        return characters, own / characters

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
            "carried": self.carried and tuple(torch.cat([*self.group.gathered(t)], 1) for t in self.carried),
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
        for name in ("since_evaluation", "since_row"):
            _check_types(state["progress"][name], asdict(Sums()))
        changed = set(differences(config, self.config)) - {"batches.batch_size"}
        # Another number of processes, each with another batch_size, can read the same sequences in each step.
        if state["sequences"] != self.config.batches.batch_size * self.group.size:
            changed.add("batches.batch_size")
        self.progress = Progress(**state["progress"])
        load_weights(self.model, state["weights"])
        if self.config.train.ema:
            load_weights(self.scored, state["average"] or state["weights"])
        optim.load_optimizer(self.optimizer, state["optimizer"])
        if self.plateau and state["plateau"]:
            own = self.plateau.state_dict()
            _check_types(state["plateau"], {key: own[key] for key in own.keys() & state["plateau"]})
            settings = {key: own[key] for key in ("factor", "patience", "min_lrs")}
            self.plateau.load_state_dict({**state["plateau"], **settings})
        if changed & {"train.lr", "train.schedule"}:  # the new rate, without the halvings of rollbacks
            self.progress.rollbacks = 0
            optim.set_lr(self.optimizer, self.config.train.lr)
        self._load_processes(state)
        if changed & REORDERING or state["steps_per_epoch"] != self.steps_per_epoch:
            # The step counts other batches: go to the beginning of its epoch, counted in these.
            self.progress.step = self.progress.step // state["steps_per_epoch"] * self.steps_per_epoch
            self.progress.since_evaluation, self.progress.since_row = Sums(), Sums()
            self.carried = None
        return bool(changed)

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


class Prediction(nn.Module):
    """The forward pass of a model in training, as the module that `Group.parallel` wraps."""

    def __init__(self, model: CharLM):
        super().__init__()
        self.model = model

    def forward(
        self, x: Tensor, y: Tensor, state: State, true_probability: float | None
    ) -> tuple[Tensor, Tensor, State]:
        """Return the logits (B, T, V) on a batch x, y (B, T), the ids they predict, and the last state."""
        if true_probability is None:
            return self.model.predict(x, y, state)
        logits, state = scheduled_forward(self.model, x, state, true_probability)
        return logits, y, state


def _check_types(found: dict[str, Any], example: dict[str, Any]) -> None:
    """Raise `TypeError` unless `found` has values of the types of `example`, no negative integer."""
    for key, value in example.items():
        if type(found[key]) is not type(value) or (type(value) is int and found[key] < 0):
            raise TypeError(f"{key} is {one_line(repr(found[key]))}")


def _weights(model: CharLM) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def true_character_probability(progress: float, config: TrainConfig) -> float:
    """Return the probability of feeding the true character at `progress`, 0 to 1, of the training.

    It falls from 1 to ``teacher_forcing`` along a line, an exponential or an inverse sigmoid: the three
    schedules of Bengio et al. 2015 (section 2.4), scaled to these two ends.
    """
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda d: 1 - d,
        "exponential": lambda d: math.exp(-5 * d),
        "inverse_sigmoid": lambda d: 1 / (1 + math.exp(10 * (d - 0.5))),
    }
    shape = shapes[config.teacher_forcing_schedule]
    remaining = (shape(progress) - shape(1.0)) / (shape(0.0) - shape(1.0))
    return config.teacher_forcing + (1 - config.teacher_forcing) * remaining


@one_sequence()  # although the model reads one character at a time
def scheduled_forward(
    model: CharLM, x: Tensor, state: State, true_probability: float
) -> tuple[Tensor, State]:
    """Return ``model(x, state)`` with scheduled sampling (Bengio et al. 2015).

    Each character x_t, t > 0, is fed with probability `true_probability`; otherwise a character drawn from
    the model's prediction of x_t is fed. No gradient flows through the draw, which uses torch's global
    generator.

    x (B, T) and a state give logits (B, T, V) and the last state.
    """
    fed, outputs = x[:, :1], []
    for t in range(x.shape[1]):
        logits, state = model(fed, state)
        outputs.append(logits)
        if t + 1 < x.shape[1]:
            # multinomial refuses NaN; the loss reports it.
            p = logits[:, 0].detach().float().softmax(-1).nan_to_num(1.0)
            drawn = torch.multinomial(p, 1)
            is_true = torch.rand(len(x), 1, device=x.device) < true_probability
            fed = torch.where(is_true, x[:, t + 1 : t + 2], drawn)
    return torch.cat(outputs, 1), state


# The settings that a resumed run can change without --allow-changes: its budget, its device, its reports and
# the place of its text.
FREE = (
    *("train.epochs", "train.max_steps", "train.time_limit", "train.early_stopping", "train.device"),
    *("train.tensorboard", "train.log_every", "corpus.source", "corpus.val", "corpus.test"),
)

# After a change of these, a step reads other characters: the epoch is restarted.
REORDERING = {
    *(f"batches.{key}" for key in ("sampling", "batch_size", "seq_len", "stride", "shuffle", "truncation")),
    "batches.max_train_windows",
    "train.seed",
}

# The changes that are refused with --allow-changes too, and why.
_MODEL_KEYS = ModelConfig.model_fields.keys() - {
    *("implementation", "dropout", "locked_dropout", "weight_dropout", "embedding_dropout")
}
_IMPOSSIBLE = {
    **{f"model.{key}": "the weights would not fit the model" for key in _MODEL_KEYS},
    **dict.fromkeys(
        ("model.init", "model.forget_bias", "train.init_from"), "it affects the initial weights only"
    ),
    **{f"corpus.{key}": "the text and its vocabulary would change" for key in CorpusConfig.model_fields},
    "train.optimizer": "the state of one optimiser does not fit another",
}


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Return the keys, as section.key, whose values differ, with the value before and the value after."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {
        f"{section}.{key}": (old[section][key], value)
        for section, values in new.items()
        for key, value in values.items()
        if value != old[section][key]
    }


def refuse_changes(before: Config, after: Config, allow: bool) -> None:
    """Raise `ConfigError`, with all differences, if a run of `before` cannot be resumed with `after`.

    allow: refuse only the changes that are impossible, with the reasons.
    """
    changed = {key: values for key, values in differences(before, after).items() if key not in FREE}
    if not allow and changed:
        raise ConfigError(
            f"--resume would change {_shown(changed)}; allowed without --allow-changes: {', '.join(FREE)}; "
            "restore the old values or add --allow-changes"
        )
    why = _IMPOSSIBLE | ({"train.seed": "it shuffles the records"} if before.corpus.records else {})
    if impossible := [key for key in changed if key in why]:
        reasons = ", ".join(f"{_shown({key: changed[key]})} ({why[key]})" for key in impossible)
        raise ConfigError(f"--resume cannot change {reasons}; start a new run instead")


def _shown(changed: dict[str, tuple[Any, Any]]) -> str:
    values = {key: [json.dumps(value).strip('"') for value in pair] for key, pair in changed.items()}
    return ", ".join(f"{key}: {old} → {new}" for key, (old, new) in values.items())
