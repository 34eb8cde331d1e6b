"""A stepper against its model, with compiled steps and with torch's."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from charlm.config import ModelConfig
from charlm.errors import ConfigError
from charlm.nn.kernels import native
from charlm.nn.kernels.native import kernels
from charlm.nn.model import CharLM, FillLM
from charlm.nn.stepper import Stepper, quantised

V, H, B = 11, 19, 6  # no multiples of a vector's length; rows that are computed four and one at a time
CELLS = [
    {"cell": "rnn"},
    {"cell": "rnn", "nonlinearity": "relu"},
    {"cell": "lstm"},
    {"cell": "gru"},
    {"cell": "gru", "gru_reset": "before", "implementation": "scratch"},
]
needs_kernels = pytest.mark.skipif(kernels(torch.float32) is None, reason="needs a C compiler")


@pytest.fixture(params=["kernels", "torch"])
def steps(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda dtype: None)
    elif kernels(torch.float64) is None:
        pytest.skip("there is no C compiler here")
    return request.param


def make(dtype=torch.float64, **options):
    config = ModelConfig(**{"hidden_size": H, "embedding_size": 5, **options})
    return CharLM(V, config).initialise(3).to(dtype).eval()


def run(step, model, batch=B, length=9):
    """The logits (T, B, V) of `length` steps from a state that is not zero, and the state after them."""
    generator = torch.Generator().manual_seed(1)
    dtype = model.head.weight.dtype
    ids = torch.randint(V, (length, batch), generator=generator)
    state = tuple(torch.randn(t.shape, generator=generator).to(dtype) / 2 for t in model.initial_state(batch))
    logits = []
    with torch.no_grad():
        for row in ids:
            out, state = step(row, state)
            logits.append(out)
    return torch.stack(logits), *state


def by_itself(model):
    def step(ids, state):
        logits, state = model(ids[:, None], state)
        return logits[:, -1], state

    return step


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(cell.values()))
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("more", [{}, {"input": "one_hot"}, {"tie_weights": True, "embedding_size": H}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_stepper_equals_the_model(steps, cell, layers, more, dtype, tolerance):
    model = make(dtype, num_layers=layers, **cell, **more)
    for mine, its in zip(run(Stepper(model).step, model), run(by_itself(model), model), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("how", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_quantised_stepper_equals_a_model_with_the_quantised_weights(steps, cell, how, dtype):
    model = make(dtype, cell=cell, num_layers=2)
    found = run(Stepper(model, how).step, model)
    with torch.no_grad():
        for name, W in model.named_parameters():
            if "weight" in name and name not in ("embedding.weight", "recurrent.weight_ih_l0"):
                W.copy_(quantised(W, how).wide(dtype))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for mine, its in zip(found, run(by_itself(model), model), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("how", "share"), [("bf16", 1 / 256), ("int8", 1 / 254)])
def test_quantisation_error_is_bounded(how, share):
    W = torch.randn(30, 40) * torch.logspace(-9, 3, 30)[:, None]
    W[3] = 0
    error = (quantised(W, how).wide(torch.float32) - W).abs()
    # relative to the row's largest number, in bf16 to each number
    assert (error <= 1.001 * share * (W.abs() if how == "bf16" else W.abs().amax(1, keepdim=True))).all()


@needs_kernels
@pytest.mark.parametrize("how", [None, "bf16", "int8"])
@pytest.mark.parametrize("hidden", [H, 64])
def test_logits_of_a_row_do_not_depend_on_the_batch(how, hidden):
    model = make(torch.float32, hidden_size=hidden, num_layers=2)
    together, *_ = run(Stepper(model, how).step, model, batch=7)
    stepper = Stepper(model, how)

    def one_by_one(ids, state):
        rows = [stepper.step(ids[b : b + 1], tuple(t[:, b : b + 1] for t in state)) for b in range(len(ids))]
        logits, states = zip(*rows, strict=True)
        return torch.cat(logits), tuple(torch.cat(t, 1) for t in zip(*states, strict=True))

    assert torch.equal(run(one_by_one, model, batch=7)[0], together)


def test_step_does_not_change_the_state_it_receives(steps):
    model = make()
    stepper, state, ids = Stepper(model), model.initial_state(2), torch.tensor([1, 2])
    first, after = stepper.step(ids, state)
    kept = tuple(tensor.clone() for tensor in after)
    assert not any(tensor.any() for tensor in state)
    stepper.step(ids, after)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(after, kept, strict=True))
    assert torch.equal(stepper.step(ids, state)[0], first)


def test_ids_out_of_range_raise_an_error(steps):
    model = make()
    for wrong in (V, -1):
        with pytest.raises(IndexError):
            Stepper(model).step(torch.tensor([wrong]), model.initial_state(1))


def test_unsupported_models_raise_an_error():
    with pytest.raises(ConfigError, match="gru_reset: before"):
        Stepper(make(cell="gru", gru_reset="before", implementation="scratch"), "int8")
    with pytest.raises(ConfigError, match="direction"):
        Stepper(FillLM(V, ModelConfig(hidden_size=H, direction="both")))
    with torch.device("meta"):
        elsewhere = CharLM(V, ModelConfig(hidden_size=H))
    with pytest.raises(ConfigError, match="meta"):
        Stepper(elsewhere, "int8")


@needs_kernels
def test_threads_can_share_a_stepper():
    model = make(torch.float32, cell="lstm", hidden_size=128, num_layers=2)
    stepper = Stepper(model)
    ids = [torch.randint(V, (2,), generator=torch.Generator().manual_seed(k)) for k in range(2)]
    alone = [stepper.step(each, model.initial_state(2))[0] for each in ids]

    def same(k):
        return all(torch.equal(stepper.step(ids[k], model.initial_state(2))[0], alone[k]) for _ in range(500))

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(same, range(2)))
