"""docs/reference.md is what the commands say of themselves."""

import runpy

from conftest import ROOT


def test_the_reference_is_the_help():
    made = runpy.run_path(str(ROOT / "docs/make_reference.py"))["reference"]()
    assert made == (ROOT / "docs/reference.md").read_text(encoding="utf-8"), "write it again: make docs"
    assert "## charlm generate" in made
