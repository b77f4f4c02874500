"""The folder in which a checkpoint is being written: locked, resumable, renamed when it is complete.

Files only: nothing of what a conversion does.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from mixtral_offload.errors import CheckpointError
from mixtral_offload.system.files import CAN_LOCK, open_locked, own_folder
from mixtral_offload.weights.checksums import checksum_of

JOURNAL = "convert.journal"
FORMAT = "mixtral_offload convert 1"
#: the journal's last line, once everything is written and checked
WHOLE = {"whole": True}


def work_folder_of(target: Path) -> Path:
    """Return the folder in which `target` is written."""
    return target.with_name(f"{target.name}.converting")


def resume_hint(target: Path) -> str | None:
    """Describe in a sentence what an interrupted conversion to `target` has left; None: nothing."""
    folder = work_folder_of(target)
    try:
        n_files = len(_parsed((folder / JOURNAL).read_bytes())[1])
    except OSError:
        return None
    if not n_files:
        return None
    kept = f"{n_files} finished files are kept in {folder}"
    return f"{kept}: the same command resumes from there; delete that folder to start over"


def finish_renamed(target: Path, settings: dict) -> bool:
    """Finish a conversion by these settings that was killed just after the renaming.

    Returns:
        Whether `target` was one.

    Raises:
        CheckpointError: If another process is about to do it.
    """
    path = target / JOURNAL
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with open_locked(path, create=False) as journal:
            header, _, is_whole, _ = _parsed(journal.read())
            is_ours = is_whole and header == _header(settings)
            if is_ours:
                _unlink(path)
            return is_ours
    except BlockingIOError:
        raise _busy(target) from None
    except OSError:
        return False


class WorkFolder:
    """A context manager for the folder, locked until the end; then it is removed, renamed, or left for the
    next run.

    For `target` it is `target.converting`. Its journal states the settings, and the finished files with their
    checksums. A killed process leaves it; the next one with the same settings keeps what is finished and
    verified, whatever the moment of the kill. So the journal is the first file to be made and the last to be
    removed. Nothing in it is overwritten while there are files, and it is renamed with the folder. A target
    whose journal ends with WHOLE is finished; `finish_renamed` removes the rest. Without file locks
    (Windows), nothing keeps two processes apart.

    Args:
        settings: Everything that the files depend on, in JSON's types.
        report: Called with what is found in the folder, and with what an error leaves there.

    Attributes:
        finished: Name -> checksum of the files that are there, verified or written in this run.
        n_kept: Number of those that an earlier run has left.

    Raises:
        OSError: If files cannot be written.
    """

    def __init__(self, target: Path, settings: dict, report: Callable[[str], None] = lambda text: None):
        self.target, self.path = target, work_folder_of(target)
        self._header, self._report = _header(settings), report
        self.finished: dict[str, str] = {}
        self.n_kept = 0
        self._journal: BinaryIO | None = None
        self._is_given_up = self._is_renamed = self._is_told = False

    def __enter__(self) -> WorkFolder:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        while self._journal is None:
            own_folder(self.path)
            try:
                self._journal = open_locked(self.path / JOURNAL)
            except FileNotFoundError:
                continue  # another process renamed or removed the folder in between
            except BlockingIOError:
                raise _busy(self.target) from None
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

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """Keep every finished file for the same command, unless `give_up` was called."""
        if self._is_renamed:
            return
        try:
            if self._is_given_up or not self.finished:
                self._remove()
            elif isinstance(error, CheckpointError) and not self._is_told:
                self._report(resume_hint(self.target) or f"finished files are kept in {self.path}")
        finally:
            self._open_journal.close()

    @property
    def _open_journal(self) -> BinaryIO:
        assert self._journal is not None  # within `with`
        return self._journal

    def keep(self, name: str, checksum: str) -> None:
        """Note that a file is finished."""
        self._append([name, checksum])
        self.finished[name] = checksum

    def give_up(self) -> None:
        """Remove the folder at the end: the same command would fail again."""
        self._is_given_up = True

    def finish(self) -> None:
        """Give the complete folder its name.

        Raises:
            CheckpointError: If the name is taken or impossible. The folder stays, for the same command.
        """
        hint = "the same command then ends within minutes; or use that folder as it is, under any name"
        if os.path.lexists(self.target):
            self._is_told = True
            raise CheckpointError(
                f"the checkpoint is finished, but its name is taken; it is kept in {self.path}",
                path=self.target,
                expected="no such file or folder until the conversion is done",
                found="one that was made during the conversion",
                hint=f"move away what has this name; {hint}",
            )
        try:
            self._append(WHOLE)
            if not CAN_LOCK:
                self._open_journal.close()  # Windows renames no folder of open files
            os.rename(self.path, self.target)
        except OSError as error:
            self._is_told = True
            raise CheckpointError(
                f"the checkpoint is finished, but cannot be given its name; it is kept in {self.path}",
                path=self.target,
                found=error.strerror or error,
                hint=f"make this name possible; {hint}",
            ) from error
        self._is_renamed = True
        _unlink(self.target / JOURNAL)
        self._open_journal.close()

    def _resume(self) -> None:
        """Read the journal; keep the files that are what it states, remove all others."""
        header, stated, _, n_bytes = _parsed(self._open_journal.read())
        others = [path for path in self.path.iterdir() if path.name != JOURNAL]
        if others and not (isinstance(header, dict) and header.get("format") == FORMAT):
            raise CheckpointError(
                "a folder of this name is in the way, and not left by an interrupted conversion",
                path=self.path,
                expected=f"{JOURNAL} of {FORMAT}",
                found=f"{len(others)} other files",
                hint="move it away, or choose another target",
            )
        if header != self._header:
            if others:
                self._report("what an interrupted conversion with other settings has left is removed")
            stated = {}
        for path in others:
            if path.name not in stated or not _is_what_it_was(path, stated[path.name]):
                _delete(path)
                stated.pop(path.name, None)
        self.finished = {name: checksum for name, checksum in stated.items() if (self.path / name).exists()}
        self.n_kept = len(self.finished)
        if self.n_kept:
            self._report(f"resuming: {self.n_kept} files are there already, their checksums are right")
        if header != self._header:  # and there are no files
            self._open_journal.truncate(0)
            self._open_journal.seek(0)
            self._append(self._header)
            return
        self._open_journal.truncate(n_bytes)  # a line cut short, and WHOLE
        self._open_journal.seek(n_bytes)

    def _append(self, line: object) -> None:
        """Write one line into the journal, all of it or an error."""
        rest = memoryview(f"{json.dumps(line)}\n".encode())
        while rest:  # a raw file may write less than all if the disk is full
            rest = rest[self._open_journal.write(rest) :]

    def _remove(self) -> None:
        """Remove everything, the journal last; what cannot be removed keeps it."""
        with suppress(OSError):
            for path in self.path.iterdir():
                if path.name != JOURNAL:
                    _delete(path)
            (self.path / JOURNAL).unlink()
            self.path.rmdir()


def target_exists(target: Path) -> CheckpointError:
    """Make the error for a target that exists."""
    hint, left = "choose another folder or remove this one", resume_hint(target)
    return CheckpointError("target exists", path=target, hint=f"{hint}; {left}" if left else hint)


def _busy(target: Path) -> CheckpointError:
    return CheckpointError(
        "another process is converting to this target",
        path=target,
        hint="wait for it, or choose another target",
    )


def _header(settings: dict) -> dict:
    return {"format": FORMAT, "settings": json.loads(json.dumps(settings))}


def _parsed(journal: bytes) -> tuple[object, dict[str, str], bool, int]:
    """First line; name -> checksum; whether the last line is WHOLE; bytes of all whole lines but that one."""
    *whole, cut = journal.split(b"\n")
    lines = [_as_json(line) for line in whole]
    is_whole = len(lines) > 1 and lines[-1] == WHOLE
    n_bytes = len(journal) - len(cut) - (len(whole[-1]) + 1 if is_whole else 0)
    pairs = (line for line in lines[1:] if isinstance(line, list) and len(line) == 2)
    stated = {str(name): str(checksum) for name, checksum in pairs}
    return lines[0] if lines else None, stated, is_whole, n_bytes


def _as_json(line: bytes) -> object:
    with suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def _is_what_it_was(path: Path, checksum: str) -> bool:
    """Whether this file can be read and has this checksum; raise if another attempt may read it."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return checksum_of(path) == checksum
    except (CheckpointError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno != errno.EIO:
            raise  # too many open files, a network that is gone: that says nothing about the file
        return False


def _unlink(journal: Path) -> None:
    """Remove the journal of a finished folder, which is valid with it too."""
    with suppress(OSError):
        journal.unlink()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
