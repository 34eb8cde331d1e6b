"""Files written whole or not at all, checksums, and the user's cache folder."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from charlm.errors import CharlmError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_FIXES = {
    errno.ENOENT: "make the folder, or restore it if it was there",
    errno.EACCES: "make its folder writable or take another",
    errno.EPERM: "make its folder writable or take another",
    errno.EROFS: "make its folder writable or take another",
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
    return json.dumps(_finite(data), allow_nan=False, **options)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def sha256(file: io.BufferedIOBase, size: int) -> str:
    """Return the SHA-256, in hexadecimal, of the next `size` bytes of `file`, or of all that there are."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(min(size, 2**20)))
    while size > 0 and (read := file.readinto(chunk[: min(size, len(chunk))])):
        digest.update(chunk[:read])
        size -= read
    return digest.hexdigest()


def cache_folder(name: str = "") -> Path | None:
    """charlm's folder in the user's cache folder, or `name` in it, made if need be.

    None where it cannot be made, and where others could put something into its place: where anyone else may
    write to it, or to a folder above it in which they could move it away.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "charlm"
        for each in dict.fromkeys((folder.parent, folder, folder / name)):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = (folder / name).resolve(strict=True)  # so that no link is followed from here on
        safe = os.name != "posix" or (is_ours(folder, stat.S_ISDIR) and all(map(_is_safe, folder.parents)))
    except (OSError, RuntimeError):
        return None
    return folder if safe else None


def is_ours(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether `path` itself, not what it links to, is of that kind, this user's, and written by no other."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & _OTHERS_WRITE


def _is_safe(folder: Path) -> bool:
    """Whether none but this user and root can rename what stands in `folder`."""
    found = folder.stat()
    sticky = bool(found.st_mode & stat.S_ISVTX)
    return found.st_uid in (0, os.getuid()) and (sticky or not found.st_mode & _OTHERS_WRITE)
