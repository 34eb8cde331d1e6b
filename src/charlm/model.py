"""`CharLM`: characters in, logits out."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from charlm.cells import GATES, STATES, State
from charlm.config import ModelConfig
from charlm.recurrent import make_recurrent


class CharLM(nn.Module):
    """A character-level language model: input, recurrent stack, linear head.

    The logits at step t, over the V characters, are for the character at t + 1. Dropout falls on the output
    of every recurrent layer, the last included. Only `initialise` gives the weights their first values.
    """

    def __init__(self, vocab_size: int, config: ModelConfig):
        super().__init__()
        self.vocab_size, self.config = vocab_size, config
        if config.input == "embedding":
            self.embedding = nn.Embedding(vocab_size, config.embedding_size)
        input_size = config.embedding_size if config.input == "embedding" else vocab_size
        self.recurrent = make_recurrent(input_size, config)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden_size, vocab_size)
        if config.tie_weights:
            self.head.weight = self.embedding.weight

    def initial_state(self, batch_size: int) -> State:
        """Zeros: a tuple of tensors of shape (L, B, H), on the weights' device."""
        shape = (self.config.num_layers, batch_size, self.config.hidden_size)
        weight = self.head.weight
        return tuple(
            torch.zeros(shape, device=weight.device, dtype=weight.dtype)
            for _ in range(STATES[self.config.cell])
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Ids x (B, T) and the state before them; logits (B, T, V) and the state after them."""
        if self.config.input == "embedding":
            inputs = self.embedding(x)
        else:
            inputs = F.one_hot(x, self.vocab_size).to(self.head.weight.dtype)
        y, state = self.recurrent(inputs, state)
        return self.head(self.dropout(y)), state

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
        bound = self.config.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            values = torch.empty(parameter.shape)
            if self.config.init == "normal":
                _ = (
                    init.zeros_(values)
                    if values.dim() == 1
                    else init.normal_(values, std=0.01, generator=generator)
                )
            elif name == "embedding.weight":
                init.normal_(values, std=bound if self.config.tie_weights else 1.0, generator=generator)
            elif self.config.init == "default":
                init.uniform_(values, -bound, bound, generator=generator)
            elif values.dim() == 1:
                init.zeros_(values)
            else:
                fill = init.xavier_uniform_ if self.config.init == "xavier" else init.orthogonal_
                gates = GATES[self.config.cell] if name.startswith("recurrent.") else 1
                for block in values.chunk(gates):
                    fill(block, generator=generator)
            parameter.copy_(values)
        if self.config.cell == "lstm" and self.config.forget_bias is not None:
            H = self.config.hidden_size
            for name, parameter in self.recurrent.named_parameters():
                if name.startswith("bias"):
                    parameter[H : 2 * H] = self.config.forget_bias if "ih" in name else 0.0
        return self


def num_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())
