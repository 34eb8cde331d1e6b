"""The command that trains."""

import contextlib
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
@click.option("--at", type=click.IntRange(min=0), metavar="STEP", help="Resume at an earlier, kept save.")
@click.option("--allow-changes", is_flag=True, help="Resume with other settings, as far as they fit.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained and written; do nothing.")
def train(
    recipe: str | None,
    overrides: tuple[str, ...],
    name: str | None,
    resume: str | None,
    at: int | None,
    allow_changes: bool,
    dry_run: bool,
) -> None:
    """Train a model on a text.

    With no --config, an LSTM on the bundled Spanish corpus. The models, the log and the state to resume from
    are in runs/RUN. Ctrl-C finishes the step, saves and says how to go on; a second one stops at once.

    torchrun --nproc-per-node 2 -m charlm train ... trains with two processes, each on its share of the data.
    """
    if not resume and (at is not None or allow_changes):
        raise ConfigError("--at and --allow-changes go with --resume RUN")

    from charlm import config as configuration
    from charlm import runs
    from charlm.corpus import Corpus
    from charlm.distributed import joined
    from charlm.progress import TrainingDisplay
    from charlm.train import Trainer

    with joined() as group, contextlib.ExitStack() as held:
        data, folder = group.told(
            lambda: _prepare(recipe, overrides, name, resume, at, allow_changes, group.size)
        )
        config, run = configuration.from_data(data, ""), runs.Run(Path(folder))
        display = TrainingDisplay(silent=not group.first)
        corpus = group.in_turn(lambda: Corpus.load(config.corpus, display.reading))
        group.check_same("text", corpus.fingerprint)
        trainer = Trainer(config, corpus, group)
        learner = trainer.learner
        if dry_run:
            if group.first:
                click.echo(configuration.to_yaml(config))
                click.echo("\n".join(trainer.describe()))
                click.echo(
                    f"would write {run.folder}/ with config.yaml, model.safetensors, last.safetensors, "
                    "state.pt, metrics.jsonl"
                )
            return
        for line in trainer.describe():
            display.say(line)
        if not resume:
            folder = group.told(lambda: str(runs.create(run, config, rename=name is None).folder))
            run = runs.Run(Path(folder))
        if group.first:
            held.enter_context(runs.lock(run))
        if resume:
            trainer.restore(run, at)
            if learner.progress.concluded and learner.finished:
                raise ConfigError(
                    f"the run {run.folder} is finished, at step {learner.progress.step}, "
                    f"by {learner.finished}; to train on, raise that with --set"
                )
            group.told(lambda: runs.save_config(run, config))
            display.say(f"resumed  {run.folder} at step {learner.progress.step} of {learner.total_steps}")
        result = trainer.train(run, display)
        if group.first:
            display.finished(result.best, result.test, run.folder, trainer.suggested_prefix)


def _prepare(
    recipe: str | None,
    overrides: tuple[str, ...],
    name: str | None,
    resume: str | None,
    at: int | None,
    allow_changes: bool,
    processes: int,
) -> tuple[dict[str, Any], str]:
    """The configuration to train with, as data, and the run's folder."""
    from charlm import config as configuration
    from charlm import runs
    from charlm.resume import refuse_changes

    if not resume:
        config = configuration.load(recipe, overrides)
        run = runs.new_run(name, Path(recipe).stem if recipe else config.model.cell)
        return config.model_dump(mode="json"), str(run.folder)
    if recipe or name:
        raise ConfigError("--resume goes on with a run's own configuration: give no --config and no --name")
    run = runs.find_run(resume)
    before = run.load_config()
    if run.begun:
        sequences = (run if at is None else run.kept(at)).load_state()["sequences"]
        if sequences % processes:
            raise ConfigError(
                f"the run {run.folder} reads {sequences} sequences a step, which {processes} processes "
                "cannot share evenly; start a number of processes that divides it"
            )
        before = configuration.override(before, [f"batches.batch_size={sequences // processes}"])
    config = configuration.override(before, overrides)
    refuse_changes(before, config, allow_changes)
    return config.model_dump(mode="json"), str(run.folder)
