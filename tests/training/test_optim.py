import math

import pytest
import torch
from torch import nn

from charlm.config import TrainConfig
from charlm.training.optim import clip_gradients, lr_factor, make_optimizer, make_plateau, update_average


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


@pytest.mark.parametrize(
    ("clip", "expected"), [("norm", [[0.6, -0.8]]), ("value", [[1.0, -1.0]]), ("none", [[3.0, -4.0]])]
)
def test_clipping_limits_large_gradients_only(clip, expected):
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, -4.0]])
    assert clip_gradients(model, TrainConfig(clip=clip, clip_value=1.0)) == 5
    assert torch.allclose(model.weight.grad, torch.tensor(expected))
    model.weight.grad = torch.tensor([[0.3, -0.4]])
    clip_gradients(model, TrainConfig(clip=clip))
    assert torch.equal(model.weight.grad, torch.tensor([[0.3, -0.4]])), "small gradients do not change"


@pytest.mark.parametrize(("clip", "expected"), [("value", [[1.0, -0.5]]), ("none", [[1e30, -0.5]])])
def test_gradients_whose_squares_overflow_stay_finite(clip, expected):
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[1e30, -0.5]])
    assert clip_gradients(model, TrainConfig(clip=clip, clip_value=1.0)).item() == pytest.approx(1e30)
    assert torch.equal(model.weight.grad, torch.tensor(expected))


@pytest.mark.parametrize(("decay", "steps"), [(0.5, 30), (0.999, 30)])
def test_average_is_that_of_all_weights_so_far(decay, steps):
    torch.manual_seed(0)
    model, average = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    expected = average.weight.tolist()
    for n in range(steps):
        nn.init.normal_(model.weight)
        update_average(average, model, decay, n)
        d = min(decay, (1 + n) / (10 + n))
        for i, row in enumerate(model.weight.tolist()):
            for j, weight in enumerate(row):
                expected[i][j] = d * expected[i][j] + (1 - d) * weight
    assert torch.allclose(average.weight, torch.tensor(expected, dtype=torch.double), atol=1e-12)
    assert torch.allclose(average.bias, model.bias, atol=1e-6), "the initial weights are forgotten"
