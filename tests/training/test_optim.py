import math

import pytest
import torch
from torch import nn

from charlm.config import TrainConfig
from charlm.nn.kernels.native import kernels
from charlm.training import optim
from charlm.training.optim import gradient_norm, lr_factor, make_optimizer, make_plateau, update


def factors(total=100, per_epoch=10, **options):
    return [lr_factor(step, TrainConfig(**options), total, per_epoch) for step in range(total)]


def test_schedules_are_the_documented_functions_of_the_step():
    assert set(factors(schedule="constant")) == {1.0}
    halved = factors(schedule="step", decay=0.5, step_epochs=2)
    assert halved[::20] == halved[10::20] == [1, 0.5, 0.25, 0.125, 0.0625]
    cosine = factors(schedule="cosine", warmup=0.2, min_lr=0.1)
    assert cosine[0] == pytest.approx(1 / 21) and cosine[10] == pytest.approx(11 / 21)
    assert cosine[20] == 1 and cosine[-1] == pytest.approx(0.1)
    middle = 20 + (99 - 20) / 2
    assert (cosine[math.floor(middle)] + cosine[math.ceil(middle)]) / 2 == pytest.approx(0.55, abs=0.01)
    one_cycle = factors(schedule="one_cycle", warmup=0.3, min_lr=0.01)
    assert (
        one_cycle[0] == pytest.approx(1 / 25) and one_cycle[30] == 1 and one_cycle[-1] == pytest.approx(0.01)
    )
    assert one_cycle[:31] == sorted(one_cycle[:31]) and one_cycle[30:] == sorted(one_cycle[30:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_factors_of_a_few_steps_are_in_range(schedule, total):
    assert all(0 < factor <= 1 for factor in factors(total, schedule=schedule))


def test_plateau_lowers_the_rate_when_val_does_not_improve():
    model = nn.Linear(2, 2)
    config = TrainConfig(schedule="plateau", lr=1.0, decay=0.5, plateau_patience=2)
    optimizer = make_optimizer(model, config)
    schedule = make_plateau(optimizer, config)
    rates = []
    for loss in (3.0, 2.0, 2.0, 2.0, 1.9999999, 2.0):
        schedule.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adadelta"])
def test_optimizers_descend(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = make_optimizer(model, TrainConfig(optimizer=name, lr=0.5 if name == "adadelta" else 0.05))
    before = loss = model(torch.eye(3)).square().sum()
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(torch.eye(3)).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < before
    assert type(optimizer).__name__.lower() == name


def test_weight_decay_excludes_biases():
    groups = make_optimizer(nn.Linear(3, 2), TrainConfig(weight_decay=0.3)).param_groups
    decays = {
        tuple(parameter.shape): group["weight_decay"] for group in groups for parameter in group["params"]
    }
    assert decays == {(2, 3): 0.3, (2,): 0.0}


needs_kernels = pytest.mark.skipif(not kernels(torch.float32), reason="no C compiler here")


@pytest.fixture(params=[pytest.param("kernels", marks=needs_kernels), "torch"])
def way(request, monkeypatch):
    """Both ways to clip gradients and to update weights."""
    if request.param == "torch":
        monkeypatch.setattr(optim, "_kernels", lambda tensors: None)


def step(gradient, **options):
    """Return the weights after an update with a gradient, and the norm of the gradient."""
    gradient = torch.tensor(gradient)
    model = nn.Linear(*reversed(gradient.shape), bias=False)
    nn.init.zeros_(model.weight)
    model.weight.grad = gradient
    config = TrainConfig(**{"weight_decay": 0.0, "lr": 1.0, **options})
    norm = gradient_norm(model)
    update(model, make_optimizer(model, config), config, norm, model, 0)
    return model.weight.detach(), norm


@pytest.mark.parametrize(
    ("clip", "gradient", "expected"),
    [
        ("norm", [[3.0, -4.0]], [[0.6, -0.8]]),
        ("value", [[3.0, -4.0]], [[1.0, -1.0]]),
        ("none", [[3.0, -4.0]], [[3.0, -4.0]]),
        ("norm", [[0.3, -0.4]], [[0.3, -0.4]]),
    ],
)
def test_clipping_limits_large_gradients_only(clip, gradient, expected):
    weights, norm = step(gradient, optimizer="sgd", momentum=0.0, clip=clip, clip_value=1.0)
    assert norm == pytest.approx(math.hypot(*gradient[0]))
    assert torch.allclose(weights, -torch.tensor(expected))


@pytest.mark.usefixtures("way")
def test_gradients_whose_squares_overflow_stay_finite():
    weights, norm = step([[1e30, -0.5]], clip="value", clip_value=1.0)
    assert norm == pytest.approx(1e30)
    assert torch.allclose(weights, torch.tensor([[-1.0, 1.0]])), "the first step of Adam: the sign times lr"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("clip", ["norm", "value", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_and_the_average_follow_their_equations(clip, dtype):
    """A naive reference: Loshchilov & Hutter 2019, algorithm 2, number by number."""
    torch.manual_seed(0)
    model, average = nn.Linear(7, 5).to(dtype), nn.Linear(7, 5).to(dtype)
    config = TrainConfig(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), clip=clip, clip_value=0.5, ema=0.5)
    optimizer = make_optimizer(model, config)
    w = torch.cat([each.detach().double().flatten() for each in model.parameters()])
    mean = torch.cat([each.detach().double().flatten() for each in average.parameters()])
    decay = torch.cat([torch.full((35,), 0.1), torch.zeros(5)]).double()
    m = v = torch.zeros(40, dtype=torch.double)
    for n in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        g = torch.cat([each.grad.double().flatten() for each in model.parameters()])
        norm = gradient_norm(model)
        update(model, optimizer, config, norm, average, n)
        assert norm == pytest.approx(g.square().sum().sqrt().item(), rel=1e-6)
        if clip == "norm":
            g = g * min(1.0, 0.5 / norm)
        elif clip == "value":
            g = g.clamp(-0.5, 0.5)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - 0.01 * (decay * w + m / (1 - 0.8 ** (n + 1)) / ((v / (1 - 0.9 ** (n + 1))).sqrt() + 1e-8))
        d = min(0.5, (1 + n) / (10 + n))
        mean = d * mean + (1 - d) * w
    for module, expected in ((model, w), (average, mean)):
        found = torch.cat([each.detach().double().flatten() for each in module.parameters()])
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-7)


@needs_kernels
def test_updates_do_not_depend_on_the_number_of_threads(threads):
    found = []
    for count in (1, 2):
        torch.manual_seed(0)
        model = nn.Linear(300, 301)
        threads(count)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        config, norm = TrainConfig(), gradient_norm(model)
        update(model, make_optimizer(model, config), config, norm, model, 0)
        found.append((norm, model.weight.detach().clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.usefixtures("way")
def test_initial_weights_are_forgotten_by_the_average():
    torch.manual_seed(0)
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    config = TrainConfig(ema=0.999, lr=1e-12)
    optimizer = make_optimizer(model, config)
    for n in range(30):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        update(model, optimizer, config, gradient_norm(model), average, n)
    assert torch.allclose(average.weight, model.weight, atol=1e-5)
