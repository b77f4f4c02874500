"""One checksum per weight file: made by `convert`, kept in the index, verified while the file is read.

Bytes of safetensors files and the index only: no models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_128

from mixtral_offload.errors import CheckpointError
from mixtral_offload.system.files import read_small
from mixtral_offload.weights.safetensors_io import (
    STEP_BYTES,
    FileCheck,
    StoredTensor,
    header_bytes,
    read_header,
)

#: XXH3-128 over the digest of the header and the digests of the tensors in the order of their bytes. So it
#: follows from tensors that were read one by one, in any order, by any thread, without a second pass over the
#: file. It finds damage; it is no signature against a forger. The index states this text; another text means
#: another rule.
ALGORITHM = "xxh3-128 of header and tensors, 1"


def combine(header: bytes, digests: Iterable[bytes]) -> str:
    """Compute a file's checksum from its raw header and its tensors' digests, in the order of their bytes."""
    whole = xxh3_128(xxh3_128(header).digest())
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


class Ledger(FileCheck):
    """The state of one file's verification, until all of its tensors have been read once.

    It has no lock (two threads that finish a file both compare it), so that a checkpoint can be copied and
    pickled.

    Attributes:
        tensors: Byte offset -> number of bytes, in order. Tensors without bytes belong to the header alone.
        digests: Byte offset -> digest of what was read.
        error: What is wrong with the file; None so far.
    """

    def __init__(self, path: Path, expected: str, tensors: Iterable[StoredTensor], finite: bool = False):
        self.path, self.expected, self.finite = path, expected, finite
        self.header = header_bytes(path)
        self.tensors = {
            of.offset: of.n_bytes for of in sorted(tensors, key=lambda of: of.offset) if of.n_bytes
        }
        self.digests: dict[int, bytes] = {}
        self.error: CheckpointError | None = None

    @property
    def is_done(self) -> bool:
        """Whether the whole file has been read, and is right."""
        return self.error is None and len(self.digests) == len(self.tensors)

    def begin(self) -> xxh3_128 | None:
        """Return a hash for one tensor's bytes; None if the file has been verified already."""
        if self.error is not None:
            raise self.error
        return None if self.is_done else xxh3_128()

    def add(self, offset: int, digest: bytes) -> None:
        """Add the digest of the tensor at this offset; raise CheckpointError if the whole file is wrong."""
        self.digests[offset] = digest
        if len(self.digests) < len(self.tensors):
            return
        found = combine(self.header, (self.digests[offset] for offset in self.tensors))
        if found != self.expected:
            self.error = damaged(self.path, self.expected, found)
            raise self.error

    def finish(self) -> None:
        """Read what has not been read yet, to verify the whole file; raise CheckpointError if it is wrong."""
        left = [(offset, n) for offset, n in self.tensors.items() if offset not in self.digests]
        for offset, n_bytes in left:
            StoredTensor(self.path, torch.uint8, (n_bytes,), offset, n_bytes, check=self).read()


def damaged(path: Path, expected: str, found: str) -> CheckpointError:
    """Make the error for a file with another checksum."""
    return CheckpointError(
        "a file is damaged: its checksum is not the one in the index",
        path=path,
        expected=expected,
        found=found,
        hint="copy or download this file again, or convert again",
    )


def stated(index: Path) -> dict[str, str]:
    """Return file name -> checksum, as the index states it; empty if it states none or does not exist."""
    return _read(index)[0]


def stated_small(index: Path) -> dict[str, str]:
    """Return the checksums of small files (configuration, tokenizer, template) by name, as the index states
    them.

    Users edit these files on purpose: only `verify` compares them. Folders of earlier versions state none.
    """
    entry = _entry(index)
    files = entry.get("small_files", {}) if entry is not None else {}
    if not _is_checksums(files) or any(Path(name).name != name for name in files):
        raise _unreadable(index, "metadata.checksums.small_files", "{name: checksum}", files)
    return files


def checksum_of_bytes(data: bytes | str) -> str:
    """Compute the checksum of a small file with this content."""
    return xxh3_128(data.encode() if isinstance(data, str) else data).hexdigest()


def checksum_of_small(path: Path) -> str:
    """Read a small file and compute its checksum; raises OSError as `read_small` does."""
    return checksum_of_bytes(read_small(path))


def _read(index: Path) -> tuple[dict[str, str], bool]:
    """`stated`, and whether all numbers were finite when the checksums were made."""
    entry = _entry(index)
    return (entry["files"], entry.get("finite") is True) if entry is not None else ({}, False)


def _entry(index: Path) -> dict | None:
    """What the index keeps, see `as_metadata`; None if it keeps nothing or does not exist."""
    if not index.is_file():
        return None
    try:
        metadata = json.loads(index.read_bytes()).get("metadata")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "cannot read the index", path=index, found=repr(error)[:200], hint="download this file again"
        ) from error
    if not isinstance(metadata, dict) or "checksums" not in metadata:
        return None
    entry = metadata["checksums"]
    if (
        not isinstance(entry, dict)
        or entry.get("algorithm") != ALGORITHM
        or not _is_checksums(entry.get("files"))
    ):
        expected = f'{{"algorithm": "{ALGORITHM}", "files": {{name: checksum}}}}'
        raise _unreadable(index, "metadata.checksums", expected, entry)
    return entry


def _is_checksums(files: object) -> bool:
    return isinstance(files, dict) and all(isinstance(text, str) for text in files.values())


def _unreadable(index: Path, key: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        "cannot read the index's checksums",
        path=index,
        key=key,
        expected=expected,
        found=repr(found)[:80],
        hint="use the version of mixtral_offload that made this folder, or convert again",
    )


def as_metadata(files: dict[str, str], finite: bool, small: Mapping[str, bytes | str]) -> dict:
    """Make the index's entry.

    Args:
        files: Name -> checksum, of the weights.
        finite: Whether all numbers in them are known to be finite: a reader that verifies the checksum of a
            file then need not test its numbers.
        small: Name -> content, of the other files. Earlier versions ignore their checksums.
    """
    return {
        "algorithm": ALGORITHM,
        "finite": finite,
        "files": dict(sorted(files.items())),
        "small_files": {name: checksum_of_bytes(data) for name, data in sorted(small.items())},
    }


Headers = dict[Path, dict[str, StoredTensor]]


def with_checks(index: Path, headers: Headers) -> Headers:
    """Return the same headers, their tensors verified against the index's checksums as they are read.

    Args:
        headers: File -> key -> tensor, for all files of the checkpoint.

    Raises:
        CheckpointError: If the index has checksums, but none for one of these files.
    """
    files, finite = _read(index)
    if not files:
        return headers
    checked: Headers = {}
    for path, header in headers.items():
        if path.name not in files:
            raise CheckpointError(
                "the index has no checksum for this file",
                path=path,
                found=f"checksums of {len(files)} other files",
                hint="copy the whole folder again: index and files belong together",
            )
        ledger = Ledger(path, files[path.name], header.values(), finite)
        checked[path] = {key: replace(of, check=ledger) for key, of in header.items()}
    return checked


def finish_checks(tensors: Iterable[StoredTensor]) -> None:
    """Verify the files of these tensors completely, including what has not been read."""
    for ledger in {id(of.check): of.check for of in tensors if of.check is not None}.values():
        ledger.finish()


def checksum_of(path: Path) -> str:
    """Read a safetensors file and compute its checksum."""
    digests = []
    for tensor in in_order(read_header(path)):
        digest = xxh3_128()
        for piece in pieces_of(tensor):
            digest.update(piece.numpy().data)
        digests.append(digest.digest())
    return combine(header_bytes(path), digests)


def checksum_of_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Compute the checksum of a file that holds these tensors (on the CPU); read only its header."""
    header = read_header(path)
    keys = {of.offset: key for key, of in header.items() if of.n_bytes}
    flat = (tensors[keys[offset]].contiguous().reshape(-1).view(torch.uint8) for offset in sorted(keys))
    return combine(header_bytes(path), (xxh3_128(data.numpy().data).digest() for data in flat))


def in_order(header: dict[str, StoredTensor]) -> list[StoredTensor]:
    """Return the tensors that have bytes, in the order of their bytes."""
    return sorted((of for of in header.values() if of.n_bytes), key=lambda of: of.offset)


def pieces_of(tensor: StoredTensor) -> Iterator[Tensor]:
    """Yield the tensor's bytes (uint8) in pieces, all in the same buffer."""
    buffer = torch.empty(min(tensor.n_bytes, STEP_BYTES), dtype=torch.uint8)
    with open(tensor.path, "rb", buffering=0) as file:
        for start in range(0, tensor.n_bytes, STEP_BYTES):
            piece = buffer[: tensor.n_bytes - start]
            tensor.fill(file, piece, start)
            yield piece
