import os
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from charlm import files
from charlm.errors import CharlmError
from charlm.files import cache_folder, cache_limit, safe_cache_folder, write_atomically


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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The path of charlm's cache folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files._is_private_group.cache_clear()
    yield tmp_path / "cache/charlm"
    files._is_private_group.cache_clear()


@pytest.mark.skipif(os.name != "posix", reason="no such modes here")
@pytest.mark.parametrize(
    ("group", "members", "others", "safe"),
    [
        ("me", [], [], True),
        ("me", ["me"], [], True),
        ("me", ["you"], [], False),
        ("me", [], [SimpleNamespace(pw_uid=-1, pw_gid=7)], False),
        ("users", [], [], False),
    ],
)
def test_only_the_private_group_of_the_user_may_write_to_the_cache(
    cache, monkeypatch, group, members, others, safe
):
    me = SimpleNamespace(pw_uid=os.getuid(), pw_gid=7, pw_name="me")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: me)
    monkeypatch.setattr("pwd.getpwall", lambda: [me, *others])
    monkeypatch.setattr("grp.getgrgid", lambda gid: SimpleNamespace(gr_name=group, gr_mem=members))
    cache.mkdir(parents=True)
    cache.parent.chmod(0o775)
    me.pw_gid = cache.parent.stat().st_gid
    for other in others:
        other.pw_gid = me.pw_gid
    assert (cache_folder() == cache) == safe
    if not safe:
        with pytest.raises(CharlmError, match=f"chmod go-w {cache.parent}.*XDG_CACHE_HOME"):
            safe_cache_folder()


@pytest.mark.skipif(os.name != "posix", reason="no such modes here")
def test_folders_of_the_cache_are_private(cache):
    umask = os.umask(0o002)
    try:
        safe_cache_folder("corpora")
    finally:
        os.umask(umask)
    for folder in (cache.parent, cache, cache / "corpora"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


@pytest.mark.parametrize("value", ["ten", "-1", "nan", "inf"])
def test_an_invalid_cache_limit_is_refused(monkeypatch, value):
    monkeypatch.setenv("CHARLM_CACHE_GB", value)
    with pytest.raises(CharlmError, match=f"CHARLM_CACHE_GB is '{value}'"):
        cache_limit()
