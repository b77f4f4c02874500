"""`mixtral-offload verify`: compare a checkpoint with checksums and hashes, and check its numbers."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xxhash import xxh3_128

from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import INDEX, Checkpoint, open_checkpoint
from mixtral_offload.runtime.preflight import check_loads
from mixtral_offload.system.files import SMALL_BYTES, SMALL_SUFFIXES, read_small
from mixtral_offload.units import gb
from mixtral_offload.weights.checksums import (
    checksum_of_small,
    combine,
    in_order,
    pieces_of,
    stated,
    stated_small,
)
from mixtral_offload.weights.hub import hash_of
from mixtral_offload.weights.safetensors_io import header_bytes, in_threads, is_finite, read_header

SHOWN = 5  # names in a message, at most


@dataclass(frozen=True)
class Verification:
    """What was verified of a folder; `str` of it is a report.

    Attributes:
        by_checksum: Names of weight files with the checksums of our index.
        by_hub: Names of files with the hub's hashes.
        unproven: Names of weight files with neither.
        n_files: Number of weight files.
        n_bytes: Bytes of the weight files.
        seconds: Duration.
        small_by_checksum: Names of small files with the checksums of our index.
        small_unproven: Names of small files with neither.
    """

    folder: Path
    by_checksum: tuple[str, ...]
    by_hub: tuple[str, ...]
    unproven: tuple[str, ...]
    n_files: int
    n_bytes: int
    seconds: float
    small_by_checksum: tuple[str, ...] = ()
    small_unproven: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.n_files} weight files, {gb(self.n_bytes)} read in {self.seconds:.1f} s",
            "  structure: opens, and fits the model that config.json describes",
            "  numbers: all scales, zeros and unquantized weights are finite",
        ]
        if self.by_checksum:
            lines.append(f"  checksums: {len(self.by_checksum)} files are what the index says")
        if self.small_by_checksum:
            lines.append(f"  small files: {len(self.small_by_checksum)} files are what was written here")
        if self.by_hub:
            lines.append(f"  hub: {len(self.by_hub)} files are what the hub has")
        if self.unproven:
            names = _some(self.unproven)
            lines.append(
                f"  not proven: {len(self.unproven)} weight files ({names}): the folder has no checksums of "
                "them, and no hashes of the hub; `mixtral-offload convert` writes checksums"
            )
        if self.small_unproven:
            names = _some(self.small_unproven)
            lines.append(f"  not proven: {len(self.small_unproven)} small files ({names}): without checksums")
        return "\n".join(lines)


def verify(folder: str | Path, progress: Callable[[int], object] = lambda n_bytes: None) -> Verification:
    """Check a checkpoint completely: structure, finite numbers, and all files with a known checksum or hash.

    In folders that `convert` or `save_pretrained` wrote, these include config.json, the tokenizer's files,
    generation_config.json and chat templates: one that is missing or was changed is a fault (though it may
    load). Files that were added later are none.

    Args:
        progress: Called with the bytes of each weight file that has been read.

    Raises:
        CheckpointError: For any fault; the message names all damaged files.
    """
    folder, began_s = Path(folder), time.perf_counter()
    checkpoint = open_checkpoint(folder)
    check_loads(checkpoint)
    paths = sorted({of.path for of in checkpoint.dense.values()} | _expert_files(checkpoint))
    checksums, hub = stated(folder / INDEX), hub_hashes(folder)
    wrong: list[str] = []
    tasks = ((_faults, path, checksums.get(path.name), hub.get(path.name)) for path in paths)
    for path, faults in zip(paths, in_threads(tasks)):
        wrong += [f"{path.name}: {fault}" for fault in faults]
        progress(path.stat().st_size)
    small_checksums = stated_small(folder / INDEX)
    for name, checksum in small_checksums.items():
        wrong += [f"{name}: {fault}" for fault in _small_faults(folder / name, checksum)]
    small = [name for name in hub if (folder / name).is_file() and folder / name not in paths]
    wrong += [f"{name}: is not what the hub has" for name in small if not _is_hubs(folder / name, hub[name])]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} faults in this checkpoint",
            path=folder,
            found=_some(wrong, "\n    "),
            hint="copy, download or convert these files again; a small file that was changed on purpose may "
            "stay as it is (tokenizer.save_pretrained writes some again)",
        )
    names = [path.name for path in paths]
    return Verification(
        folder,
        by_checksum=tuple(name for name in names if name in checksums),
        by_hub=tuple(name for name in (*names, *small) if name in hub),
        unproven=tuple(name for name in names if name not in checksums and name not in hub),
        n_files=len(paths),
        n_bytes=sum(path.stat().st_size for path in paths),
        seconds=time.perf_counter() - began_s,
        small_by_checksum=tuple(small_checksums),
        small_unproven=_unknown(folder, {INDEX, *small_checksums, *hub}),
    )


def _small_faults(path: Path, checksum: str) -> list[str]:
    """Faults of a small file."""
    try:
        found = checksum_of_small(path)
    except FileNotFoundError:
        return ["is missing"]
    except OSError as error:
        return [f"cannot be read: {error.strerror or error}"]
    return [] if found == checksum else [f"was changed: its checksum is {found}, not {checksum}"]


def _unknown(folder: Path, known: set[str]) -> tuple[str, ...]:
    """Names of the small files that are not among those known."""
    paths = (path for path in folder.iterdir() if path.suffix in SMALL_SUFFIXES and path.is_file())
    return tuple(sorted(path.name for path in paths if path.name not in known))


def _expert_files(checkpoint: Checkpoint) -> set[Path]:
    return {of.path for fields in checkpoint.experts.values() for of in fields.values()}


def _faults(path: Path, checksum: str | None, hub_hash: str | None) -> list[str]:
    """Faults of a weight file, found in one pass over its bytes."""
    header, faults, digests = header_bytes(path), [], []
    like_hub = _hash_like(hub_hash, path.stat().st_size)
    like_hub.update(header)
    for tensor in in_order(read_header(path)):
        digest, finite = xxh3_128(), True
        for piece in pieces_of(tensor):
            data = piece.numpy().data
            digest.update(data)
            like_hub.update(data)
            finite = finite and (not tensor.dtype.is_floating_point or is_finite(piece.view(tensor.dtype)))
        digests.append(digest.digest())
        if not finite:
            faults.append(f"{tensor.key} is not finite")
    found = combine(header, digests)
    if checksum is not None and found != checksum:
        faults.append(f"its checksum is {found}, not {checksum}")
    if hub_hash is not None and like_hub.hexdigest() != hub_hash:
        faults.append(f"its hash is {like_hub.hexdigest()}, the hub's is {hub_hash}")
    return faults


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class _NoHash:
    def update(self, data: bytes | memoryview, /) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def _hash_like(digest: str | None, n_bytes: int) -> _Hash:
    """A hash of the digest's kind: sha256 (64 digits), git's sha1 of a blob, or one that computes nothing."""
    if digest is None:
        return _NoHash()
    return hashlib.sha256() if len(digest) == 64 else hashlib.sha1(b"blob %d\0" % n_bytes)


def _is_hubs(path: Path, digest: str) -> bool:
    return path.stat().st_size <= SMALL_BYTES and hash_of(path, digest) == digest


def hub_hashes(folder: Path) -> dict[str, str]:
    """Return file name -> the hub's hash, if a download left it.

    It is in our own records, or the name of the blob that a link in the hub's cache points to.
    """
    hashes = dict(_blobs(folder))
    for record in _records(folder):
        hashes |= record
    return hashes


def _blobs(folder: Path) -> Iterator[tuple[str, str]]:
    blobs = folder.absolute().parent.parent / "blobs"
    for path in folder.iterdir() if blobs.is_dir() else ():
        target = path.resolve()
        if path.is_symlink() and target.parent == blobs.resolve() and _is_hash(target.name):
            yield path.name, target.name


def _records(folder: Path) -> Iterator[dict[str, str]]:
    """What `hub.Record` has written about this folder."""
    whole = folder.absolute()
    places: list[tuple[Path, str | None]] = [(whole / ".cache" / "mixtral_offload", None)]
    if whole.parent.name == "snapshots":
        places.append((whole.parent.parent / "mixtral_offload", whole.name))
    for place, commit in places:
        for path in sorted(place.glob("*.json")) if place.is_dir() else ():
            try:
                of, files, _ = json.loads(read_small(path))
                known = {name: entry[1] for name, entry in files.items() if _is_hash(entry[1])}
            except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
                continue  # a damaged record
            if commit is None or of == commit:
                yield known


def _is_hash(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = f"{between}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more
