"""The package's order: a module imports only from rows above its own, and no torch before it is needed."""

import ast
import subprocess
import sys

from conftest import ROOT

ROWS = {
    "__init__": 0,
    "errors": 0,
    "resources": 0,
    "config": 1,
    "metrics": 1,
    "text": 1,
    "clean": 1,
    "stream": 2,
    "files": 1,
    "json_text": 1,
    "device": 1,
    "native": 1,
    "header": 2,
    "statefile": 2,
    "char_rnn": 1,
    "torchfile": 1,
    "vocab": 2,
    "foreign": 2,
    "cells": 2,
    "fused": 2,
    "dropout": 2,
    "optim": 2,
    "encode": 3,
    "cache": 4,
    "corpus": 5,
    "recurrent": 3,
    "batches": 4,
    "model": 4,
    "distributed": 5,
    "stepper": 5,
    "completion": 2,
    "sample": 6,
    "segments": 5,
    "evaluate": 6,
    "novelty": 6,
    "score": 7,
    "report": 8,
    "checkpoint": 5,
    "runs": 5,
    "progress": 5,
    "logs": 6,
    "tensorboard": 6,
    "onnx_graph": 6,
    "importing": 6,
    "plot": 7,
    "train": 7,
    "api": 7,
    "export": 7,
    "scheduled": 5,
    "gradcheck": 5,
    "gradflow": 5,
    "fill": 5,
    "resume": 2,
    "signals": 1,
    "learner": 6,
    "saves": 6,
    "interactive": 8,
    "compare": 8,
    "bench": 8,
    "cli_options": 8,
    "cli_logs": 9,
    "cli_score": 9,
    "cli_look": 9,
    "cli_train": 9,
    "cli_use": 9,
    "cli_study": 9,
    "cli_share": 9,
    "cli": 10,
    "__main__": 11,
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "charlm":
            yield from (alias.name if alias.name in ROWS else "__init__" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("charlm."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("charlm."))


def test_modules_import_from_rows_above():
    modules = {path.stem: path for path in (ROOT / "src/charlm").glob("*.py")}
    assert modules.keys() == ROWS.keys(), "every module has a row"
    wrong = [
        f"{name} imports {other}"
        for name, path in modules.items()
        for other in imported(path)
        if name != "__init__"  # what it hands on is imported when it is asked for
        and not ROWS[other] < ROWS[name]
    ]
    assert not wrong


def test_help_imports_no_torch():
    code = "import sys, charlm.cli; charlm.cli.main(['train', '--help']); "
    code += "sys.exit('torch' in sys.modules or not charlm.load)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--resume" in done.stdout, done.stderr
