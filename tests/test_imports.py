"""The order of the layers, and that torch is imported only when it is needed."""

import ast
import subprocess
import sys

from conftest import ROOT

LAYERS = [
    *({layer} for layer in ("errors", "metrics", "files", "config", "text", "nn", "storage", "inference")),
    {"training", "interop"},
    *({layer} for layer in ("api", "study", "cli", "__main__")),
]


def test_folders_import_from_their_left_only():
    rank = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in (ROOT / "src/charlm").rglob("*.py"):
        own = path.relative_to(ROOT / "src/charlm").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = (getattr(node, "module", None) or "").split(".")
            names = parts[1:2] or [getattr(alias, "name", "") for alias in getattr(node, "names", [])]
            for name in names if parts[0] == "charlm" else []:
                inside = name == own or own == "__init__"  # which imports what is asked for
                assert inside or rank.get(name, -1) < rank[own], f"{path} imports {name}"


def test_help_imports_no_torch():
    code = "import sys, charlm.cli; charlm.cli.main(['train', '--help']); "
    code += "sys.exit('torch' in sys.modules or not charlm.load)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--resume" in done.stdout, done.stderr
