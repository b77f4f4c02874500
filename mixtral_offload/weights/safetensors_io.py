"""The tensors of one safetensors file: where their bytes are, and how to read them directly into place.

Bytes are checked while they are in the processor's cache: finite numbers, and the file's checksum. No models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixtral_offload.errors import CheckpointError

DTYPES = {
    "U8": torch.uint8, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "I8": torch.int8, "I16": torch.int16, "I64": torch.int64, "F64": torch.float64, "BOOL": torch.bool,
}  # fmt: skip
N_READERS = 4
PART_BYTES = 4 << 20
MOST_HEADER_BYTES = 32 << 20  # of one file: about 200,000 tensors (the format allows 100 MB)
#: of all files of a checkpoint together. DeepSeek-V3 has 91,991 tensors in 163 files, Kimi-K2 some 200,000
#: before it is packed; packed, a matrix has up to eight. An entry takes 100 to 180 bytes there, and some 700
#: in memory: 2 GB at most.
MOST_TENSORS = 3_000_000
MOST_HEADERS_BYTES = 512 << 20
#: read and checked at a time: small enough to be still in the second-level cache when it is hashed
STEP_BYTES = 256 << 10
#: dtype -> integers of the same size, all bits but the sign, and what those bits are at least where a value
#: is not finite
NOT_FINITE = {
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}
AGAIN = "delete this file and download it again"


class Hash(Protocol):
    """A hash under way, as of hashlib or xxhash."""

    def update(self, data: memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


class FileCheck(Protocol):
    """Verifies one file while its tensors are read: see `checksums.Ledger`.

    Attributes:
        error: What is wrong with the file.
        finite: Whether a file of this checksum is known to have finite numbers only.
    """

    error: CheckpointError | None
    finite: bool

    def begin(self) -> Hash | None: ...

    def add(self, offset: int, digest: bytes) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are.

    Attributes:
        offset: Absolute position in the file, in bytes.
        key: The tensor's name in the file.
        check: Verifies the file as its tensors are read, if it has a checksum.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    key: str = field(default="", compare=False)
    check: FileCheck | None = field(default=None, compare=False, repr=False)

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return self.n_bytes // self.dtype.itemsize

    def rows(self, start: int, n: int, columns: int) -> StoredTensor:
        """Return `n` rows from `start` on, as a tensor `[n, columns]`.

        The whole tensor is seen as a matrix of `columns` columns.
        """
        row = columns * self.dtype.itemsize
        return StoredTensor(self.path, self.dtype, (n, columns), self.offset + start * row, n * row, self.key)

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Read the tensor into new memory; convert and move a few MB at a time, so that it is never there
        twice.

        Raises:
            CheckpointError: If the file is damaged, or a value is not finite or not within the range of
                `dtype`.
        """
        value = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        with open(self.path, "rb", buffering=0) as file:
            if value.dtype == self.dtype and value.device.type == "cpu":
                self.read_into(file, value.view(-1).view(torch.uint8))
                return value
            watch, part = Watch(self), torch.empty(min(self.n_bytes, PART_BYTES), dtype=torch.uint8)
            for start in range(0, self.n_bytes, PART_BYTES):
                piece = part[: self.n_bytes - start]
                self._read_part(file, piece, start, watch)
                begin = start // self.dtype.itemsize
                target = value.view(-1)[begin:][: len(piece) // self.dtype.itemsize]
                target.copy_(piece.view(self.dtype))
                if target.dtype == torch.float16 != self.dtype and not is_finite(target):
                    raise CheckpointError(
                        "weights are beyond the range of float16",
                        path=self.path,
                        key=self.key,
                        expected="at most 65504",
                        found=f"{piece.view(self.dtype).abs().max():g}",
                        hint='use dtype="bfloat16" or "float32"',
                    )
        return value

    def read_into(self, file: FileIO, data: Tensor, start: int = 0) -> None:
        """Fill `data` (uint8, contiguous, CPU) with the tensor's bytes from `start` on, checked."""
        self._read_part(file, data, start, Watch(self))

    def _read_part(self, file: FileIO, data: Tensor, start: int, watch: Watch) -> None:
        for at in range(0, len(data), STEP_BYTES):
            step = data[at : at + STEP_BYTES]
            self.fill(file, step, start + at)
            watch.see(start + at, step)

    def fill(self, file: FileIO, data: Tensor, start: int) -> None:
        """Fill `data` (uint8, contiguous, CPU) with the tensor's bytes from `start` on, unchecked."""
        file.seek(self.offset + start)
        rest = data.numpy().data
        while rest:
            n_read = file.readinto(rest)  # one call reads 2 GiB at most
            if not n_read:
                raise CheckpointError(
                    "file ends too early",
                    path=self.path,
                    expected=f"{self.offset + self.n_bytes} bytes or more",
                    found=f"{len(rest)} fewer",
                    hint=AGAIN,
                )
            rest = rest[n_read:]


class Watch:
    """Checks a tensor's bytes as they arrive, in order: finite values, and the digest for the checksum."""

    def __init__(self, stored: StoredTensor):
        self._stored, self._next = stored, -1
        self._hash: Hash | None = None

    def see(self, start: int, data: Tensor) -> bool:
        """Check bytes `data` (uint8, CPU) of the tensor, from `start` on.

        Returns:
            Whether the tensor has now been seen whole.

        Raises:
            CheckpointError: If a value is not finite, or if this completes the file and its checksum is
                wrong.
        """
        stored = self._stored
        if stored.dtype.is_floating_point and not (stored.check and stored.check.finite):
            check_finite(stored, data.view(stored.dtype))
        if start == 0:
            self._next, self._hash = 0, stored.check.begin() if stored.check else None
        if start != self._next:  # out of order: `FileCheck.finish` reads it again
            self._next = -1
            return False
        if self._hash is not None:
            self._hash.update(data.numpy().data)
        self._next += len(data)
        if self._next < stored.n_bytes:
            return False
        if self._hash is not None and stored.check is not None:
            stored.check.add(stored.offset, self._hash.digest())
        return True


def is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite; 10 times as fast as `isfinite` on half precision."""
    if values.dtype not in NOT_FINITE or not values.numel():
        return bool(values.isfinite().all())
    integers, mask, least = NOT_FINITE[values.dtype]
    return bool((values.view(integers) & mask).max() < least)


def check_finite(stored: StoredTensor, values: Tensor) -> None:
    """Raise a CheckpointError, naming file and tensor, if a value is NaN or infinite."""
    if not is_finite(values):
        n_wrong = int((~values.isfinite()).sum())
        raise CheckpointError(
            "weights are not finite",
            path=stored.path,
            key=stored.key,
            expected="finite numbers",
            found=f"{n_wrong} NaN or infinite in a piece of {values.numel()} values",
            hint="download or convert this checkpoint again; if its original file is so, it cannot be used",
        )


def in_threads(tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Call each (function, *arguments), several at a time; yield their results, in order."""
    pool = ThreadPoolExecutor(N_READERS)
    try:
        for task in [pool.submit(*task) for task in tasks]:
            yield task.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by key.

    Raises:
        CheckpointError: If the file is missing, truncated or of another format.
    """
    try:
        size = path.stat().st_size
        header, begin = _parse(path)
        needed = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size < needed:
            raise CheckpointError(
                "file is truncated", path=path, expected=f"{needed} bytes", found=f"{size} bytes", hint=AGAIN
            )
        with safe_open(path, "pt"):
            pass  # the library's own checks: no overlap, no gap, sizes as the shapes say
    except FileNotFoundError:
        hint = "download the checkpoint again; finished files are kept"
        raise CheckpointError("file is missing", path=path, hint=hint) from None
    except OSError as error:
        raise CheckpointError("cannot read the file", path=path, found=error.strerror) from error
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "not a whole safetensors file",
            path=path,
            expected="a header, then the bytes that it states",
            found=f"{size} bytes; {type(error).__name__}: {error}",
            hint=AGAIN,
        ) from None
    return {key: _stored(path, key, entry, begin) for key, entry in header.items()}


def read_headers(paths: Iterable[Path]) -> dict[Path, dict[str, StoredTensor]]:
    """Read the header of each file of a checkpoint; refuse files that together exceed any checkpoint."""
    headers: dict[Path, dict[str, StoredTensor]] = {}
    n_tensors = n_bytes = 0
    for path in paths:
        headers[path] = read_header(path)
        n_tensors += len(headers[path])
        n_bytes += header_length(path)
        if n_tensors > MOST_TENSORS or n_bytes > MOST_HEADERS_BYTES:
            raise CheckpointError(
                "the headers of this checkpoint's files are too large together",
                path=path.parent,
                expected=f"at most {MOST_TENSORS:,} tensors, and {MOST_HEADERS_BYTES >> 20} MiB of headers",
                found=f"{n_tensors:,} tensors and {n_bytes:,} bytes in the first {len(headers):,} files",
                hint="check where these files come from: they are larger than those of any model",
            )
    return headers


def header_length(path: Path) -> int:
    """Return the bytes of the header, as the file states them."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")


def header_bytes(path: Path) -> bytes:
    """Return the raw header, everything in front of the data, of a file that `read_header` accepts."""
    with open(path, "rb") as file:
        n_header = file.read(8)
        return n_header + file.read(int.from_bytes(n_header, "little"))


def _parse(path: Path) -> tuple[dict[str, dict], int]:
    """Key -> entry; where the data begins."""
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if (
            MOST_HEADER_BYTES < n_header < path.stat().st_size
        ):  # as objects, a header takes about ten times its bytes
            raise CheckpointError(
                "the header is too large",
                path=path,
                expected=f"at most {MOST_HEADER_BYTES >> 20} MiB",
                found=f"{n_header:,} bytes",
                hint=AGAIN,
            )
        header = json.loads(file.read(min(n_header, MOST_HEADER_BYTES)))
    header.pop("__metadata__", None)
    return header, 8 + n_header


def _stored(path: Path, key: str, entry: dict, data_begin: int) -> StoredTensor:
    if str(entry["dtype"]).startswith(("F8", "F6", "F4")):
        raise CheckpointError(
            f"the weights are quantized in another format ({entry['dtype'][:20]}), which is not supported",
            path=path,
            key=key,
            expected="weights in 16 or 32 bits, or a checkpoint that mixtral-offload convert wrote",
            found=entry["dtype"][:20],
            hint="take the model's unquantized checkpoint; mixtral-offload convert makes any bit width of it",
        )
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            "unknown dtype",
            path=path,
            key=key,
            expected=", ".join(DTYPES),
            found=entry["dtype"],
            hint="convert the file to one of these dtypes",
        )
    begin, end = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    return StoredTensor(path, dtype, shape, data_begin + begin, end - begin, key)
