"""`CharLM` and `FillLM`: characters in, logits out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from charlm.config import ModelConfig
from charlm.nn.cells import State, cell_of
from charlm.nn.functional import dropped, locked, once
from charlm.nn.layers import Characters, Fused, Linear, choose_implementation, make_recurrent
from charlm.text.vocab import UnknownClass


class CharLM(nn.Module):
    """A character-level language model: input, recurrent stack, linear head.

    The logits at step t, over the V characters, are for the character at t + 1. Dropout applies
    to the output of every recurrent layer, the last included; ``locked_dropout`` uses one mask for all steps,
    ``weight_dropout`` applies to W_hh and ``embedding_dropout`` to whole characters (all three as in Merity,
    Keskar & Socher 2018). `initialise` gives the weights their first values.

    A model of ``direction: backward`` is the same network; its callers reverse the text.

    device: where the model will run, by default the CPU; ``implementation: auto`` depends on it. The model is
        made on torch's default device.
    unknown: the class among the V that stands for several characters, or None. The logits are those of the
        class; a score of its characters adds `UnknownClass.nats`. Set by those who know the vocabulary.
    """

    unknown: UnknownClass | None = None

    def __init__(self, vocab_size: int, config: ModelConfig, device: torch.device | None = None):
        super().__init__()
        implementation, _ = choose_implementation(config, device or torch.device("cpu"))
        config = config.model_copy(update={"implementation": implementation})
        self.vocab_size, self.config = vocab_size, config
        if config.input == "embedding":
            self.embedding = nn.Embedding(vocab_size, config.embedding_size)
        self.input_size = config.embedding_size if config.input == "embedding" else vocab_size
        self.recurrent = make_recurrent(self.input_size, config)
        self.head = Linear(config.hidden_size, vocab_size)
        if config.tie_weights:
            self.head.weight = self.embedding.weight

    def initial_state(self, batch_size: int) -> State:
        """Return zeros: a tuple of tensors of shape (L, B, H), on the weights' device."""
        shape = (self.config.num_layers, batch_size, self.config.hidden_size)
        return tuple(self.head.weight.new_zeros(shape) for _ in cell_of(self.config).state)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Map ids x (B, T) and the state before them to logits (B, T, V) and the state after them."""
        y, state = self.recurrent(self.embed(x), state)
        return self.head(self.drop(y)), state

    def embed(self, x: Tensor) -> Tensor | Characters:
        """Return the recurrent stack's input for ids x (B, T): (B, T, E) or, one-hot, (B, T, V)."""
        one_hot = self.config.input == "one_hot" and not (self.training and self.config.embedding_dropout)
        if isinstance(self.recurrent, Fused):
            return Characters(x, None if one_hot else self.embedding_table())
        if one_hot:
            return F.one_hot(x, self.vocab_size).to(self.head.weight.dtype)
        return F.embedding(x, self.embedding_table())

    def embedding_table(self) -> Tensor:
        """Return the vectors of all characters, (V, E) or, one-hot, the identity, for one forward pass.

        In training whole rows are dropped with probability ``embedding_dropout``: the character's vector is
        then zero everywhere in the batch (Gal & Ghahramani 2016). A tied head keeps its rows.
        """
        p, head = self.config.embedding_dropout, self.head.weight
        if self.config.input == "one_hot":
            table = torch.eye(self.vocab_size, dtype=head.dtype, device=head.device)
        else:
            table = self.embedding.weight
        if not (self.training and p):
            return table
        return once((self, "table"), lambda: table * dropped(table.new_ones(len(table), 1), p))

    def drop(self, y: Tensor) -> Tensor:
        """Apply dropout to the input of the head, y (B, T, H)."""
        if self.training and self.config.locked_dropout:
            return locked(y, self.config.dropout, 1, (self, "y"))
        return dropped(y, self.config.dropout) if self.training else y

    def predict(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Return logits (B, T, V) for a batch x, y (B, T), the ids that they predict, and the state after."""
        logits, state = self(x, state)
        return logits, y, state

    @torch.no_grad()
    def initialise(self, seed: int) -> "CharLM":
        """Give all weights their first values, the same for one seed in every implementation.

        ``model.init`` chooses the distribution: ``default`` is torch's (uniform in ±1/√H in the recurrent
        layers and the head, N(0, 1) in the embedding); ``xavier`` (Glorot & Bengio 2010) and ``orthogonal``
        (Saxe et al. 2014) apply to the matrix of each gate, ``normal`` draws matrices from N(0, 0.01²); with
        these three, biases are zero. ``model.forget_bias`` then sets the bias of the LSTM's forget gate, the
        sum of its two vectors (Jozefowicz et al. 2015); null keeps the initial one.
        """
        generator = torch.Generator().manual_seed(seed)
        H, cell = self.config.hidden_size, cell_of(self.config)
        for name, parameter in self.named_parameters():
            values = torch.zeros(parameter.shape)
            if self.config.init == "normal":
                if values.dim() > 1:
                    init.normal_(values, std=0.01, generator=generator)
            elif name == "embedding.weight":
                init.normal_(values, std=H**-0.5 if self.config.tie_weights else 1.0, generator=generator)
            elif self.config.init == "default":
                bound = (self.head.in_features if name.startswith("head.") else H) ** -0.5
                init.uniform_(values, -bound, bound, generator=generator)
            elif values.dim() > 1:
                fill = init.xavier_uniform_ if self.config.init == "xavier" else init.orthogonal_
                gates = cell.gates if name.startswith(("recurrent.", "reverse.")) else 1
                for block in values.chunk(gates):
                    fill(block, generator=generator)
            parameter.copy_(values)
        if cell.forget_gate is not None and self.config.forget_bias is not None:
            gate = slice(cell.forget_gate * H, (cell.forget_gate + 1) * H)
            for name, parameter in self.named_parameters():
                if ".bias_" in name:
                    parameter[gate] = self.config.forget_bias if "ih" in name else 0.0
        return self


class FillLM(CharLM):
    """A model of ``direction: both``, which predicts a character from those on both sides of it.

    The logits at t come from the state of a left-to-right stack after character t - 1 and the state of a
    right-to-left stack after character t + 1, so that they do not depend on character t. (The outputs of an
    `nn.LSTM` with ``bidirectional=True`` at t do.) A state is that of the left-to-right stack followed by
    that of the right-to-left one.
    """

    def __init__(self, vocab_size: int, config: ModelConfig, device: torch.device | None = None):
        super().__init__(vocab_size, config, device)
        self.reverse = make_recurrent(self.input_size, self.config)
        self.head = Linear(2 * config.hidden_size, vocab_size)

    def initial_state(self, batch_size: int) -> State:
        """Return zeros for both stacks: a tuple of tensors of shape (L, B, H)."""
        return super().initial_state(batch_size) * 2

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Map ids x (B, T) and the states on both sides to logits (B, T, V) for x and both states after."""
        left, right = state[: len(state) // 2], state[len(state) // 2 :]
        inputs = self.embed(x)
        read_left, left_after = self.recurrent(inputs, left)
        read_right, right_after = self.reverse(inputs.flip(1), right)
        before = torch.cat([left[0][-1:].transpose(0, 1), read_left[:, :-1]], 1)  # at t: all up to t - 1
        after = torch.cat([read_right.flip(1)[:, 1:], right[0][-1:].transpose(0, 1)], 1)  # all from t + 1
        return self.head(self.drop(torch.cat([before, after], -1))), left_after + right_after

    def predict(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Return logits (B, T + 1, V) for all characters of x, y (B, T), their ids, and the state after."""
        window = torch.cat([x, y[:, -1:]], 1)
        logits, state = self(window, state)
        return logits, window, state


def make_model(vocab_size: int, config: ModelConfig, device: torch.device | None = None) -> CharLM:
    """Make the model of `config`, with weights that are not initialised."""
    return (FillLM if config.direction == "both" else CharLM)(vocab_size, config, device)


@torch.no_grad()
def copy_weights(source: CharLM, target: CharLM) -> None:
    """Copy all weights of `source` into `target`, whose first characters are those of `source`.

    Each new character gets the weights of the one with the lowest bias in the head: it is as improbable, and
    the predictions of the others change as little.

    Raises `ValueError` for models whose sizes differ in more than the number of characters.
    """
    old, rarest = dict(source.named_parameters()), source.head.bias.argmin()
    for name, parameter in target.named_parameters():
        values = old.get(name, parameter.new_empty(0))
        for axis in range(min(values.dim(), parameter.dim())):
            if (values.shape[axis], parameter.shape[axis]) == (source.vocab_size, target.vocab_size):
                row = values.index_select(axis, rarest[None])
                new = target.vocab_size - source.vocab_size
                values = torch.cat([values, *[row] * new], axis)
                break
        if values.shape != parameter.shape:
            shapes = f"{tuple(values.shape)}, not {tuple(parameter.shape)}"
            raise ValueError(f"{name} has the shape {shapes}")
        parameter.copy_(values)


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable numbers."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout and gradients off, and restore the mode of `model` at the end.

    A generator must not yield inside: its caller would get a model in the wrong mode, and the first of two
    generators to end would turn dropout on in the other.
    """
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()
