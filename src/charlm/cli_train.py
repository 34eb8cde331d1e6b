"""The command that trains."""

from pathlib import Path
from typing import Any

import click

from charlm.completion import complete_recipes, complete_runs, complete_settings
from charlm.errors import ConfigError


@click.command()
@click.option(
    "--config",
    "-c",
    "recipe",
    metavar="FILE",
    shell_complete=complete_recipes,
    help="A recipe: a path, or a name in ./configs or among those that ship.  [default: the defaults]",
)
@click.option(
    "--set",
    "-s",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete_settings,
    help="Override, as train.lr=2e-3.",
)
@click.option("--name", metavar="RUN", help="The run's name under runs/.  [default: RECIPE-DATE-TIME]")
@click.option("--resume", metavar="RUN", shell_complete=complete_runs, help="Go on with a run that stopped.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained and written; do nothing.")
def train(
    recipe: str | None, overrides: tuple[str, ...], name: str | None, resume: str | None, dry_run: bool
) -> None:
    """Train a model on a text.

    With no --config, an LSTM on the bundled Spanish corpus. The models, the log and the state to resume from
    are in runs/RUN. Ctrl-C finishes the step, saves and says how to go on.
    """
    from charlm import config as configuration
    from charlm import runs

    if resume:
        if recipe or name:
            raise ConfigError(
                "--resume goes on with a run's own configuration: give no --config and no --name"
            )
        run = runs.find_run(resume)
        before = run.load_config()
        config = configuration.override(before, overrides)
        _refuse_changes(before.model_dump(), config.model_dump())
    else:
        config = configuration.load(recipe, overrides)
        run = runs.new_run(name, Path(recipe).stem if recipe else config.model.cell)

    from charlm.corpus import Corpus
    from charlm.progress import TrainingDisplay
    from charlm.train import Trainer

    display = TrainingDisplay()
    trainer = Trainer(config, Corpus.load(config.corpus))
    if dry_run:
        click.echo(configuration.to_yaml(config))
        click.echo("\n".join(trainer.describe()))
        click.echo(
            f"would write {run.folder}/ with config.yaml, model.safetensors, last.safetensors, state.pt, "
            "metrics.jsonl"
        )
        return
    for line in trainer.describe():
        display.say(line)
    if resume:
        trainer.restore(run)
        if trainer.finished:
            raise ConfigError(
                f"the run {run.folder} is finished, at step {trainer.progress.step}, by {trainer.finished}; "
                "to train on, raise that with --set"
            )
        runs.save_config(run, config)
        display.say(f"resumed  {run.folder} at step {trainer.progress.step} of {trainer.total_steps}")
    else:
        run = runs.create(run, config, rename=name is None)
    result = trainer.train(run, display)
    display.finished(result.best, result.test, run.folder, trainer.suggested_prefix)


_CHANGEABLE = (
    "train.epochs", "train.max_steps", "train.early_stopping", "train.device", "train.tensorboard",
    "corpus.source",
)  # fmt: skip


def _refuse_changes(before: dict[str, Any], after: dict[str, Any]) -> None:
    """A run goes on as it began, but for its budget, its device, and where its text now is."""
    changed = [
        f"{section}.{key}"
        for section, values in after.items()
        for key, value in values.items()
        if value != before[section][key] and f"{section}.{key}" not in _CHANGEABLE
    ]
    if changed:
        raise ConfigError(
            f"--resume cannot change {', '.join(changed)}, only {', '.join(_CHANGEABLE)}; "
            "begin a new run for the rest"
        )
