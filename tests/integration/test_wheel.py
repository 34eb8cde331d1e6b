"""The wheel, installed in an empty environment outside the checkout, trains and generates."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from conftest import ROOT, settings


def test_wheel_trains_and_generates_outside_the_checkout(tmp_path):
    def run(*command):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    run(*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # torch and other dependencies come from this environment. Its .pth file, with this checkout, is not read.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    where = run(python, "-c", "import charlm; print(charlm.__file__)")
    assert str(tmp_path) in where
    charlm = tmp_path / "env/bin/charlm"
    run(charlm, "train", "--config", "gru.yaml", *settings("train.max_steps=2"))
    assert run(charlm, "generate", "--prefix", "quijote ", "-n", "9").startswith("quijote ")
