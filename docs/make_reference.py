"""Write what the documentation takes from the code: `make docs`.

That is docs/reference.md, with the help of every command and the table of the configuration, and the block of
defaults in README.md.
"""

import re
from pathlib import Path

import click

from charlm import config
from charlm.cli import cli

README = Path(__file__).parents[1] / "README.md"
HEAD = """# Reference

The help of every command, and the configuration. `make docs` writes this page.
"""
WIDTH = 88
BLOCK = re.compile(r"(?<=<!-- defaults -->\n\n).*?(?=\n<!-- /defaults -->)", re.S)


def reference() -> str:
    """Return docs/reference.md."""
    pages = [_page(cli, "charlm")]
    pages += [_page(command, f"charlm {name}") for name, command in sorted(cli.commands.items())]
    return "\n".join([HEAD, *pages, _table()])


def _page(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, **cli.context_settings)
    return f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"


def _table() -> str:
    rows = [
        f"| `{row.key}` | `{row.default_text}` | {row.allowed} | {row.description} |"
        for row in config.reference()
    ]
    return "\n".join(
        ["## Configuration", "", "| key | default | allowed | meaning |", "|---|---|---|---|", *rows, ""]
    )


def defaults() -> str:
    """Return the default configuration as a recipe, with the meaning of every key as a comment."""
    lines: list[str] = []
    for row in config.reference():
        section, name = row.key.split(".")
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        choices = f" ({', '.join(row.choices)})" if row.choices else ""
        lines.append(f"  {f'{name}: {row.default_text}':<26}  # {row.description}{choices}")
    return "\n".join(lines) + "\n"


def readme(text: str) -> str:
    """Return README.md, whose text is `text`, with the defaults of today between its markers."""
    return BLOCK.sub(lambda _: f"```yaml\n{defaults()}```\n", text)


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    Path(__file__).with_name("reference.md").write_text(reference(), encoding="utf-8")
