"""docs/reference.md and the README's block of defaults are made from the code."""

import runpy

from conftest import ROOT

MADE = runpy.run_path(str(ROOT / "docs/make_reference.py"))


def test_the_reference_is_the_help_and_the_configuration():
    page = MADE["reference"]()
    assert page == (ROOT / "docs/reference.md").read_text(encoding="utf-8"), "write it again: make docs"
    assert "## charlm generate" in page and "| `train.lr` |" in page


def test_the_readme_shows_the_defaults():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert MADE["readme"](text) == text, "write it again: make docs"
    assert "  hidden_size: 192" in text
