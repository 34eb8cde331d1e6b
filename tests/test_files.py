import os
import re
import stat
from pathlib import Path

import pytest

from charlm.errors import CharlmError
from charlm.files import write_atomically


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 1\nx")]
)
def test_failure_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(CharlmError, match=r"/a: (No space left|unexpected pos 1;)"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_missing_folder_is_named(tmp_path):
    for path in (tmp_path / "no/a", Path()):
        with pytest.raises(CharlmError, match=re.escape(f"cannot write {path}")):
            write_atomically(path, lambda temporary: None)
