"""Write files and folders the way a shared folder needs it, and read small ones within bounds.

New files get mode 0666 and new folders 0777, both less the umask. A symbolic link planted where a file is to be written
is never followed: files are made under a name of their own (O_EXCL, O_NOFOLLOW) and renamed, which replaces a link and
leaves its target alone. Knows nothing of what the files hold.
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
    fcntl = None

CAN_LOCK = fcntl is not None
#: the largest file of a checkpoint that is no weights, a tokenizer with a large vocabulary, has some 40 MB
SMALL_BYTES = 256 << 20
#: of such files: configurations, tokenizers, chat templates
SMALL_SUFFIXES = (".json", ".model", ".jinja", ".txt")
_NEW = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def open_new(path: str | Path) -> BinaryIO:
    """Create a file and open it for writing.

    Raises:
        FileExistsError: something has that name already, be it a link that leads nowhere.
    """
    return os.fdopen(os.open(path, os.O_RDWR | _NEW, 0o666), "w+b")


def write_new(path: str | Path, data: bytes | str) -> None:
    """Create a file with this content; see `open_new`."""
    with open_new(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """Give a new empty file in the same folder to fill; it becomes `path` at the end, and is removed if that fails.

    Args:
        path: what is there already stays whole until it is replaced; a link is replaced, not followed.
        sync: return only when the file and its name are on the disk.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        with open_new(part) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield part
        if (
            stat.S_IMODE(os.lstat(part).st_mode) != mode
        ):  # safetensors makes a file of its own, for its owner alone
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
    """Write the whole file or leave what is there; see `replacing`."""
    with replacing(path, sync) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def read_small(path: str | Path, limit: int = SMALL_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes; a link to one (the hub's cache has them) is as good.

    Raises:
        OSError: it is missing, a device, a pipe or a folder, or larger.
    """
    # a pipe without a writer would block; with O_NONBLOCK it opens, and is refused
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "not a regular file", os.fspath(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1) if found.st_size <= limit else None
        if data is None or len(data) > limit:  # it may grow meanwhile
            raise OSError(0, f"larger than {limit} bytes, which no file of this kind is", os.fspath(path))
        return data
    finally:
        os.close(descriptor)


def own_folder(path: Path) -> None:
    """Make a folder, or take one that is ours already.

    Raises:
        OSError: a link, a file or somebody else's folder has that name.
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
        path: of the file.
        create: make it where there is none.

    Raises:
        FileNotFoundError: there is none, or no folder for it.
        BlockingIOError: another process holds the lock.
        OSError: the name is a link, or the file cannot be opened.
    """
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    flags |= os.O_CREAT if create else 0
    while True:
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_there(file, path):  # or its owner finished and removed it in between
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def is_there(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def sync_path(path: str | Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
