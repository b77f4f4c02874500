"""Remove what a killed download leaves: partial files that no later download uses.

huggingface_hub's names of partial files and locks. A partial file is in use while any process holds its lock.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.utils import WeakFileLock

if TYPE_CHECKING:
    from mixtral_offload.weights.hub import Record

WAIT_S = 0.01
OLD_S = 24 * 3600  # a file of this age is not being written any more
#: the same for small files (the record, the note of a revision), which are written at once
SMALL_OLD_S = 60
log = logging.getLogger(__name__)


def remove_leftovers(job: Record) -> list[Path]:
    """Remove partial files of this repository that belong to no running download; return what was removed.

    It never fails: what cannot be removed stays, and the log says so at debug level.
    """
    removed: list[Path] = []
    try:
        for lock, paths in _partial_files(job):
            removed += _remove(lock, paths)
        small = {job.record.parent, (job.store / "refs" / str(job.revision)).parent}
        for part in (part for folder in sorted(small) for part in folder.glob(".*.part")):
            if _age_s(part) > SMALL_OLD_S:
                part.unlink(missing_ok=True)
                removed.append(part)
    except OSError as error:
        log.debug("leftovers of %s stay: %s", job.repo_id, error)
    return removed


def _partial_files(job: Record) -> Iterator[tuple[Path, list[Path]]]:
    """Each lock with the partial files that it protects."""
    if job.local_dir is None:
        by_hash: dict[str, list[Path]] = {}
        for path in (job.store / "blobs").glob("*.incomplete"):
            by_hash.setdefault(path.name.partition(".")[0], []).append(path)
        locks = job.store.parent / ".locks" / job.store.name
        yield from ((locks / f"{digest}.lock", paths) for digest, paths in by_hash.items())
        return
    base = job.local_dir / ".cache" / "huggingface" / "download"
    for name in job.files:
        metadata = base / f"{name}.metadata"
        short = base64.urlsafe_b64encode(hashlib.sha1(metadata.name.encode()).digest()).decode()
        if paths := list(metadata.parent.glob(f"{short}.*.incomplete")):
            yield base / f"{name}.lock", paths


def _remove(lock: Path, paths: list[Path]) -> list[Path]:
    removed: list[Path] = []
    with contextlib.suppress(TimeoutError):  # held: that download will end by itself
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock, timeout=WAIT_S):
            works = _excludes(lock)
            for path in paths:
                if works or _age_s(path) > OLD_S:
                    path.unlink(missing_ok=True)
                    removed.append(path)
    return removed


def _excludes(lock: Path) -> bool:
    """Whether this lock, which is held, excludes others: some network file systems grant it to all."""
    try:
        with WeakFileLock(lock, timeout=WAIT_S):
            return False
    except TimeoutError:
        return True


def _age_s(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0
