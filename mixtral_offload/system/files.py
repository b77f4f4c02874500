"""Write files and folders safely in shared folders; read small files within bounds.

New files get mode 0666, new folders 0777, less the umask. A link in the place of a new file is not followed.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module, or None

CAN_LOCK = fcntl is not None
#: limit for a checkpoint's files other than weights; the largest known tokenizer has about 40 MB
SMALL_BYTES = 256 << 20
#: configurations, tokenizers, chat templates
SMALL_SUFFIXES = (".json", ".model", ".jinja", ".txt")
_NEW = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def open_new(path: str | Path) -> BinaryIO:
    """Create a file and open it for writing.

    Raises:
        FileExistsError: The name is taken, if only by a dangling link.
    """
    return os.fdopen(os.open(path, os.O_RDWR | _NEW, 0o666), "w+b")


def write_new(path: str | Path, data: bytes | str) -> None:
    """Create a file with this content. Raises FileExistsError, see `open_new`."""
    with open_new(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """Replace a file atomically with a new one that the caller fills.

    The new file is in the same folder and is renamed at the end: an existing file stays whole until then, and
    a link is replaced, not followed. If anything fails, the new file is removed.

    Args:
        path: The file to replace or create.
        sync: Return only when the file and its name are on the disk.

    Yields:
        The path of the new, empty file.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        with open_new(part) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield part
        # safetensors replaces the file by one that only its owner can read
        if stat.S_IMODE(os.lstat(part).st_mode) != mode:
            os.chmod(part, mode)
        if sync:
            sync_path(part)
        os.replace(part, path)
        if sync:
            sync_path(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def replace_file(path: str | Path, data: bytes | str, sync: bool = False) -> None:
    """Replace a file's content atomically; see `replacing`."""
    with replacing(path, sync) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def read_small(path: str | Path, limit: int = SMALL_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes, also through a link: the hub's cache has links.

    Raises:
        OSError: It is missing, no regular file, or larger.
    """
    # without O_NONBLOCK, opening a pipe without a writer would block
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "not a regular file", os.fspath(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1) if found.st_size <= limit else None
        if data is None or len(data) > limit:  # the file may have grown after fstat
            raise OSError(0, f"larger than {limit} bytes, which no file of this kind is", os.fspath(path))
        return data
    finally:
        os.close(descriptor)


def own_folder(path: Path) -> None:
    """Create a folder, or accept an existing one of this user.

    Raises:
        OSError: The name is a link, a file or another user's folder.
    """
    with suppress(FileExistsError):
        os.mkdir(path, 0o777)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(0, "not a folder of this user's", os.fspath(path))
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise OSError(0, "the folder belongs to another user", os.fspath(path))


def open_locked(path: Path, create: bool = True) -> BinaryIO:
    """Open a file for reading and writing, locked until it is closed.

    Args:
        path: The file.
        create: Create the file if it is missing.

    Raises:
        FileNotFoundError: The file, or its folder, does not exist.
        BlockingIOError: Another process holds the lock.
        OSError: The name is a link, or the file cannot be opened.
    """
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    flags |= os.O_CREAT if create else 0
    while True:
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(file, path):  # the previous owner may have removed it meanwhile
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def is_at(file: BinaryIO, path: Path) -> bool:
    """Tell whether the open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def sync_path(path: str | Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
