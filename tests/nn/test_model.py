import pytest
import torch

from charlm.config import ModelConfig
from charlm.nn.kernels.native import kernels
from charlm.nn.model import CharLM, FillLM, make_model, num_parameters

V, B, T = 11, 3, 6


def make(**options):
    return CharLM(V, ModelConfig(**{"hidden_size": 8, "embedding_size": 5, **options})).initialise(4).eval()


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("init", ["default", "xavier", "orthogonal", "normal"])
def test_implementations_have_the_same_initial_weights(cell, init):
    builtin, *others = (
        make(cell=cell, init=init, num_layers=2, implementation=i) for i in ("builtin", "scratch", "fused")
    )
    names = [name for name, _ in builtin.named_parameters()]
    x = torch.randint(V, (B, T))
    for model in others:
        assert [name for name, _ in model.named_parameters()] == names
        for ours, theirs in zip(model.parameters(), builtin.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        ours, theirs = (m(x, m.initial_state(B))[0] for m in (model, builtin))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("implementation", ["builtin", "scratch", "fused"])
def test_two_calls_with_the_state_between_equal_one_call(cell, implementation):
    model = make(cell=cell, implementation=implementation, num_layers=2)
    x = torch.randint(V, (B, T))
    whole, last = model(x, model.initial_state(B))
    first, state = model(x[:, :2], model.initial_state(B))
    second, end = model(x[:, 2:], state)
    assert whole.shape == (B, T, V)
    assert all(s.shape == (2, B, 8) for s in last)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(last, end, strict=True))


@pytest.mark.parametrize("implementation", ["builtin", "scratch", "fused"])
@pytest.mark.parametrize("length", [1, T])  # fewer characters than the vocabulary has, and more
def test_one_hot_equals_an_identity_embedding(implementation, length):
    one_hot = make(input="one_hot", implementation=implementation)
    embedding = make(input="embedding", embedding_size=V, implementation=implementation)
    embedding.load_state_dict({**one_hot.state_dict(), "embedding.weight": torch.eye(V)})
    x = torch.randint(V, (B, length))
    assert torch.allclose(
        one_hot(x, one_hot.initial_state(B))[0], embedding(x, embedding.initial_state(B))[0], atol=1e-6
    )


def test_tied_weights_are_one_tensor():
    tied, free = (make(embedding_size=8, tie_weights=t) for t in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert num_parameters(free) - num_parameters(tied) == V * 8


@torch.no_grad()
def test_initial_weights_have_their_distributions():
    big = {"hidden_size": 64, "cell": "lstm", "input": "one_hot"}
    normal = make(init="normal", **big, forget_bias=None)
    assert normal.recurrent.weight_hh_l0.std() == pytest.approx(0.01, rel=0.05)
    assert normal.head.weight.std() == pytest.approx(0.01, rel=0.1)
    assert not normal.recurrent.bias_ih_l0.any() and not normal.head.bias.any()
    default = make(init="default", **big, forget_bias=None)
    assert 0.12 < default.recurrent.weight_hh_l0.abs().max() <= 64**-0.5 == 0.125
    assert default.recurrent.bias_ih_l0.any()
    for gate in make(init="orthogonal", **big).recurrent.weight_hh_l0.chunk(4):
        assert torch.allclose(gate @ gate.T, torch.eye(64), atol=1e-5)
    for gate in make(init="xavier", **big).recurrent.weight_hh_l0.chunk(4):
        assert 0.9 < gate.abs().max() / (6 / 128) ** 0.5 <= 1, "the bound is a gate's, not all four's"


def test_forget_bias_is_the_sum_of_both_vectors():
    model = make(num_layers=2, forget_bias=1.5)
    for k in range(2):
        total = model.recurrent.get_parameter(f"bias_ih_l{k}") + model.recurrent.get_parameter(
            f"bias_hh_l{k}"
        )
        assert torch.equal(total[8:16], torch.full((8,), 1.5))
        assert not torch.equal(total[:8], torch.full((8,), 1.5))


def test_two_seeds_give_different_weights():
    first, second = (CharLM(V, ModelConfig()).initialise(seed) for seed in (1, 2))
    assert not torch.equal(first.head.weight, second.head.weight)


@pytest.fixture(params=[("rnn", "scratch"), ("lstm", "builtin"), ("lstm", "scratch"), ("gru", "fused")])
def filling(request):
    cell, implementation = request.param
    config = ModelConfig(
        cell=cell,
        implementation=implementation,
        direction="both",
        num_layers=2,
        hidden_size=8,
        embedding_size=5,
    )
    return make_model(V, config).initialise(4).double().eval()


def test_logits_of_a_filling_model_do_not_depend_on_their_own_character(filling):
    x = torch.randint(V, (B, T))
    logits, _ = filling(x, filling.initial_state(B))
    for t in range(T):
        other = x.clone()
        other[:, t] = (x[:, t] + 1) % V
        changed, _ = filling(other, filling.initial_state(B))
        assert torch.equal(changed[:, t], logits[:, t]), "character t is not read"
        for neighbour in {max(t - 1, 0), min(t + 1, T - 1), 0, T - 1} - {t}:
            assert not torch.equal(changed[:, neighbour], logits[:, neighbour]), "every other character is"


def test_filling_model_reads_each_side_with_its_own_stack(filling):
    x = torch.randint(V, (1, T))
    logits, _ = filling(x, filling.initial_state(1))
    half = len(filling.initial_state(1)) // 2
    left, right = filling.initial_state(1)[:half], filling.initial_state(1)[half:]
    t = 2
    _, left = filling.recurrent(filling.embed(x[:, :t]), left)
    _, right = filling.reverse(filling.embed(x[:, t + 1 :].flip(1)), right)
    expected = filling.head(torch.cat([left[0][-1], right[0][-1]], -1))
    assert torch.allclose(logits[:, t], expected, atol=1e-12)


def test_filling_model_predicts_the_whole_window():
    model = make_model(V, ModelConfig(direction="both", hidden_size=4, embedding_size=3)).initialise(0)
    x, y = torch.arange(6)[None], torch.arange(1, 7)[None]
    logits, targets, _ = model.predict(x, y, model.initial_state(1))
    assert isinstance(model, FillLM) and logits.shape == (1, 7, V) and targets.tolist() == [list(range(7))]


REGULARISED = {"locked_dropout": True, "dropout": 0.4, "weight_dropout": 0.4, "embedding_dropout": 0.4}


@pytest.mark.parametrize("options", [{}, {"embedding_size": 8, "tie_weights": True}, {"direction": "both"}])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_regularised_implementations_agree_and_eval_turns_regularisers_off(cell, options):
    options = {"cell": cell, "num_layers": 2, "hidden_size": 8, "embedding_size": 5, **options}
    builtin, scratch, plain = (
        make_model(V, ModelConfig(implementation=i, **options, **regularisers)).initialise(4).double()
        for i, regularisers in (("builtin", REGULARISED), ("scratch", REGULARISED), ("builtin", {}))
    )
    x = torch.randint(V, (B, T))
    outputs = []
    for model in (builtin, scratch):
        torch.manual_seed(1)
        outputs.append(model(x, model.initial_state(B))[0])
    assert torch.allclose(*outputs, atol=1e-12)
    assert not torch.allclose(outputs[0], builtin(x, builtin.initial_state(B))[0])
    evaluated = [model.eval()(x, model.initial_state(B))[0] for model in (builtin, scratch, plain)]
    assert all(torch.allclose(logits, evaluated[2], atol=1e-12) for logits in evaluated)
    for ours, theirs in zip(builtin.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), "the same initial weights"


@pytest.mark.parametrize("both_ways", [False, True])
def test_locked_dropout_before_the_head_is_the_same_at_every_step(both_ways):
    config = ModelConfig(
        locked_dropout=True, dropout=0.5, hidden_size=8, direction="both" if both_ways else "forward"
    )
    model = make_model(V, config).initialise(4)
    read = []
    model.head.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    # A state of ones: a filling model's head reads the state itself first and last, and 0 would look dropped.
    model(torch.randint(V, (B, T)), tuple(torch.ones_like(s) for s in model.initial_state(B)))
    dropped = read[0] == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 0 < dropped.sum() < dropped.numel() and not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("kind", ["embedding", "one_hot"])
def test_embedding_dropout_drops_a_character_everywhere_in_the_batch(kind):
    model = make(input=kind, embedding_dropout=0.4, implementation="builtin")
    full = model.embedding_table()
    x = torch.randint(V, (B, 50))
    assert torch.equal(model.embed(x), full[x])
    embedded = model.train().embed(x)
    dropped = (embedded == 0).all(-1)
    assert 0 < dropped.sum() < dropped.numel()
    for character in range(V):
        assert len(dropped[x == character].unique()) == 1, "a character is dropped everywhere or nowhere"
    assert torch.allclose(embedded[~dropped], full[x][~dropped] / 0.6)
    fused = make(input=kind, embedding_dropout=0.4, implementation="fused").train()
    if kernels(torch.float32):
        assert (fused.embed(x).table == 0).all(-1).any(), "rows of the table are dropped"


def test_regularisers_are_off_by_default():
    config = ModelConfig()
    off = (config.locked_dropout, config.weight_dropout, config.embedding_dropout)
    assert off == (False, 0, 0)
