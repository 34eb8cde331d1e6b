"""How the gradient of the loss vanishes or explodes on its way back through time."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.errors import CharlmError
from charlm.files import write_atomically
from charlm.nn.cells import cell_of, input_product
from charlm.nn.model import CharLM


@torch.enable_grad()
def gradflow(model: CharLM, ids: Tensor, steps: int) -> dict[str, list[float]]:
    """The norm of the loss gradient with respect to the top layer's state, k = 0..`steps` steps back.

    ids (B, T+1): T characters are read from a zero state, without dropout, and ℓ is the cross-entropy of the
    last one's prediction alone. Entry k of ``"h"`` is the root of the mean over the batch of ‖∂ℓ/∂h_{T-k}‖²,
    ℓ being each sequence's own loss, so that the figure does not depend on B (Pascanu et al. 2013).

    For the LSTM ``"c"`` gives the same of c_{T-k}. There h_t and c_t are two tensors of one state: ∂ℓ/∂h_t is
    what reaches ℓ through h_t alone, that is through the gates and the candidate at t + 1 (at T through the
    head), with c_t held fixed; ∂ℓ/∂c_t is all that c_t does, through h_t = o_t ⊙ tanh(c_t) and through
    c_{t+1} = f_{t+1} ⊙ c_t + ..., the constant error carousel (Hochreiter & Schmidhuber 1997).

    It is computed in float64 on the CPU, by the steps of `cells` with the weights of `model` in whatever
    implementation; float32 would lose what has vanished.

    Raises `CharlmError` where T ≤ `steps`.
    """
    if model.config.direction == "both":
        raise CharlmError("a model of direction: both has no last step; look at one of direction: forward")
    B, T = ids.shape[0], ids.shape[1] - 1
    if steps >= T:
        raise CharlmError(
            f"the gradient {steps} steps back needs {steps + 2} characters, and the text has {T + 1}; "
            "take a longer text or fewer steps"
        )
    config = model.config
    cell = cell_of(config)
    weights = {name: tensor.cpu().double() for name, tensor in model.state_dict().items()}
    ids = ids.cpu()
    if config.input == "embedding":
        y = F.embedding(ids[:, :-1], weights["embedding.weight"])
    else:
        y = F.one_hot(ids[:, :-1], model.vocab_size).double()
    y = y.transpose(0, 1)
    for k in range(config.num_layers):
        W_ih, W_hh, b_ih, b_hh = (
            weights[f"recurrent.{name}_l{k}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        # The weights are constants here; that the state asks for a gradient keeps the graph through time.
        state = tuple(zeros[k].cpu().double().requires_grad_() for zeros in model.initial_state(B))
        states = []
        for a in input_product(y, W_ih, b_ih).unbind(0):
            state = cell.step(a, state, W_hh, b_hh)
            states.append(state)
        y = torch.stack([state[0] for state in states])
    logits = F.linear(states[-1][0], weights["head.weight"], weights["head.bias"])
    loss = F.cross_entropy(logits, ids[:, -1], reduction="sum")  # the mean would divide each gradient by B
    back = reversed(states[-1 - steps :])
    flow = {}
    for name, tensors in zip(cell.state, zip(*back, strict=True), strict=True):
        gradients = torch.stack(torch.autograd.grad(loss, tensors, retain_graph=True))  # (steps+1, B, H)
        flow[name] = gradients.square().sum(dim=2).mean(dim=1).sqrt().tolist()
    return flow


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Draw named curves, entry k at k steps back, on a logarithmic scale, into the image file `path`.

    A norm of 0 has no logarithm and is left out.

    path: that `plot.check_plot` has nothing against; its ending chooses the format.
    Raises `CharlmError` where it cannot be written.
    """
    from matplotlib.figure import Figure

    figure, ending = Figure(figsize=(7, 4.5), layout="constrained"), path.suffix.lower().removeprefix(".")
    axes = figure.add_subplot(yscale="log", xlabel="steps back", ylabel="norm of the loss gradient")
    for name, norms in curves.items():
        axes.plot(norms, label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=ending, dpi=150))
