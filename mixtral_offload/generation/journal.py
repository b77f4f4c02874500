"""What a job has finished, kept safe beside its output until all of it is there; then the output, in order.

Knows files: a header, one JSON line for each answer, an OS lock. Knows nothing of models, prompts or options.

The journal of `answers.jsonl` is `answers.jsonl.partial`. Each line is on the disk before the next answer is taken, and
is byte for byte the line of the output, which is only ever written whole: to a temporary file, renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mixtral_offload.errors import JobError
from mixtral_offload.system.files import CAN_LOCK, is_at, open_locked, open_new, sync_path

FORMAT = "mixtral_offload job 1"
MAGIC = b'{"format": "mixtral_offload job '  # every header begins so
RESTART = "--restart begins anew and forgets what is there; another --output leaves it"


def as_line(record: dict) -> bytes:
    """One line of JSON. Text as it is; half characters, which UTF-8 cannot write, escaped."""
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record) + "\n").encode()


class Journal:
    """The journal of one output, locked from the start: a second process is refused.

    header: as it was found, None where there was none. places: line number -> (offset, bytes) of its answer.
    Nothing is changed before `begin`. Raises JobError, also where an output is there already that `restart` would replace.
    """

    def __init__(self, output: Path, restart: bool = False):
        self.output, self.path = output, journal_of(output)
        self.header: dict | None = None
        self.places: dict[int, tuple[int, int]] = {}
        self._end = 0  # bytes up to the last whole line
        if not output.parent.is_dir():
            raise JobError("no such folder", path=output.parent, hint="make it, or name another --output")
        if output.exists() and not output.is_file():
            raise JobError("the output is not a file", path=output, hint="name another --output")
        self._file = _open_locked(self.path)
        try:
            if not restart:
                self._read()
                if self.header is None and output.exists():
                    raise JobError(
                        "the output is there already, complete", path=output,
                        hint="--restart answers all lines again and replaces it; another --output leaves it",
                    )  # fmt: skip
        except BaseException:
            self.close()
            raise

    def begin(self, job: dict, numbers: Iterable[int], keep: dict) -> None:
        """Go on with the journal if it is of this `job` (name -> what decides its answers); start one where there is none.

        numbers: the lines that get an answer. keep: more for the header of a new journal.
        """
        if not self.places:  # nothing to lose, whatever job it was
            self.header, self._end = None, 0
        else:
            self._compare(job)
            if strange := sorted(self.places.keys() - set(numbers)):
                raise self._damaged(f"line {strange[0]} of the input", "an answer, though it gets none")
        with _told("cannot write the journal", self.path, "free some space, or name another --output"):
            self._file.truncate(self._end)  # without a line that was cut short
            if self.header is None:
                self.header = {"format": FORMAT, **keep, "job": job}
                self._append(as_line(self.header))
                sync_path(self.path.parent)

    def add(self, number: int, record: dict) -> None:
        """Keep one answer; it is on the disk when this returns."""
        line, offset = as_line(record), self._end
        hint = "what is finished is kept; free some space there"
        try:
            with _told("cannot write the journal", self.path, hint):
                self._append(line)
        finally:
            if self._end > offset:  # also where an interrupt came right behind the write
                self.places[number] = offset, len(line)

    def finish(self, numbers: Iterable[int], others: dict[int, dict]) -> None:
        """Write the output, its lines in the order of `numbers`, from the journal or from `others`; end the journal."""
        ordered = ordered_of(self.output)
        hint = "all answers are kept; free some space there"
        with _told("cannot write the output", self.output, hint):
            try:
                self._write(ordered, numbers, others)
                os.replace(ordered, self.output)
            except OSError:
                with suppress(OSError):
                    ordered.unlink(missing_ok=True)
                raise
            sync_path(self.output.parent)
            self.path.unlink()

    def _write(self, ordered: Path, numbers: Iterable[int], others: dict[int, dict]) -> None:
        with suppress(FileNotFoundError):
            os.unlink(ordered)  # left by a killed process, or a link that somebody planted
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
        """Unlock. A journal that was never begun leaves nothing behind."""
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
            # an interrupt during fsync, which may take long: the line is whole, and will be read
            if written == len(line):
                self._end += len(line)
            raise
        self._end += len(line)

    def _read(self) -> None:
        """Header and places. A last line that was cut short does not count; any other damage is refused."""
        with _told("cannot read the journal", self.path), open(self.path, "rb") as file:
            first = file.readline()
            if not first.endswith(b"\n") and (first.startswith(MAGIC) or MAGIC.startswith(first)):
                return  # empty, or killed in its first line
            self.header = _parse(first)
            if self.header is None or self.header.get("format") != FORMAT or "job" not in self.header:
                raise JobError(
                    "this is no journal that can be read", path=self.path, expected=FORMAT,
                    found=first[:60].decode(errors="replace").strip(), hint=RESTART,
                )  # fmt: skip
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

    def _compare(self, job: dict) -> None:
        kept = self.header["job"]
        names = [name for name in {**kept, **job} if kept.get(name) != job.get(name)]
        if names:
            found = [f"{name}: {_short(kept.get(name))} there, {_short(job.get(name))} now" for name in names]
            raise JobError(
                "the journal belongs to another job", path=self.path, found="; ".join(found),
                hint=f"{RESTART}; or give the options as they were",
            )  # fmt: skip

    def _damaged(self, key: str, found: str) -> JobError:
        return JobError("the journal is damaged", path=self.path, key=key, found=found, hint=RESTART)


def journal_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def ordered_of(output: Path) -> Path:
    """The temporary file that becomes the output. Always the same one: a killed process leaves no second."""
    return output.with_name(f"{output.name}.partial.ordered")


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _parse(line: bytes) -> dict | None:
    """The object on a whole line, None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _open_locked(path: Path):
    """The file, new where there was none, locked against other processes until it is closed; never through a link."""
    if not CAN_LOCK:
        raise JobError("jobs need file locks, which this system lacks", path=path, expected="Linux or macOS")
    with _told("cannot open the journal", path, "name another --output"):
        try:
            return open_locked(path)
        except BlockingIOError:
            raise JobError(
                "another process is at work on this output", path=path, hint="wait for it, or name another --output"
            ) from None  # fmt: skip


@contextmanager
def _told(what: str, path: Path, hint: str | None = None) -> Iterator[None]:
    """OSErrors as one message."""
    try:
        yield
    except OSError as error:
        raise JobError(what, path=path, found=error.strerror or error, hint=hint) from error
