"""The journal of a job, `OUTPUT.partial`: a header, then the output's line of each finished answer.

Each line is on the disk before the next answer is taken; the output replaces the journal in one step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mixtral_offload.errors import JobError
from mixtral_offload.system.files import CAN_LOCK, is_at, open_locked, open_new, sync_path

FORMAT = "mixtral_offload job 1"
MAGIC = b'{"format": "mixtral_offload job '  # every header begins so
RESTART = "use --restart to discard it and start over, or choose another --output"


def as_line(record: dict[str, Any]) -> bytes:
    """Format one line of JSON; text stays as it is, but for surrogates, which UTF-8 cannot encode."""
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record) + "\n").encode()


class Journal:
    """The journal of one output, locked until it is closed; nothing is changed before `begin`.

    Args:
        output: The file of answers.
        restart: Ignore an existing journal, and replace an existing output.

    Attributes:
        header: As found; None where there was no journal.
        places: Line number -> (offset, bytes) of its answer.

    Raises:
        JobError: The output or its journal cannot be used, or the output exists already.
    """

    def __init__(self, output: Path, restart: bool = False) -> None:
        self.output, self.path = output, journal_of(output)
        self.header: dict[str, Any] | None = None
        self.places: dict[int, tuple[int, int]] = {}
        self._end = 0  # bytes up to the last whole line
        if not output.parent.is_dir():
            raise JobError("no such folder", path=output.parent, hint="create it, or choose another --output")
        if output.exists() and not output.is_file():
            raise JobError("the output is not a file", path=output, hint="choose another --output")
        self._file = _open_locked(self.path)
        try:
            if not restart:
                self._read()
                if self.header is None and output.exists():
                    hint = (
                        "use --restart to answer all lines again and replace it, or choose another --output"
                    )
                    raise JobError("the output is there already, complete", path=output, hint=hint)
        except BaseException:
            self.close()
            raise

    def begin(self, job: dict[str, Any], numbers: Iterable[int], keep: dict[str, Any]) -> None:
        """Resume the journal if it belongs to this job, or start a new one.

        Args:
            job: Name -> what decides the answers.
            numbers: The lines that get an answer.
            keep: Added to the header of a new journal.

        Raises:
            JobError: The journal belongs to another job, is damaged, or cannot be written.
        """
        if not self.places:  # nothing is lost, whatever job it was
            self.header, self._end = None, 0
        else:
            self._compare(job)
            if strange := sorted(self.places.keys() - set(numbers)):
                raise self._damaged(f"line {strange[0]} of the input", "an answer, though it gets none")
        with _os_errors("cannot write the journal", self.path, "free some space, or choose another --output"):
            self._file.truncate(self._end)  # drop an incomplete line
            if self.header is None:
                self.header = {"format": FORMAT, **keep, "job": job}
                self._append(as_line(self.header))
                sync_path(self.path.parent)

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Keep one answer, flushed to the disk."""
        line, offset = as_line(record), self._end
        hint = "finished answers are kept; free some space there"
        try:
            with _os_errors("cannot write the journal", self.path, hint):
                self._append(line)
        finally:
            if self._end > offset:  # also after an interrupt right after the write
                self.places[number] = offset, len(line)

    def finish(self, numbers: Iterable[int], others: dict[int, dict[str, Any]]) -> None:
        """Write the output, and delete the journal.

        Args:
            numbers: The order of the lines.
            others: Line number -> record of each line that is not in the journal.
        """
        ordered = ordered_of(self.output)
        hint = "all answers are kept; free some space there"
        with _os_errors("cannot write the output", self.output, hint):
            try:
                self._write(ordered, numbers, others)
                os.replace(ordered, self.output)
            except OSError:
                with suppress(OSError):
                    ordered.unlink(missing_ok=True)
                raise
            sync_path(self.output.parent)
            self.path.unlink()

    def _write(self, ordered: Path, numbers: Iterable[int], others: dict[int, dict[str, Any]]) -> None:
        with suppress(FileNotFoundError):
            os.unlink(ordered)  # left by a killed process, or a planted link
        with open_new(ordered) as target, open(self.path, "rb") as source:
            for number in numbers:
                if number in others:
                    target.write(as_line(others[number]))
                    continue
                offset, length = self.places[number]
                source.seek(offset)
                target.write(source.read(length))
            target.flush()
            os.fsync(target.fileno())

    def close(self) -> None:
        """Unlock, and delete the file if it is empty."""
        if self._file.closed:
            return
        with suppress(OSError):
            if os.fstat(self._file.fileno()).st_size == 0 and is_at(self._file, self.path):
                self.path.unlink()
        self._file.close()

    def _append(self, line: bytes) -> None:
        self._file.seek(self._end)
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise
        except BaseException:
            # an interrupt during fsync, which may take long: the line is complete
            if written == len(line):
                self._end += len(line)
            raise
        self._end += len(line)

    def _read(self) -> None:
        """Read header and places; ignore an incomplete last line, and raise JobError for any other damage."""
        with _os_errors("cannot read the journal", self.path), open(self.path, "rb") as file:
            first = file.readline()
            if not first.endswith(b"\n") and (first.startswith(MAGIC) or MAGIC.startswith(first)):
                return  # empty, or killed in its first line
            self.header = _parse(first)
            if self.header is None or self.header.get("format") != FORMAT or "job" not in self.header:
                raise JobError(
                    "this is no journal that can be read",
                    path=self.path,
                    expected=FORMAT,
                    found=first[:60].decode(errors="replace").strip(),
                    hint=RESTART,
                )
            self._end = len(first)
            for row, line in enumerate(file, 2):
                record = _parse(line)
                if record is None and not file.read(1):
                    return
                if record is None or type(record.get("line")) is not int or record["line"] in self.places:
                    found = line[:60].decode(errors="replace").strip()
                    raise self._damaged(f"line {row}", found)
                self.places[record["line"]] = self._end, len(line)
                self._end += len(line)

    def _compare(self, job: dict[str, Any]) -> None:
        """Raise JobError, naming the differences, if the journal belongs to another job."""
        assert self.header is not None  # it has answers
        kept = self.header["job"]
        names = [name for name in {**kept, **job} if kept.get(name) != job.get(name)]
        if names:
            found = [f"{name}: {_short(kept.get(name))} there, {_short(job.get(name))} now" for name in names]
            hint = f"{RESTART}; or give the same options as before"
            raise JobError(
                "the journal belongs to another job", path=self.path, found="; ".join(found), hint=hint
            )

    def _damaged(self, key: str, found: str) -> JobError:
        return JobError("the journal is damaged", path=self.path, key=key, found=found, hint=RESTART)


def journal_of(output: Path) -> Path:
    """Path of an output's journal."""
    return output.with_name(f"{output.name}.partial")


def ordered_of(output: Path) -> Path:
    """Path of the temporary file that becomes the output; fixed, so that killed processes leave only one."""
    return output.with_name(f"{output.name}.partial.ordered")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _parse(line: bytes) -> dict[str, Any] | None:
    """Parse a complete line with a JSON object; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _open_locked(path: Path) -> BinaryIO:
    """Open or create the journal, locked against other processes; see `files.open_locked`."""
    if not CAN_LOCK:
        raise JobError("jobs need file locks, which this system lacks", path=path, expected="Linux or macOS")
    with _os_errors("cannot open the journal", path, "choose another --output"):
        try:
            return open_locked(path)
        except BlockingIOError:
            hint = "wait for it, or choose another --output"
            raise JobError("another process is at work on this output", path=path, hint=hint) from None


@contextmanager
def _os_errors(what: str, path: Path, hint: str | None = None) -> Iterator[None]:
    """Turn OSError into JobError."""
    try:
        yield
    except OSError as error:
        raise JobError(what, path=path, found=error.strerror or error, hint=hint) from error
