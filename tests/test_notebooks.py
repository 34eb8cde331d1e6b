"""The notebooks in docs/ run from the first cell to the last, and the names that the docs mention exist.

The cells are plain Python without magics, so `exec` runs them without the dependencies of a kernel.
"""

import ast
import importlib
import json
import operator
import re

import pytest

from conftest import ROOT

PAGES = ["first-model.ipynb", "primer-modelo.ipynb"]


def code(page):
    """Return the sources of the code cells."""
    notebook = json.loads((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    found = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in found), (
        "notebooks are committed without outputs"
    )
    return ["".join(cell["source"]) for cell in found]


@pytest.mark.parametrize("page", PAGES)
def test_notebook_runs(page, folder, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {"__name__": "__main__"}
    for cell in code(page):
        exec(compile(cell, page, "exec"), names)
    import matplotlib.pyplot as plt

    plt.close("all")
    shown = capsys.readouterr().out
    assert "--- 0.2\nSancho " in shown
    model, sentence, rows = names["model"], names["sentence"], names["rows"]
    assert [row["epoch"] for row in rows][-1] == 3 and model.perplexity(sentence) > 1
    assert names["hidden"].shape == (len(sentence), 64)


def test_notebooks_have_the_same_code():
    def without_texts(page):
        trees = [ast.parse(cell) for cell in code(page)]
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        return [ast.dump(tree) for tree in trees]

    assert without_texts(PAGES[0]) == without_texts(PAGES[1])


DOCS = [path for path in sorted((ROOT / "docs").iterdir()) if path.suffix in (".md", ".ipynb")]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_names_in_the_docs_exist(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for file in re.findall(r"`((?:charlm|tests|benchmarks|configs)/[\w/.-]+)`", text):
        assert (ROOT / "src" / file if file.startswith("charlm/") else ROOT / file).exists(), file
    for names, module in re.findall(r"(`[\w.]+`(?:(?:, | and )`[\w.]+`)*) in `(charlm/[\w/]+)\.py`", text):
        for name in re.findall(r"[\w.]+(?=`)", names):
            operator.attrgetter(name)(importlib.import_module(module.replace("/", ".")))
