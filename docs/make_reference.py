"""Write docs/reference.md, the help of every command: `make docs`."""

from pathlib import Path

import click

from charlm.cli import cli

HEAD = """# Reference

Every command, as `--help` shows it. This page is made by `make docs`.
"""
WIDTH = 88


def reference() -> str:
    """The whole page."""
    pages = [_page(cli, "charlm")]
    pages += [_page(command, f"charlm {name}") for name, command in sorted(cli.commands.items())]
    return "\n".join([HEAD, *pages])


def _page(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, **cli.context_settings)
    return f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"


if __name__ == "__main__":
    Path(__file__).with_name("reference.md").write_text(reference(), encoding="utf-8")
