"""The notebooks in docs/ run from the first cell to the last, as a reader runs them.

Their cells are plain Python, with no magic in them, and are run here by `exec`: a kernel would bring thirty
packages and seconds of start-up, and would run the same lines.
"""

import ast
import json
import math

import pytest

from conftest import ROOT

PAGES = ["first-model.ipynb", "primer-modelo.ipynb"]


def code(page):
    """The sources of the code cells."""
    notebook = json.loads((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    found = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in found), (
        "kept without outputs"
    )
    return ["".join(cell["source"]) for cell in found]


@pytest.mark.parametrize("page", PAGES)
def test_a_notebook_runs(page, folder, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {"__name__": "__main__"}
    for cell in code(page):
        exec(compile(cell, page, "exec"), names)
    import matplotlib.pyplot as plt

    plt.close("all")
    shown = capsys.readouterr().out
    assert "--- 0.2\nSancho " in shown
    model, sentence, rows = names["model"], names["sentence"], names["rows"]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < math.log(len(model.vocab))
    assert model.perplexity(sentence) < model.perplexity(sentence[::-1]) / 2, "it has learnt some Spanish"
    assert names["hidden"].shape == (len(sentence), 64)


def test_both_have_the_same_code():
    def without_texts(page):
        trees = [ast.parse(cell) for cell in code(page)]
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        return [ast.dump(tree) for tree in trees]

    assert without_texts(PAGES[0]) == without_texts(PAGES[1])
