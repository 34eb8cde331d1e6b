"""The commands that show what is configured and what is cached: config, cache."""

import textwrap

import click

from charlm.cli.options import json_option
from charlm.files import cache_entries, cache_limit, json_text, safe_cache_folder


@click.command("config")
@click.argument("names", nargs=-1, metavar="[KEY]...")
@json_option()
def show_config(names: tuple[str, ...], as_json: bool) -> None:
    """Show the keys of the configuration: default, allowed values, meaning.

    KEY is a section (corpus, batches, model, train), a key, or a key without its section; by default all are
    shown. A recipe sets them in YAML, --set KEY=VALUE on the command line.
    """
    from charlm.config import reference

    rows = reference(names)
    if as_json:
        fields = ("key", "default", "allowed", "description")
        shown = [{name: getattr(row, name) for name in fields} for row in rows]
        click.echo(json_text(shown, indent=2, ensure_ascii=False))
        return
    import shutil

    width = shutil.get_terminal_size().columns
    key_width = max(len(row.key) for row in rows) + 2
    default_width = max(len(row.default_text) for row in rows) + 2
    for row in rows:
        line = f"{row.key:<{key_width}}{row.default_text:<{default_width}}{row.allowed}"
        # A line too long for the terminal continues below its last column, if that is wide enough.
        indent = " " * (key_width + default_width if width - key_width - default_width >= 24 else 4)
        click.echo(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False))
        click.echo(textwrap.indent(textwrap.fill(row.description, width - 4), "    "))


@click.command("cache")
@click.option("--clear", is_flag=True, help="Remove all of it; the next run that needs it writes it again.")
def show_cache(clear: bool) -> None:
    """Show the cache: encoded long texts, compiled kernels, and the speeds of this machine.

    It is in $XDG_CACHE_HOME/charlm, by default ~/.cache/charlm. The texts are kept under 10 GB, or
    $CHARLM_CACHE_GB: the least recently used is removed when another is written.
    """
    from datetime import datetime

    folder, entries, limit = safe_cache_folder(), cache_entries(), cache_limit()
    for entry in entries:
        if clear:
            entry.path.unlink(missing_ok=True)
        else:
            used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
            click.echo(f"{entry.kind:<8} {_size(entry.size):>9}  {used}  {entry.path.relative_to(folder)}")
    texts, kernels, speeds = (
        [each.size for each in entries if each.kind == kind] for kind in ("text", "kernels", "speeds")
    )
    click.echo(
        f"{'removed from ' if clear else ''}{folder}: {len(texts)} texts, {_size(sum(texts))}"
        f"{'' if clear else f' of at most {_size(limit)}'}; {len(kernels)} kernels, {_size(sum(kernels))}"
        f"; {len(speeds)} speeds"
    )


def _size(count: int) -> str:
    return next(
        (f"{count / unit:.1f} {name}" for unit, name in ((10**9, "GB"), (10**6, "MB")) if count >= unit),
        f"{count / 1000:.1f} kB",
    )
