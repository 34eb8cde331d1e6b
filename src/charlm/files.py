"""Writing files whole or not at all, and their checksums."""

import contextlib
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from charlm.errors import CharlmError

_FIXES = {
    errno.ENOENT: "make the folder, or restore it if it was there",
    errno.EACCES: "make its folder writable or take another",
    errno.EPERM: "make its folder writable or take another",
    errno.EROFS: "make its folder writable or take another",
}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, make it durable, and put it in the place of `path`.

    Raises `CharlmError` where that fails; what stood at `path` is then untouched.
    """
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        os.close(descriptor)
        # mkstemp makes files that only their owner reads.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # the rename itself
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        fix = _FIXES.get(getattr(error, "errno", 0), "free some space or take another folder")
        raise CharlmError(f"cannot write {path}: {reason}; {fix}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def sha256(file: io.BufferedIOBase, size: int) -> str:
    """The SHA-256, in hexadecimal, of the next `size` bytes of `file`, or of all if there are fewer."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(min(size, 2**20)))
    while size > 0 and (read := file.readinto(chunk[: min(size, len(chunk))])):
        digest.update(chunk[:read])
        size -= read
    return digest.hexdigest()
