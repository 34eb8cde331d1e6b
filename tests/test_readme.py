"""The README says what is so."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_names_every_recipe():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.name}`" in README


def test_its_python_runs(charlm, trained):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(
        block.replace("runs/first", "runs/tiny")
        .replace("don quijote y sancho", "abc")
        .replace("quijote ", "abc")
    )


NOTEBOOKS = (ROOT / "docs/notebooks.md").read_text(encoding="utf-8")


def test_the_notebooks_page_names_what_exists():
    for name in re.findall(r"--config ([\w/-]+\.yaml)", NOTEBOOKS + README):
        assert (ROOT / "configs" / name).is_file(), name
    for name in re.findall(r"\b((?:benchmarks|tests)/\w+\.py)", NOTEBOOKS + README):
        assert (ROOT / name).is_file(), name
    for path in (ROOT / "configs/seeds").glob("*.yaml"):
        assert path.stem in NOTEBOOKS, path.stem


def test_the_rnn_by_hand_is_torch_s():
    (block,) = re.findall(r"```python\n(.*?)```", NOTEBOOKS, re.S)
    exec(block)  # it ends in an assertion
