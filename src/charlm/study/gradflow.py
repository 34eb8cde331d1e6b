"""Measure how the gradient of the loss vanishes or explodes on its way back through time."""

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm import config as configuration
from charlm.config import CELL_NAMES, Config
from charlm.errors import CharlmError, ConfigError
from charlm.nn.layers import Scratch
from charlm.nn.model import CharLM
from charlm.storage.vocabulary import read_vocabulary
from charlm.study.plot import save
from charlm.text.corpus import Corpus
from charlm.training.learner import Learner

_SEQUENCES = 32  # stretches of the val split over which the norms are averaged


def gradflow_by_cell(config: Config, steps: int, train_steps: int, scale: float) -> dict[str, list[float]]:
    """Return the `gradflow` of each cell on the val split, by a name for the curve.

    Each cell is measured untrained and, with `train_steps` > 0, after so many training steps; the RNN also
    with its recurrent weights multiplied by `scale`.

    Raises `ConfigError` for a val split of fewer than `steps` + 2 characters.
    """
    known = read_vocabulary(config.corpus)
    corpus = Corpus.load(config.corpus, known=known, seed=config.train.seed)
    if len(corpus.val) < steps + 2:
        raise ConfigError(
            f"--steps {steps} needs {steps + 2} characters, and the val split has {len(corpus.val)}"
        )
    starts = torch.linspace(0, len(corpus.val) - steps - 2, _SEQUENCES).long()
    ids = corpus.val.unfold(0, steps + 2, 1)[starts].long()
    curves: dict[str, list[float]] = {}

    def measure(name: str, model: CharLM) -> None:
        for state, norms in gradflow(model, ids, steps).items():
            curves[f"{name}, {state}"] = norms

    overrides = ["model.direction=forward", "model.dropout=0.0", f"train.max_steps={max(train_steps, 1)}"]
    for cell in CELL_NAMES:
        learner = Learner(configuration.override(config, [f"model.cell={cell}", *overrides]), corpus)
        measure(cell, learner.model)
        if cell == "rnn":
            scaled = copy.deepcopy(learner.model)
            weights = scaled.state_dict()
            scaled.load_state_dict({k: weights[k] * (scale if "weight_hh" in k else 1) for k in weights})
            measure(f"rnn, W_hh × {scale:g}", scaled)
        if train_steps:
            for x, y in itertools.islice(learner.remaining_batches(), train_steps):
                learner.step(x, y)
            measure(f"{cell}, trained", learner.model)
    return curves


@torch.enable_grad()
def gradflow(model: CharLM, ids: Tensor, steps: int) -> dict[str, list[float]]:
    """Return the norm of the loss gradient with respect to the top layer's state k = 0..`steps` steps back.

    ids (B, T+1): T characters are read from a zero state, without dropout; the loss ℓ is the cross-entropy of
    the last prediction alone. Entry k of ``"h"`` is the root of the mean over the batch of ‖∂ℓ/∂h_{T-k}‖²,
    where ℓ is the loss of the sequence, so that the norm does not depend on B (Pascanu et al. 2013).

    For the LSTM, ``"c"`` is the same for c_{T-k}. h_t and c_t are two tensors of one state: ∂ℓ/∂h_t has the
    paths through h_t alone, that is through the gates and the candidate at t + 1 (at T through the head),
    with c_t held fixed; ∂ℓ/∂c_t has all paths from c_t, through h_t = o_t ⊙ tanh(c_t) and through
    c_{t+1} = f_{t+1} ⊙ c_t + ..., the constant error carousel (Hochreiter & Schmidhuber 1997).

    Computed in float64 by the steps of `cells`, because vanished gradients underflow in float32.

    Raises `CharlmError` for T ≤ `steps` and for a fill-in model.
    """
    if model.config.direction == "both":
        raise CharlmError("model.direction is 'both', which has no last step; allowed: forward, backward")
    B, T = ids.shape[0], ids.shape[1] - 1
    if steps >= T:
        raise CharlmError(
            f"{steps} steps back need {steps + 2} characters, and the text has {T + 1}; take fewer steps"
        )
    config = model.config.model_copy(update={"implementation": "scratch"})
    scratch = CharLM(model.vocab_size, config).cpu().double().eval().requires_grad_(False)
    scratch.load_state_dict(model.state_dict())
    ids, recurrent = ids.cpu(), scratch.recurrent
    assert isinstance(recurrent, Scratch)
    embedded: Any = scratch.embed(ids[:, :-1])
    y = embedded.transpose(0, 1)
    for k in range(config.num_layers):
        W_ih, W_hh, b_ih, b_hh = recurrent.weights(k)
        # The weights are constants; the graph through time comes from the state, which requires a gradient.
        state = tuple(zeros[k].requires_grad_() for zeros in scratch.initial_state(B))
        states = []
        for a in F.linear(y, W_ih, b_ih).unbind(0):
            state = recurrent.cell.step(a, state, W_hh, b_hh)
            states.append(state)
        y = torch.stack([state[0] for state in states])
    logits = scratch.head(states[-1][0])
    loss = F.cross_entropy(logits, ids[:, -1], reduction="sum")  # a mean would divide each gradient by B
    back = reversed(states[-1 - steps :])
    flow = {}
    for name, tensors in zip(recurrent.cell.state, zip(*back, strict=True), strict=True):
        gradients = torch.stack(torch.autograd.grad(loss, tensors, retain_graph=True))  # (steps+1, B, H)
        flow[name] = gradients.square().sum(dim=2).mean(dim=1).sqrt().tolist()
    return flow


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Draw named curves, entry k at k steps back, on a logarithmic scale, to the image file `path`.

    Norms of 0 are left out. Raises `CharlmError` for a file that cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(yscale="log", xlabel="steps back", ylabel="norm of the loss gradient")
    for name, norms in curves.items():
        axes.plot(norms, label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
