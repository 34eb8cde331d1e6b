"""The README says what is so."""

import re

from charlm.config import Config, from_data, parse_yaml
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_configuration_it_shows_is_the_whole_of_the_defaults():
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    data = parse_yaml(block, "README.md")
    assert from_data(data, "README.md") == Config()
    assert {section: set(values) for section, values in data.items()} == {
        section: set(values) for section, values in Config().model_dump().items()
    }


def test_it_names_every_recipe_and_module():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.name}`" in README
    for path in (ROOT / "src/charlm").glob("*.py"):
        assert f"  {path.name} " in README or path.name.startswith("__")


def test_its_python_runs(charlm, trained):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(
        block.replace("runs/first", "runs/tiny")
        .replace("don quijote y sancho", "abc")
        .replace("quijote ", "abc")
    )
