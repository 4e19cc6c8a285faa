"""Files that are there whole or not at all, also after a kill, a full disk or a power cut."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_HASH_BLOCK = 2**22  # bytes
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and the flag of Linux' renameat2


def reserve(descriptor: int, size: int) -> None:
    """Make a file `size` bytes long and, where the file system can, take the room on the disk."""
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    except AttributeError:  # no such call on macOS
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view[: 2**30], offset)
        view, offset = view[written:], offset + written


def file_hash(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a file, in hexadecimal; `advance` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what an interrupted write of this module left."""
    return re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", name) is not None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    with _replaced(path) as file:
        file.write(content)


def create_atomically(path: Path, content: bytes) -> bool:
    """Write a file that is not there yet; False, and nothing done, where another process was faster."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file so that the copy is there whole or not at all."""
    with source.open("rb") as original, _replaced(path) as file:
        shutil.copyfileobj(original, file)


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end; nothing is written through a link that is there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths change places in one step; False, and nothing done, where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = (os.fsencode(os.path.abspath(path)) for path in (one, other))
    first, second = names
    return bool(rename(_HERE, first, _HERE, second, _RENAME_EXCHANGE) == 0)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
