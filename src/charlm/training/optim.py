"""Optimisers, learning-rate schedules, gradient clipping and weight averaging, named as in `TrainConfig`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau

from charlm.config import TrainConfig
from charlm.errors import one_line
from charlm.nn.kernels.native import Kernels, kernels


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Return the optimiser of all parameters; the weight decay excludes vectors, which are biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = all(each.device.type in ("cpu", "cuda") for each in matrices)  # one pass over the weights
    makers: dict[str, Callable[[], Optimizer]] = {
        "sgd": lambda: SGD(groups, lr=config.lr, momentum=config.momentum),
        "adam": lambda: Adam(groups, lr=config.lr, betas=config.betas, fused=fused),
        "adamw": lambda: AdamW(groups, lr=config.lr, betas=config.betas, fused=fused),
        "rmsprop": lambda: RMSprop(groups, lr=config.lr, momentum=config.momentum),
        "adadelta": lambda: Adadelta(groups, lr=config.lr),
    }
    return makers[config.optimizer]()


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load another optimiser's moments and learning rate into `optimizer`, which keeps its settings.

    Raises `ValueError` or `TypeError` for a state that does not fit the parameters.
    """
    settings = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        if type(group["lr"]) is not float:
            raise TypeError(f"lr is {one_line(repr(group['lr']))}")
        group.update({**own, "lr": group["lr"]})
        for parameter in group["params"]:
            for name, tensor in optimizer.state[parameter].items():
                if tensor.shape not in (torch.Size(), parameter.shape):
                    raise ValueError(f"the optimiser's {name} has the shape {tuple(tensor.shape)}")


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_plateau(optimizer: Optimizer, config: TrainConfig) -> ReduceLROnPlateau | None:
    """Return the scheduler of ``train.schedule: plateau``, or None for the other schedules.

    It lowers the learning rate after val losses that do not improve. The other schedules are functions of the
    step, without a state: see `lr_factor`.
    """
    if config.schedule != "plateau":
        return None
    # torch's patience is the number of evaluations that it tolerates; ours, as in early_stopping, includes
    # the one that ends it.
    return ReduceLROnPlateau(
        optimizer,
        factor=config.decay,
        patience=config.plateau_patience - 1,
        threshold=0,
        min_lr=config.lr * config.min_lr,
    )


def lr_factor(step: int, config: TrainConfig, total_steps: int, steps_per_epoch: int) -> float:
    """Return the factor of the learning rate at `step`, which counts from 0.

    constant: 1. step: decay^⌊epoch / step_epochs⌋.
    cosine: linear from 0 to 1 over the fraction ``warmup`` of the steps, then half a cosine down to
    ``min_lr`` (Loshchilov & Hutter 2017).
    one_cycle: half a cosine from 1/25 up to 1 over ``warmup``, half a cosine down to ``min_lr`` (Smith 2018).
    """
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return float(config.decay ** (step // (steps_per_epoch * config.step_epochs)))
    warmup_steps = config.warmup * total_steps
    if step < warmup_steps:
        if config.schedule == "cosine":
            return (step + 1) / (warmup_steps + 1)
        return _half_cosine(step / warmup_steps, 1 / 25, 1.0)
    done = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
    return _half_cosine(min(done, 1.0), 1.0, config.min_lr)


def _half_cosine(done: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of the gradients of all parameters together."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if found := _kernels(gradients):
        return found.norm([each.contiguous() for each in gradients])
    norm = nn.utils.get_total_norm(gradients)
    if not norm.isfinite():  # the squares overflow in float32 long before the gradients do
        norm = nn.utils.get_total_norm([gradient.cpu().double() for gradient in gradients])
    return norm.item()


@torch.no_grad()
def update(
    model: nn.Module, optimizer: Optimizer, config: TrainConfig, norm: float, average: nn.Module, n: int
) -> None:
    """Clip the gradients, whose norm is `norm`, take the optimiser's step and update `average`.

    ``train.clip``:
    norm: g ← min(1, clip_value / ‖g‖) g over all parameters together (Pascanu et al. 2013).
    value: each element to [-clip_value, clip_value].

    With ``train.ema`` = d, `average` is an exponential moving average w̄ of the weights w after n updates:

    w̄ ← d' w̄ + (1 - d') w, d' = min(d, (1 + n) / (10 + n))

    Averaging the weights is due to Polyak & Juditsky (1992). A d' that starts at 1/10, so that the initial
    weights are soon forgotten, comes from TensorFlow's ``tf.train.ExponentialMovingAverage``
    (``num_updates``).

    On the CPU the kernels do all of it for AdamW in one pass over the weights.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    share = 1 - min(config.ema, (1 + n) / (10 + n)) if config.ema else 0.0
    averages = dict(zip(model.parameters(), average.parameters(), strict=True)) if share else {}
    found = _kernels(parameters)
    if found and config.optimizer == "adamw":
        _adamw(found, optimizer, config, norm, averages, share)
        return
    if config.clip == "norm":
        nn.utils.clip_grads_with_norm_(parameters, config.clip_value, torch.tensor(norm))
    elif config.clip == "value":
        nn.utils.clip_grad_value_(parameters, config.clip_value)
    optimizer.step()
    if averages:
        torch._foreach_lerp_(list(averages.values()), list(averages), share)


def _adamw(
    found: Kernels,
    optimizer: Optimizer,
    config: TrainConfig,
    norm: float,
    averages: dict[nn.Parameter, nn.Parameter],
    share: float,
) -> None:
    """Do the work of `update` with torch's state of AdamW (Loshchilov & Hutter 2019)."""
    weights: list[tuple[Tensor | None, ...]] = []
    decays = []
    step = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
            state["step"] += 1
            step = int(state["step"])
            moments = state["exp_avg"], state["exp_avg_sq"]
            weights.append((parameter, parameter.grad.contiguous(), *moments, averages.get(parameter)))
            decays.append(group["lr"] * group["weight_decay"])
    beta1, beta2 = config.betas
    group = optimizer.param_groups[0]
    found.adamw(
        weights,
        decays,
        scale=min(1.0, config.clip_value / (norm + 1e-6)) if config.clip == "norm" else 1.0,
        limit=config.clip_value if config.clip == "value" else math.inf,
        rate=group["lr"] / (1 - beta1**step),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        correction=1 / (1 - beta2**step),
        share=share,
    )


def _kernels(tensors: list[Any]) -> Kernels | None:
    """Return the kernels for all `tensors`, or None where there are none."""
    kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors}
    if len(kinds) != 1:
        return None
    ((device, dtype),) = kinds
    found = kernels(dtype) if device == "cpu" else None
    return found if found and found.writes else None
