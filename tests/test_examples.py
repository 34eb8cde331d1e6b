"""All commands shown in README and docs/ run, on a small text and with small sizes.

Commands that are not run are checked: the make target and its variables, the extra, or the script exists.
Shell completion is tested in cli/test_options.py.
"""

import gzip
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from charlm.cli import cli
from conftest import ROOT, settings

SMALL = [
    "model.embedding_size=12",
    "batches.batch_size=64",
    "corpus.max_chars=4000",
    "train.epochs=1",
    "train.max_steps=null",
    "train.eval_every=1000",  # and at the end
]
# Arguments appended to an example to make it short.
SHORTER = {
    "train": settings(*SMALL),
    "compare": settings(*SMALL),
    "gradflow": [*settings(*SMALL), "--train-steps", "1", "--steps", "10"],
    "gradcheck": ["--entries", "1", *settings("model.embedding_size=12", "model.hidden_size=12")],
    "bench": ["--seconds", "0", "--hidden-size", "8", "--batch-size", "2", "--seq-len", "8", "--cell", "rnn"],
}
SHOWN = ("charlm", "torchrun", "echo", "make", "pip", "python", "tensorboard", "eval", "_CHARLM_COMPLETE")
# A command that is mentioned, not shown: alone, or with placeholders in capitals.
BARE = re.compile(r"charlm \S+|charlm .*\bRUN\b.*")
ELSEWHERE = ("tensorboard", "eval", "_CHARLM_COMPLETE")


def sections():
    """Return the commands shown in each section, in order, by (page, title)."""
    found = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if page.name == "reference.md":  # generated from the commands
            continue
        for title, body in re.findall(
            r"^## (.*?)\n(.*?)(?=^## |\Z)", "## \n" + page.read_text("utf-8"), re.M | re.S
        ):
            blocks = "".join(re.findall(r"```(?:sh|bash|console)\n(.*?)```", body, re.S))
            prose = re.sub(r"```.*?```", "", body, flags=re.S)
            lines = re.findall(rf"^    ((?:{'|'.join(SHOWN)})\b.*)$", prose, re.M)
            lines += [line.removeprefix("$ ") for line in blocks.splitlines() if line]
            inline = re.findall(r"`((?:charlm|make|pip|python) [^`]+)`", prose)
            lines += [" ".join(each.split()) for each in inline if not BARE.fullmatch(each)]
            if lines:
                found[page.name, title] = list(dict.fromkeys(lines))
    return found


SECTIONS = sections()


def words_of(command):
    """Split a command as the shell does, with | < > as separate words."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|<>")
    lexer.whitespace_split = True
    return list(lexer)


def test_every_command_has_an_example():
    commands = [command for section in SECTIONS.values() for command in section]
    assert len(commands) > 45
    shown = {words_of(each)[1] for each in commands if each.startswith("charlm ")}
    assert shown >= cli.commands.keys()


@pytest.fixture
def reader(charlm, folder, monkeypatch):
    """A folder with some texts and two runs, and a function that runs a command's words there."""
    passage = (ROOT / "data/sancho.txt").read_text(encoding="utf-8")[:1100]
    book = f"En un lugar de la Mancha. En la venta don Quijote y Sancho, de gran lujo. {passage}\n" * 3
    for name in ("quijote.txt", "tinyshakespeare.txt", "book.txt", "sequel.txt", "letters/one.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(book, encoding="utf-8")
    names = [f"{first}{second}" for first in "Sancho" for second in "de la Mancha"]
    Path("names.txt").write_text("\n".join(names))
    Path("poems.txt").write_text("\n\n".join(f"{name},\n{name}" for name in names))
    Path("more").mkdir()
    Path("more/two.txt.gz").write_bytes(gzip.compress(book.encode()))

    def run(words):
        """Run charlm ARGUMENTS or echo TEXT | charlm ..., with < FILE and > FILE."""
        stdin, output = b"", None
        if words[0] == "echo":
            assert words[2] == "|", words
            stdin, words = words[1].encode() + b"\n", words[3:]
        if "<" in words:
            stdin, words = Path(words[words.index("<") + 1]).read_bytes(), words[: words.index("<")]
        if ">" in words:
            output, words = Path(words[words.index(">") + 1]), words[: words.index(">")]
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert words[0] == "charlm", words
        name, arguments = words[1], words[2:]
        if name == "import":  # other programs' models
            for form, file in (("stanza", "es_forward.pt"), ("flair", "lm.pt"), ("torch", "mine.pt")):
                charlm("export", "first", "--to", form, "--output", file, "--force")
        done = charlm(name, *arguments, *([] if "--resume" in arguments else SHORTER.get(name, [])))
        assert done.code == 0, f"{shlex.join(words)}\n{done.err}"
        if output:
            output.write_text(done.out)

    run(["charlm", "train", "--name", "second", "--set", "corpus.source=book.txt"])
    shutil.copytree("runs/second", "runs/first")
    return run


def check(words):
    """Check a command that a test cannot run."""
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            name, equals, _ = word.partition("=")
            pattern = rf"^{name} *\??:?=" if equals else rf"^{name}:.* ## "
            assert re.search(pattern, makefile, re.M), f"{word} not found in the Makefile"
    elif words[0] == "pip":
        table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        extras = re.findall(r"^(\w+) = \[", table.partition("\n\n")[0], re.M)
        assert words[1] == "install"
        assert words[2] == "." or re.fullmatch(rf"charlm-torch\[({'|'.join(extras)})\]", words[2]), words
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    else:
        assert words[0].startswith(ELSEWHERE), f"{words} is neither run nor checked"


@pytest.mark.parametrize("section", SECTIONS, ids="-".join)
def test_examples_run(reader, section):
    commands = SECTIONS[section]
    if any("--name first" in command for command in commands):
        shutil.rmtree("runs/first")
    for command in commands:
        words = words_of(command)
        if words[0] == "torchrun":  # run in integration/test_torchrun.py; here a single process
            words = [word for word in words[words.index("-m") + 1 :] if word != "..."]
        if words[0] not in ("charlm", "echo"):
            check(words)
        else:
            reader(words)
