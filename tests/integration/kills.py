"""Kill trainings at random moments, resume them, and compare the results with an undisturbed training.

    python tests/integration/kills.py --kills 100 --signals 20 --faults

torch is imported once and a process is forked for each training, so that a training takes a second. The
process is killed at a random time, or before a random one of its file operations. At the end, both models
must have the same bytes, and the log and the state must be equal except for their times.
"""

import argparse
import codecs
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # optimisers import it, which takes two seconds

from charlm.cli import main
from charlm.nn.kernels import native
from charlm.storage.model_file import load_model
from charlm.storage.run import Run
from charlm.training import trainer as train  # noqa: F401 - the forked processes do not import it again

TINY = {
    "corpus.source": "corpus.txt",
    "batches.batch_size": 4,
    "batches.seq_len": 8,
    "batches.stride": 8,
    "model.hidden_size": 12,
    "model.embedding_size": 5,
    "model.dropout": 0.3,
    "train.precision": "float32",
    "train.device": "cpu",
    "train.max_steps": 24,
    "train.eval_every": 7,
    "train.checkpoint_every": 3,
    "train.sample_chars": 12,
}
STREAMS = {"batches.sampling": "contiguous"}
SETTINGS = {
    "windows scratch": {"model.implementation": "scratch"},
    "windows builtin": {"model.implementation": "builtin", "train.keep_last": 3},
    "windows fused": {"model.implementation": "fused", "train.schedule": "plateau", "train.lr": 0.1},
    "streams scratch": {**STREAMS, "model.implementation": "scratch", "train.ema": 0.9},
    "streams builtin": {**STREAMS, "model.implementation": "builtin", "train.checkpoint_every": "0.02s"},
    "streams fused": {**STREAMS, "model.implementation": "fused", "model.cell": "gru", "train.keep_last": 2},
    # With this learning rate the loss becomes infinite: steps are skipped, and the run rolls back.
    "diverging": {
        "model.implementation": "builtin",
        "model.cell": "rnn",
        "model.nonlinearity": "relu",
        "train.optimizer": "sgd",
        "train.schedule": "constant",
        "train.clip": "none",
        "train.lr": 100.0,
        "train.max_bad_steps": 2,
        "train.max_rollbacks": 6,
    },
}
_FILE_OPERATIONS = {
    "open", "os.rename", "os.remove", "os.truncate", "os.link", "os.mkdir", "os.rmdir",
}  # fmt: skip


class Training:
    """A process that trains in `folder`; it resumes the run in it, if there is one."""

    def __init__(self, folder, setting, die_at=0, prepare=lambda: None):
        self.run = Run(folder / "runs/k")
        overrides = [f"--set={key}={value}" for key, value in {**TINY, **SETTINGS[setting]}.items()]
        begin = ["--name", "k", *overrides]
        arguments = ["train", *(["--resume", "k"] if self.run.config.exists() else begin)]
        self.errors = folder / "stderr.txt"
        self.errors.write_text("")
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.chdir(folder)
                descriptor = os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                prepare()
                if die_at:
                    sys.addaudithook(_Reaper(die_at))
                code = main(arguments)
                sys.stdout.flush()
                os._exit(code)
            finally:
                os._exit(99)

    def wait(self):
        """Return the exit code, as in a shell, and the last line of stderr."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        lines = self.errors.read_text(encoding="utf-8").splitlines()
        return (128 - status if status < 0 else status), (lines[-1] if lines else "")

    def wait_for(self, path):
        """Wait until `path` exists."""
        while not path.exists():
            time.sleep(0.002)


class _Reaper:
    """An audit hook that kills the process before its n-th operation on a file of the run."""

    def __init__(self, n):
        self.left = n

    def __call__(self, event, arguments):
        if event in _FILE_OPERATIONS and "runs" in str(arguments[0]):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def make_folder(parent):
    """Create a folder with a text of invented words; return it."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    folder.chmod(0o755)
    draw = random.Random(0)
    words = ("".join(draw.choices("abcdefghiñé", k=draw.randint(1, 7))) for _ in range(700))
    (folder / "corpus.txt").write_text(" ".join(words)[:2000] + "\n", encoding="utf-8")
    return folder


def end_of(run):
    """Return everything that must be the same at the end."""
    clock = {"seconds", "chars_per_second"}
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    state = run.load_state()
    for key in ("seconds", "log_size"):  # the size of the log depends on the digits of its times
        del state["progress"][key]
    for key in ("since_evaluation", "since_row"):
        del state["progress"][key]["seconds"]
    return {
        "model": run.best.read_bytes(),
        "last": run.last.read_bytes(),
        "log": [{key: value for key, value in row.items() if key not in clock} for row in rows],
        "state": repr({**state, "config": None}) + str(_sums(state)),
        "left over": [path.name for path in run.folder.iterdir() if path.name.startswith(".")],
    }


def _sums(thing):
    """Return the bytes of all tensors in `thing`."""
    if isinstance(thing, torch.Tensor):
        return thing.numpy().tobytes()
    if isinstance(thing, dict):
        return [_sums(value) for value in thing.values()]
    return [_sums(value) for value in thing] if isinstance(thing, (list, tuple)) else None


def check_loads(run):
    """Read all files of the run that exist; raise an error for a damaged one."""
    if run.state.exists():
        run.load_state()
    for path in (run.best, run.last):
        if path.exists():
            load_model(path)
    for step in run.checkpoints():
        run.checkpoint(step).load_state()


def finish(folder, setting):
    """Train to the end; return the files as `end_of` does."""
    training = Training(folder, setting)
    code, line = training.wait()
    assert code == 0 or (code == 2 and "is finished" in line), f"{setting}: exit {code}: {line} ({folder})"
    return end_of(training.run)


def compare(expected, found, setting, folder):
    """Raise an error for the first difference."""
    for key, value in expected.items():
        assert found[key] == value, f"{setting}: another {key} ({folder})"


def measure(parent, setting):
    """Return the files of an undisturbed run, and how many seconds it takes."""
    folder, began = make_folder(parent), time.monotonic()
    expected = finish(folder, setting)
    seconds = time.monotonic() - began
    assert expected["log"][-1].keys() >= {"test_loss"} and not expected["left over"]
    rolled_back = any(row.get("event") == "rollback" for row in expected["log"])
    assert rolled_back == (setting == "diverging"), f"{setting}: {expected['log']}"
    shutil.rmtree(folder)
    return expected, seconds


def kill(parent, setting, kills, draw):
    """Kill trainings `kills` times in all, resume them, and compare the files of each."""
    expected, seconds = measure(parent, setting)
    done, at_files, trainings = 0, 0, 0
    while done < kills:
        folder = make_folder(parent)
        for _ in range(draw.choice([1, 1, 2, 4])):
            at_a_file = draw.random() < 0.5
            training = Training(folder, setting, draw.randint(1, 150) if at_a_file else 0)
            if not at_a_file:
                time.sleep(draw.uniform(0, seconds))
                os.kill(training.pid, signal.SIGKILL)
            code, line = training.wait()
            if code != 128 + signal.SIGKILL:  # it ended before the kill
                assert code == 0 or "is finished" in line, f"{setting}: exit {code}: {line} ({folder})"
                continue
            done, at_files = done + 1, at_files + at_a_file
            check_loads(training.run)
        compare(expected, finish(folder, setting), setting, folder)
        trainings += 1
        shutil.rmtree(folder)
    return f"{done} kills, {at_files} at a file operation, in {trainings} trainings: all as undisturbed"


def stop(parent, setting, number, times, draw):
    """Stop trainings with the signal `number`, sometimes sent twice, `times` times in all."""
    expected, seconds = measure(parent, setting)
    done = saved = twice = 0
    while done < times:
        folder = make_folder(parent)
        training, second = Training(folder, setting), draw.random() < 0.3
        time.sleep(draw.uniform(0, seconds))
        os.kill(training.pid, number)
        if second:
            time.sleep(draw.uniform(0, 0.01))
            os.kill(training.pid, number)
        code, line = training.wait()
        if code not in (0, 99):  # it had started and not yet ended
            assert code == 128 + number, f"{setting}: exit {code}: {line} ({folder})"
            resumable = f"resume with: charlm train --resume {Path('runs/k')}" in line
            assert resumable or "interrupted" in line or number == signal.SIGTERM, line
            done, saved, twice = done + 1, saved + resumable, twice + second
            check_loads(training.run)
        compare(expected, finish(folder, setting), setting, folder)
        shutil.rmtree(folder)
    return f"{done} times exit {128 + number}, {saved} saved first, {twice} sent twice: all as undisturbed"


def _refused(training, *parts):
    """Raise an error unless the training ends with one line that contains the parts."""
    code, line = training.wait()
    lines = [text for text in training.errors.read_text().splitlines() if text.startswith("charlm: ")]
    assert code == 1 and lines == [line] and "Traceback" not in line, (code, line)
    assert all(part in line for part in parts), line


def _killed_run(parent, setting="windows builtin"):
    """Return a folder with a run that was killed during a save."""
    folder = make_folder(parent)
    training = Training(folder, setting, die_at=45)
    assert training.wait()[0] == 137 and training.run.state.exists()
    return folder, training.run


def file_size_limit(parent, expected):
    """Limit each file to 20 KB."""
    folder, run = _killed_run(parent)
    before = run.state.read_bytes()  # the models can be restored before the first save fails
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    _refused(Training(folder, "windows builtin", prepare=limit), "cannot write", "File too large")
    assert run.state.read_bytes() == before
    check_loads(run)
    compare(expected, finish(folder, "windows builtin"), "limited", folder)


def full_disk(parent, expected):
    """Resume on a full file system."""
    folder, run = _killed_run(parent)
    disk = folder / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) + 500_000
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True)
    if done.returncode:
        return "skipped: " + done.stderr.decode().strip()
    try:
        shutil.copytree(folder / "runs", disk / "runs")
        shutil.copy(folder / "corpus.txt", disk)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        run = Run(disk / "runs/k")
        before = run.state.read_bytes()
        errors = folder / "outside.txt"
        _refused(_outside(Training, disk, errors), "cannot write", "No space left on device")
        assert run.state.read_bytes() == before
        check_loads(run)
        filler.unlink()
        compare(expected, finish(disk, "windows builtin"), "full", disk)
    finally:
        subprocess.run(["umount", disk], check=True)
    return None


def _outside(training, folder, errors):
    """Start a training whose stderr is not on the full disk."""
    (folder / "stderr.txt").unlink(missing_ok=True)
    (folder / "stderr.txt").symlink_to(errors)
    errors.touch()
    return training(folder, "windows builtin")


def read_only_folder(parent, expected):
    """Resume in a read-only folder."""
    folder, run = _killed_run(parent)
    run.folder.chmod(0o555)
    (folder / "stderr.txt").chmod(0o666)
    drop = lambda: os.getuid() or os.setuid(65534)  # root can write everywhere
    _refused(Training(folder, "windows builtin", prepare=drop), "cannot write", "Permission denied")
    run.folder.chmod(0o755)
    compare(expected, finish(folder, "windows builtin"), "read-only", folder)


def folder_gone(parent, expected):
    """Move the run's folder away during the training."""
    folder, run = _killed_run(parent)
    training = Training(folder, "windows builtin")
    while "resumed" not in training.errors.read_text(encoding="utf-8"):
        time.sleep(0.001)
    run.folder.rename(folder / "moved")
    _refused(training, "runs/k", "No such file or directory")
    check_loads(Run(folder / "moved"))
    run.folder.parent.mkdir(exist_ok=True)
    (folder / "moved").rename(run.folder)
    compare(expected, finish(folder, "windows builtin"), "moved", folder)


def state_gone(parent, expected):
    """Delete the files during the training, which writes them again."""
    folder = make_folder(parent)
    training = Training(folder, "windows builtin")
    training.wait_for(training.run.last)
    os.kill(training.pid, signal.SIGSTOP)
    for path in (training.run.state, training.run.last):
        path.unlink(missing_ok=True)
    os.kill(training.pid, signal.SIGCONT)
    assert training.wait()[0] == 0
    compare(expected, end_of(training.run), "deleted", folder)


def two_at_once(parent, expected):
    """Resume a run that another process is training."""
    folder = make_folder(parent)
    first = Training(folder, "windows builtin")
    first.wait_for(first.run.last)
    os.kill(first.pid, signal.SIGSTOP)
    shutil.copy(folder / "stderr.txt", folder / "first.txt")
    _refused(Training(folder, "windows builtin"), "is being trained by another process")
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait()[0] == 0
    compare(expected, end_of(first.run), "locked", folder)


FAULTS = [file_size_limit, full_disk, read_only_folder, folder_gone, state_gone, two_at_once]


def run_all(kills, signals, faults, seed, settings):
    """Print a line for each setting and each fault."""
    torch.set_num_threads(1)
    codecs.lookup("utf-8-sig")  # imported late by Python, where another user may have no access
    native.kernels(torch.float32)
    draw, parent = random.Random(seed), tempfile.mkdtemp()
    os.chmod(parent, 0o755)  # noqa: PTH101
    for setting in settings:
        if kills:
            print(f"{setting:16} {kill(parent, setting, kills, draw)}", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM) if signals else ():
            print(f"{setting:16} {number.name}: {stop(parent, setting, number, signals, draw)}", flush=True)
    if faults:
        expected, _ = measure(parent, "windows builtin")
        for fault in FAULTS:
            skipped = fault(parent, expected)
            print(f"{fault.__name__:16} {skipped or 'one line, then as undisturbed'}", flush=True)
    shutil.rmtree(parent)  # after a failure it stays, to be examined


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs for each setting")
    parser.add_argument("--signals", type=int, default=0, help="SIGINTs and SIGTERMs for each setting")
    parser.add_argument(
        "--faults", action="store_true", help="try full disks, folders that are moved away and so on"
    )
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(SETTINGS))
    options = parser.parse_args()
    run_all(options.kills, options.signals, options.faults, options.seed, options.settings or SETTINGS)
