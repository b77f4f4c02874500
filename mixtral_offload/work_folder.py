"""The folder in which a checkpoint is being written: locked, resumable, renamed when it is whole.

For `target` it is `target.converting`, beside it. Its journal says by which settings, and which files are finished with
which checksum. A process that is killed leaves it; the next with the same settings keeps what is finished and proven.
Where the system has no file locks (Windows), nothing keeps two processes apart.

Knows files. Knows nothing of what a conversion does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .checksums import checksum_of
from .errors import CheckpointError
from .files import open_locked, own_folder

JOURNAL = "convert.journal"
FORMAT = "mixtral_offload convert 1"


def work_folder_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.converting")


def resume_hint(target: Path) -> str | None:
    """What an interrupted conversion to `target` has left, in a sentence; None if there is nothing."""
    folder = work_folder_of(target)
    try:
        n_files = max((folder / JOURNAL).read_bytes().count(b"\n") - 1, 0)
    except OSError:
        return None
    return (
        f"{n_files} finished files are kept in {folder}: the same command goes on from there; delete that folder to "
        "give up"
    )


class WorkFolder:
    """Use it in `with`: it is locked until the end, then gone, renamed, or left for the next run.

    finished: name -> checksum of the files that are there, proven in this run or written in it.
    n_kept: how many of them an earlier run has left. Raises OSError where files cannot be written.
    """

    def __init__(self, target: Path, settings: dict, report: Callable[[str], None] = lambda text: None):
        """Args:
        settings: all that decides the files, in JSON's types.
        report: called with what is found there.
        """
        self.target, self.path = target, work_folder_of(target)
        self._settings, self._report = json.loads(json.dumps(settings)), report
        self.finished: dict[str, str] = {}
        self.n_kept = 0
        self._journal = None

    def __enter__(self) -> WorkFolder:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        while self._journal is None:
            own_folder(self.path)
            try:
                self._journal = open_locked(self.path / JOURNAL)
            except FileNotFoundError:
                continue  # another process renamed or removed the folder in between
            except BlockingIOError:
                raise CheckpointError(
                    "another process is converting to this target", path=self.target,
                    hint="wait for it, or choose another target",
                ) from None  # fmt: skip
        try:
            if os.path.lexists(self.target):  # that other process finished
                if len(os.listdir(self.path)) == 1 and not os.path.getsize(self.path / JOURNAL):
                    self._remove()  # we have just made it
                raise target_exists(self.target)
            self._resume()
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Leave what is worth going on with; after an error in the source, nothing is."""
        if self._journal.closed:
            return
        try:
            if not self.finished or isinstance(error, CheckpointError):
                self._remove()
        finally:
            self._journal.close()

    def keep(self, name: str, checksum: str) -> None:
        """Note that a file is finished."""
        self._journal.write(f"{json.dumps([name, checksum])}\n".encode())
        self.finished[name] = checksum

    def finish(self) -> None:
        """Give the folder its name: it is whole."""
        if os.path.lexists(self.target):
            raise target_exists(self.target)
        (self.path / JOURNAL).unlink()
        try:
            os.rename(self.path, self.target)
        except OSError:
            self.finished = {}
            raise
        self._journal.close()

    def _resume(self) -> None:
        """Read the journal; keep the files that are what it says, remove all others."""
        lines = [_parsed(line) for line in self._journal.read().split(b"\n")]
        others = [path for path in self.path.iterdir() if path.name != JOURNAL]
        header = {"format": FORMAT, "settings": self._settings}
        if others and not (isinstance(lines[0], dict) and lines[0].get("format") == FORMAT):
            raise CheckpointError(
                "a folder of this name is in the way, and not left by an interrupted conversion", path=self.path,
                expected=f"{JOURNAL} of {FORMAT}", found=f"{len(others)} other files",
                hint="move it away, or choose another target",
            )  # fmt: skip
        stated = {}
        if lines[0] == header:
            pairs = (line for line in lines[1:] if isinstance(line, list) and len(line) == 2)
            stated = {str(name): str(checksum) for name, checksum in pairs}
        elif others:
            self._report("what an interrupted conversion with other settings has left is removed")
        for path in others:
            if path.name not in stated or not _is_what_it_was(path, stated[path.name]):
                _delete(path)
                stated.pop(path.name, None)
        self.finished = {name: checksum for name, checksum in stated.items() if (self.path / name).exists()}
        self.n_kept = len(self.finished)
        if self.n_kept:
            self._report(f"resuming: {self.n_kept} files are there already, their checksums are right")
        self._journal.seek(0)
        self._journal.truncate()
        self._journal.write(f"{json.dumps(header)}\n".encode())
        for name, checksum in self.finished.items():
            self._journal.write(f"{json.dumps([name, checksum])}\n".encode())

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def target_exists(target: Path) -> CheckpointError:
    return CheckpointError("target exists", path=target, hint="choose another folder or remove this one")


def _parsed(line: bytes):
    with suppress(ValueError, RecursionError):
        return json.loads(line)
    return None  # cut short, or nothing


def _is_what_it_was(path: Path, checksum: str) -> bool:
    try:
        return not path.is_symlink() and checksum_of(path) == checksum
    except (CheckpointError, OSError):
        return False


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
