import os
import stat

import pytest

from charlm.errors import CharlmError
from charlm.files import write_atomically


def test_a_file_is_replaced_whole(tmp_path):
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
def test_a_failure_leaves_what_was(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(CharlmError, match=r"cannot write .*a: (No space left|unexpected pos 1;)"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CharlmError, match="No such file.*; make the folder"):
        write_atomically(tmp_path / "no/a", lambda temporary: None)
