"""Compare numeric with analytic gradients of the configured model, parameter by parameter."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from charlm.config import Config
from charlm.nn.cells import cell_of
from charlm.nn.model import make_model

V, B, MAX_T = 11, 3, 9  # sizes of the batch: all gates and steps contribute


@dataclass(frozen=True)
class Check:
    """The gradient of one parameter over the checked entries: n by differences, a by backpropagation.

    numeric and analytic are the norms ‖n‖ and ‖a‖; relative_error is ‖n - a‖ / (‖n‖ + ‖a‖), 0 if both norms
    are 0 and infinite if one is NaN.
    """

    parameter: str
    numeric: float
    analytic: float
    relative_error: float


def gradcheck(config: Config, entries: int = 10, delta: float = 3e-5, seed: int = 1) -> list[Check]:
    """Check the gradient of the loss for each parameter tensor of the configured model, in float64.

    The loss is the mean cross-entropy over all targets of a random batch, from a random state, without
    dropout. Of each tensor, `entries` entries are checked: half of them those with the largest analytic
    gradients, half drawn from the rest. Each takes two forward passes: ∂L/∂w ≈ (L(w + δ) - L(w - δ)) / 2δ,
    with a rounding error of order ε/δ and a curvature error of order δ². At δ = 3e-5 the relative error is
    about 1e-9 with one or two layers; it grows with depth, as gradients shrink, to 1e-7 with four layers and
    1e-5 with eight.

    The weights are the initial ones, except for `model.init` ``normal``: matrices of N(0, 0.01²) give
    gradients that shrink a hundredfold per layer, below the resolution of the differences, and place
    rectified units within a step of their kink. The equations do not depend on the weights, so those of
    ``default`` are used instead.
    """
    init = "default" if config.model.init == "normal" else config.model.init
    model = make_model(V, config.model.model_copy(update={"init": init})).initialise(seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(V, (2, B, min(config.batches.seq_len, MAX_T)), generator=generator)
    state = tuple(
        torch.randn(zeros.shape, generator=generator, dtype=zeros.dtype) for zeros in model.initial_state(B)
    )

    def losses() -> Tensor:
        """Return the cross-entropy of every target, (B·T,)."""
        logits, targets, _ = model.predict(x, y, state)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")

    def slope(weights: Tensor, index: int, step: float) -> float:
        """Return the central difference of the loss at one entry of `weights` (N,)."""
        before = weights[index].item()
        weights[index] = before + step
        above = losses()
        weights[index] = before - step
        below = losses()
        weights[index] = before
        return float((above - below).mean()) / (2 * step)  # the mean of the differences rounds less

    # A step across the kink of a rectified unit gives a mean of two slopes; a smaller step stays on one side.
    # The nearest difference is taken, which hides no error: a wrong gradient is far from all of them.
    steps = [delta] if cell_of(config.model).smooth else [delta / 10**k for k in range(4)]

    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(losses().mean(), parameters, materialize_grads=True)
    checks = []
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        order = gradient.flatten().abs().argsort(descending=True)
        largest, rest = order[: entries // 2], order[entries // 2 :]
        drawn = rest[torch.randperm(len(rest), generator=generator)[: entries - len(largest)]]
        chosen = torch.cat([largest, drawn])
        a = gradient.flatten()[chosen]
        with torch.no_grad():
            weights = parameter.view(-1)
            slopes = [[slope(weights, index, step) for step in steps] for index in chosen.tolist()]
        differences = torch.tensor(slopes, dtype=a.dtype)
        nearest = (differences - a[:, None]).abs().argmin(dim=1, keepdim=True)
        n = differences.gather(1, nearest)[:, 0]
        checks.append(_compare(name, n, a))
    return checks


def _compare(name: str, n: Tensor, a: Tensor) -> Check:
    """Return the `Check` of numeric and analytic gradients, both (entries,)."""
    total = float(n.norm() + a.norm())
    error = float((n - a).norm()) / total if total else 0.0
    return Check(name, float(n.norm()), float(a.norm()), math.inf if math.isnan(error) else error)
