import re
import subprocess
import sys

from conftest import ROOT


def test_killed_trainings_end_as_an_undisturbed_one():
    command = [
        sys.executable,
        ROOT / "tests/integration/kills.py",
        "--kills",
        "2",
        "--seed",
        "3",
        "diverging",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"diverging +[2-9] kills.*all as undisturbed", done.stdout), done.stdout
