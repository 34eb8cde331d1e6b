"""`CharLM` and `FillLM`: characters in, logits out."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from charlm.config import ModelConfig
from charlm.nn.cells import State, cell_of
from charlm.nn.layers import Characters, Fused, choose_implementation, dropped, locked, make_recurrent, once


class CharLM(nn.Module):
    """A character-level language model: input, recurrent stack, linear head.

    The logits at step t, over the V characters, are for the character at t + 1. Dropout falls on the output
    of every recurrent layer, the last included; ``locked_dropout`` keeps its masks over the steps,
    ``weight_dropout`` falls on W_hh and ``embedding_dropout`` on whole characters (all three as in Merity,
    Keskar & Socher 2018). Only `initialise` gives the weights their first values.

    A model of ``direction: backward`` is the same network: whoever uses it hands it the text last to first.

    device: where it is going to run, the CPU by default: ``implementation: auto`` depends on it. The model is
        made on torch's default device all the same.
    """

    def __init__(self, vocab_size: int, config: ModelConfig, device: torch.device | None = None):
        super().__init__()
        implementation, _ = choose_implementation(config, device or torch.device("cpu"))
        config = config.model_copy(update={"implementation": implementation})
        self.vocab_size, self.config = vocab_size, config
        if config.input == "embedding":
            self.embedding = nn.Embedding(vocab_size, config.embedding_size)
        self.input_size = config.embedding_size if config.input == "embedding" else vocab_size
        self.recurrent = make_recurrent(self.input_size, config)
        self.head = nn.Linear(config.hidden_size, vocab_size)
        if config.tie_weights:
            self.head.weight = self.embedding.weight

    def initial_state(self, batch_size: int) -> State:
        """Zeros: a tuple of tensors of shape (L, B, H), on the weights' device."""
        shape = (self.config.num_layers, batch_size, self.config.hidden_size)
        weight = self.head.weight
        return tuple(
            torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in cell_of(self.config).state
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Ids x (B, T) and the state before them; logits (B, T, V) and the state after them."""
        y, state = self.recurrent(self.embed(x), state)
        return self.head(self.drop(y)), state

    def embed(self, x: Tensor) -> Tensor | Characters:
        """Ids x (B, T) as what the recurrent stack reads, (B, T, E) or, one-hot, (B, T, V)."""
        one_hot = self.config.input == "one_hot" and not (self.training and self.config.embedding_dropout)
        if isinstance(self.recurrent, Fused):
            return Characters(x, None if one_hot else self.embedding_table())
        if one_hot:
            return F.one_hot(x, self.vocab_size).to(self.head.weight.dtype)
        return F.embedding(x, self.embedding_table())

    def embedding_table(self) -> Tensor:
        """What each character is read as, (V, E) or, one-hot, the identity (V, V): for one forward pass.

        In training whole rows are dropped with probability ``embedding_dropout``: a character is then read
        as zeros wherever it stands in the batch (Gal & Ghahramani 2016). A tied head keeps its rows.
        """
        if self.config.input == "one_hot":
            table = torch.eye(self.vocab_size, dtype=self.head.weight.dtype, device=self.head.weight.device)
        else:
            table = self.embedding.weight
        p = self.config.embedding_dropout
        if not (self.training and p):
            return table
        return once((self, "table"), lambda: table * dropped(table.new_ones(len(table), 1), p))

    def drop(self, y: Tensor) -> Tensor:
        """Dropout on what the head reads, y (B, T, H)."""
        if self.training and self.config.locked_dropout:
            return locked(y, self.config.dropout, 1, (self, "y"))
        return dropped(y, self.config.dropout) if self.training else y

    def predict(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Logits (B, T, V) on a batch x, y (B, T), the ids (B, T) that they predict, and the state after."""
        logits, state = self(x, state)
        return logits, y, state

    @torch.no_grad()
    def initialise(self, seed: int) -> "CharLM":
        """Give all weights their first values, the same for one seed in every implementation.

        ``model.init`` names how: ``default`` is torch's (uniform in ±1/√H in the recurrent layers and the
        head, N(0, 1) in the embedding); ``xavier`` and ``orthogonal`` fill each gate's matrix so, with zero
        biases (Glorot & Bengio 2010; Saxe et al. 2014); ``normal`` draws matrices from N(0, 0.01²), with zero
        biases. ``model.forget_bias`` then sets the LSTM forget gate's bias, the sum of its two vectors
        (Jozefowicz et al. 2015); null leaves it as initialised.
        """
        generator = torch.Generator().manual_seed(seed)
        H, cell = self.config.hidden_size, cell_of(self.config)
        for name, parameter in self.named_parameters():
            values = torch.empty(parameter.shape)
            if self.config.init == "normal":
                _ = (
                    init.zeros_(values)
                    if values.dim() == 1
                    else init.normal_(values, std=0.01, generator=generator)
                )
            elif name == "embedding.weight":
                init.normal_(values, std=H**-0.5 if self.config.tie_weights else 1.0, generator=generator)
            elif self.config.init == "default":
                bound = (self.head.in_features if name.startswith("head.") else H) ** -0.5
                init.uniform_(values, -bound, bound, generator=generator)
            elif values.dim() == 1:
                init.zeros_(values)
            else:
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
    """A model of ``direction: both``, which fills in a character from those on both sides of it.

    The logits at t come from the state of a left-to-right stack after character t - 1 and the state of a
    right-to-left stack after character t + 1; no path leads from character t to them. (Were they made from
    the states at t, as an `nn.LSTM` with ``bidirectional=True`` has it, the model would read the answer.)
    A state is that of the left-to-right stack, then that of the right-to-left one.
    """

    def __init__(self, vocab_size: int, config: ModelConfig, device: torch.device | None = None):
        super().__init__(vocab_size, config, device)
        self.reverse = make_recurrent(self.input_size, self.config)
        self.head = nn.Linear(2 * config.hidden_size, vocab_size)

    def initial_state(self, batch_size: int) -> State:
        """Zeros for both stacks: a tuple of tensors of shape (L, B, H)."""
        return super().initial_state(batch_size) * 2

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Ids x (B, T), the states left and right of them; logits (B, T, V) for x, and both states after."""
        left, right = state[: len(state) // 2], state[len(state) // 2 :]
        inputs = self.embed(x)
        read_left, left_after = self.recurrent(inputs, left)
        read_right, right_after = self.reverse(inputs.flip(1), right)
        before = torch.cat([left[0][-1:].transpose(0, 1), read_left[:, :-1]], 1)  # at t: all up to t - 1
        after = torch.cat([read_right.flip(1)[:, 1:], right[0][-1:].transpose(0, 1)], 1)  # all from t + 1
        return self.head(self.drop(torch.cat([before, after], -1))), left_after + right_after

    def predict(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Logits (B, T + 1, V) for all characters of a window x, y (B, T), those ids, and the state after."""
        window = torch.cat([x, y[:, -1:]], 1)
        logits, state = self(window, state)
        return logits, window, state


def make_model(vocab_size: int, config: ModelConfig, device: torch.device | None = None) -> CharLM:
    """The model that `config` asks for; its weights are not initialised here."""
    return (FillLM if config.direction == "both" else CharLM)(vocab_size, config, device)


def num_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())
