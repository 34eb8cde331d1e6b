"""Files written whole or not at all, JSON text, checksums, and the user's cache folder."""

import contextlib
import errno
import functools
import io
import math
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from charlm.errors import CharlmError

_RECENT = 600  # seconds
_FIXES = {
    errno.ENOENT: "make the folder, or restore it if it was there",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make its folder writable or take another"),
}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by the file that `write` writes to the path that it is given, durably.

    The file given to `write` exists, empty; `write` may replace it. Raises `CharlmError` if anything fails;
    `path` is then as it was.
    """
    temporary = path.parent / f".{path.name}.{os.urandom(4).hex()}"
    try:
        temporary.touch(exist_ok=False)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # make the rename durable too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # a library may report a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        fix = _FIXES.get(getattr(error, "errno", 0), "free some space or take another folder")
        raise CharlmError(f"cannot write {path}: {reason}; {fix}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def json_text(data: Any, **options: Any) -> str:
    """Return `data` as ``json.dumps(data, **options)`` does, with null for floats that are not finite."""
    import json  # here and below: `charlm --help` needs neither

    return json.dumps(_finite(data), allow_nan=False, **options)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def sha256(file: io.BufferedIOBase, size: int) -> str:
    """Return the SHA-256, in hexadecimal, of the next `size` bytes of `file`, or of all that there are."""
    import hashlib

    digest, chunk = hashlib.sha256(), memoryview(bytearray(min(size, 2**20)))
    while size > 0 and (read := file.readinto(chunk[: min(size, len(chunk))])):
        digest.update(chunk[:read])
        size -= read
    return digest.hexdigest()


def cache_folder(name: str = "") -> Path | None:
    """Return `safe_cache_folder`, or None where that raises an error."""
    try:
        return safe_cache_folder(name)
    except CharlmError:
        return None


def safe_cache_folder(name: str = "") -> Path:
    """Return charlm's folder in the user's cache folder, or the folder `name` in it; create it if necessary.

    The user's cache folder is $XDG_CACHE_HOME, if that is an absolute path, or ~/.cache.
    Raises `CharlmError` if the folder cannot be created, and if another user could put files into it or
    replace it, because that user can write to it or to a folder above it.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (home if home.is_absolute() else Path.home() / ".cache") / "charlm"
        for each in dict.fromkeys((folder.parent, folder, folder / name)):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = (folder / name).resolve(strict=True)  # no link is followed from here on
        reasons = [_why_unsafe(each, above=each != folder) for each in (folder, *folder.parents)]
    except (OSError, RuntimeError) as error:
        reasons = [str(error)]
    if reason := next(filter(None, reasons), ""):
        fix = "set XDG_CACHE_HOME to a folder that only you can write to"
        raise CharlmError(f"no safe cache folder: {reason}; {fix}")
    return folder


def _why_unsafe(folder: Path, above: bool) -> str:
    """Why others could write to `folder` or, `above` the cache, rename what is in it; else empty."""
    if os.name != "posix":
        return ""
    found = folder.lstat()
    if found.st_uid not in ((0, os.getuid()) if above else (os.getuid(),)):
        return f"{folder} belongs to another user (uid {found.st_uid})"
    if _others_write(found) and not (above and found.st_mode & stat.S_ISVTX):
        import shlex

        return f"others can write to {folder} (chmod go-w {shlex.quote(str(folder))} forbids it)"
    return ""


def is_ours(path: Path) -> bool:
    """Return whether `path` is a regular file, not a link, that is this user's and writable by no other."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not _others_write(found)


def _others_write(found: os.stat_result) -> bool:
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _is_private_group(found.st_gid)


@functools.cache
def _is_private_group(gid: int) -> bool:
    """Return whether the group is the user's private group, which many systems create, with umask 002.

    It has the user's name, is the user's primary group, and nobody else is in it.
    """
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
        private = (
            group.gr_name == user.pw_name and gid == user.pw_gid and not {*group.gr_mem} - {user.pw_name}
        )
        return private and all(each.pw_gid != gid or each.pw_uid == user.pw_uid for each in pwd.getpwall())
    except KeyError:  # a user or a group without a name, as in a container
        return False


class CacheEntry(NamedTuple):
    """A file of the cache.

    kind: text (an encoded text), kernels or speeds (of a machine); used: the time of its last use.
    """

    path: Path
    kind: str
    size: int
    used: float


def cache_entries() -> list[CacheEntry]:
    """Return the files of the cache, the most recently used first; without those that are being written.

    Raises `CharlmError` if there is no safe cache folder.
    """
    folders = {"kernels": safe_cache_folder(), "text": safe_cache_folder("corpora")}
    entries = []
    for content, folder in folders.items():
        for path in folder.glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    kind = "speeds" if path.suffix == ".json" else content
                    entries.append(CacheEntry(path, kind, found.st_size, found.st_mtime))
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def cache_limit() -> int:
    """Return the bytes that the encoded texts may take: $CHARLM_CACHE_GB, by default 10, in 10^9 bytes."""
    text = os.environ.get("CHARLM_CACHE_GB", "") or "10"
    try:
        limit = int(float(text) * 10**9)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise CharlmError(f"CHARLM_CACHE_GB is {text!r}; allowed: a number >= 0, for example 10")
    return limit


def shrink_cache(keep: Path) -> None:
    """Remove encoded texts, the least recently used first, until the rest fits into `cache_limit`.

    Not `keep`, and none used in the last ten minutes, which another process may be about to open.
    """
    texts = [entry for entry in cache_entries() if entry.kind == "text"]
    size, limit, recent = sum(entry.size for entry in texts), cache_limit(), time.time() - _RECENT
    for entry in reversed(texts):
        if size > limit and entry.path != keep and entry.used < recent:
            with contextlib.suppress(OSError):  # removed by another process, or in use on Windows
                entry.path.unlink()
            size -= entry.size
