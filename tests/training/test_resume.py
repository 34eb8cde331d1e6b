import pytest

from charlm.config import Config, override
from charlm.errors import ConfigError
from charlm.training.learner import differences, refuse_changes


@pytest.mark.parametrize(
    ("changes", "allow", "refused"),
    [
        ([], False, None),
        (["train.epochs=50", "train.device=cpu", "train.log_every=7", "corpus.source=a.txt"], False, None),
        (
            ["train.lr=0.1", "model.dropout=0.5"],
            False,
            "model.dropout: 0.1 → 0.5, train.lr: 0.008 → 0.1;.*--allow-changes",
        ),
        (["train.lr=0.1", "model.dropout=0.5", "batches.batch_size=9", "train.ema=0.9"], True, None),
        (["model.hidden_size=5", "train.lr=0.1"], True, r"cannot change model.hidden_size: 192 → 5 \("),
        (["model.init=normal"], True, "default → normal"),
        (["corpus.lowercase=true"], True, "corpus.lowercase: false → true"),
        (["train.optimizer=sgd"], True, "adamw → sgd"),
        (["corpus.records=line"], True, "null → line"),
    ],
)
def test_changes_on_resume(changes, allow, refused):
    before = Config()
    after = override(before, changes)
    if refused is None:
        refuse_changes(before, after, allow)
    else:
        with pytest.raises(ConfigError, match=refused) as caught:
            refuse_changes(before, after, allow)
        assert "\n" not in str(caught.value)


def test_the_seed_of_records_cannot_change():
    before = override(Config(), ["corpus.records=line"])
    with pytest.raises(ConfigError, match="train.seed: 1 → 2"):
        refuse_changes(before, override(before, ["train.seed=2"]), True)
    refuse_changes(Config(), override(Config(), ["train.seed=2"]), True)


def test_differences_name_both_values():
    assert differences(Config(), override(Config(), ["train.ema=0.9"])) == {"train.ema": (None, 0.9)}
