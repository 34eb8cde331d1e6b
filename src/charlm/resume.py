"""What may change when a run is resumed: the differences of two configurations, and what becomes of them."""

from typing import Any

from charlm.config import Config, ModelConfig
from charlm.errors import ConfigError

# A run goes on as it began, but for its budget, its device, and where its text now is.
FREE = (
    *("train.epochs", "train.max_steps", "train.early_stopping", "train.device", "train.tensorboard"),
    "corpus.source",
)

# Steps are not the same steps after these: the epoch is begun again.
REORDERING = {
    *(f"batches.{key}" for key in ("sampling", "batch_size", "seq_len", "stride", "shuffle", "truncation")),
    "batches.max_train_windows",
    "train.seed",
}

_ADAPTABLE = {  # of the model's keys, those that another value can go on from
    f"model.{key}"
    for key in ("implementation", "dropout", "locked_dropout", "weight_dropout", "embedding_dropout")
}
_IMPOSSIBLE = {
    **{f"model.{key}": "the weights are those of another model" for key in ModelConfig.model_fields},
    **{f"model.{key}": "it takes effect at the beginning only" for key in ("init", "forget_bias")},
    "train.optimizer": "what one optimiser has gathered is nothing to another",
}


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The keys, as section.key, in which two configurations differ, each with its two values."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {
        f"{section}.{key}": (old[section][key], value)
        for section, values in new.items()
        for key, value in values.items()
        if value != old[section][key]
    }


def refuse_changes(before: Config, after: Config, allow: bool) -> None:
    """Raise `ConfigError`, with all differences, where a run made from `before` is not to go on as `after`.

    allow: only what cannot be changed is refused, with the reason.
    """
    changed = {key: values for key, values in differences(before, after).items() if key not in FREE}
    if not allow and changed:
        raise ConfigError(
            f"--resume would change {_shown(changed)}; only {', '.join(FREE)} change freely: "
            "leave the rest as it was, or say --allow-changes"
        )
    impossible = {key: why for key in changed if (why := _why_impossible(key))}
    if impossible:
        reasons = ", ".join(f"{_shown({key: changed[key]})} ({why})" for key, why in impossible.items())
        raise ConfigError(f"--resume cannot change {reasons}; begin a new run for that")


def _why_impossible(key: str) -> str | None:
    if key.startswith("corpus."):
        return "the text would be another, and with it the vocabulary"
    return None if key in _ADAPTABLE else _IMPOSSIBLE.get(key)


def _shown(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}: {_text(old)} → {_text(new)}" for key, (old, new) in changed.items())


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
