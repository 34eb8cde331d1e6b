"""Where the files that ship with charlm are: the recipes and the bundled corpus."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped(folder: str) -> Path:
    """The folder ``configs`` or ``data``: inside the installed package, or at the top of a checkout."""
    packaged = PACKAGE / folder
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / folder
