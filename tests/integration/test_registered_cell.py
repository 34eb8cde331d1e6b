"""A cell that is not in the package: registered, checked, trained, saved, loaded and written with."""

import itertools

import pytest
import torch
from torch.nn.functional import linear

from charlm import config
from charlm.config import ModelConfig
from charlm.errors import CharlmError, ConfigError
from charlm.inference.sample import Sampling, generate
from charlm.interop.export import ENDINGS, check_format
from charlm.nn import cells
from charlm.nn.model import make_model
from charlm.storage.model_file import load_model, save_model
from charlm.study.gradcheck import gradcheck
from charlm.text.corpus import Corpus
from charlm.training.learner import Learner


def mgu(a, state, W_hh, b_hh):
    """One step of the minimal gated unit (Zhou et al. 2016): h_t = (1 - f) ⊙ n + f ⊙ h_{t-1}."""
    (h,), H = state, W_hh.shape[1]
    f = torch.sigmoid(a[..., :H] + linear(h, W_hh[:H], b_hh[:H]))
    n = torch.tanh(a[..., H:] + linear(f * h, W_hh[H:], b_hh[H:]))
    return ((1 - f) * n + f * h,)


@pytest.fixture
def recipe():
    """The configuration of a model of the registered cell; the registry is restored afterwards."""
    cells.register(cells.Cell("mgu", gates=2, step=mgu, forget_gate=0))
    yield config.load(None, ["model.cell=mgu", "model.hidden_size=8", "batches.batch_size=2", "train.lr=0.1"])
    del cells.CELLS["mgu"]
    config.CELL_NAMES.remove("mgu")


def test_registered_cell_is_trained_saved_loaded_and_written_with(recipe, tmp_path):
    assert all(check.relative_error < 1e-6 for check in gradcheck(recipe))
    learner = Learner(recipe, Corpus.from_text("ab " * 400))
    first = learner.model.recurrent.weight_hh_l0.clone()
    for x, y in itertools.islice(learner.remaining_batches(), 3):
        learner.step(x, y)
    assert not torch.equal(learner.model.recurrent.weight_hh_l0, first)
    save_model(tmp_path / "m", learner.model, learner.corpus.vocab, recipe, {})
    loaded = load_model(tmp_path / "m")
    texts = [
        list(generate(model.eval(), loaded.vocab, loaded.vocab.encode("ab"), 20, Sampling(temperature=0)))
        for model in (learner.model, loaded.model)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 20


@pytest.mark.parametrize("implementation", ["builtin", "fused"])
def test_registered_cell_has_no_other_implementation(recipe, implementation):
    with pytest.raises(ConfigError, match=f"{implementation}.*mgu.*scratch"):
        make_model(9, ModelConfig(cell="mgu", implementation=implementation))


@pytest.mark.parametrize("to", ENDINGS)
def test_registered_cell_is_not_exported(recipe, to):
    with pytest.raises(CharlmError, match="mgu"):
        check_format(to, recipe)


def test_registering_a_name_twice_is_refused(recipe):
    with pytest.raises(ValueError, match="mgu"):
        cells.register(cells.CELLS["mgu"])
