"""docs/reference.md and the README's block of defaults are made from the code."""

import runpy

from charlm.config import KEYS, Config, from_data, parse_yaml
from conftest import ROOT

MADE = runpy.run_path(str(ROOT / "docs/make_reference.py"))


def test_the_reference_is_the_help_and_the_configuration():
    page = MADE["reference"]()
    assert page == (ROOT / "docs/reference.md").read_text(encoding="utf-8"), "write it again: make docs"
    assert "## charlm generate" in page and "| `train.lr` |" in page


def test_the_block_of_defaults_is_a_recipe_of_the_defaults():
    data = parse_yaml(MADE["defaults"](), "x")
    assert from_data(data, "x") == Config()
    assert [f"{section}.{key}" for section, values in data.items() for key in values] == KEYS


def test_the_readme_shows_the_defaults():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert MADE["readme"](text) == text, "write it again: make docs"
    assert "  hidden_size: 192" in text
