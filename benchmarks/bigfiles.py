"""The big packed checkpoint of `fullsize.py`: its size, making it, and reading it plainly."""

from __future__ import annotations

import json
import os
import shutil
import time
from math import prod
from pathlib import Path

from contestants import drop_page_cache
from processes import log
from shapes import Shape
from synthetic import write_checkpoint

from mixtral_offload.errors import CapacityError, CheckpointError
from mixtral_offload.units import gb
from mixtral_offload.weights.hqq import PAPER, field_specs

SPARE_BYTES = 1_000_000_000  # of disk, left free in addition to big files


def checkpoint_bytes(config: dict, bits: int) -> int:
    """Estimate the bytes that `write_checkpoint` writes."""
    shape = Shape.of(config)

    def packed(size, quantization):
        return sum(dtype.itemsize * prod(dims) for dtype, dims in field_specs(size, quantization).values())

    expert = sum(packed(size, PAPER[bits]) for size in shape.expert().values())
    attention = sum(packed(size, PAPER[4]) for size in shape.attention().values())
    return shape.layers * (shape.n_experts * expert + attention) + 4 * shape.vocab * shape.hidden


def check_disk(folder: Path, n_bytes: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes + SPARE_BYTES * (n_bytes > SPARE_BYTES) > free:
        raise CapacityError(
            f"the disk is too small for {what}",
            path=folder,
            expected=f"{gb(n_bytes)} and some to spare",
            found=f"{gb(free)} free",
            hint="choose another --folder, or fewer --layers or --accelerate-layers",
        )


def make_checkpoint(folder: Path, config: dict, bits: int) -> tuple[bool, float]:
    """Write the packed checkpoint unless it is there.

    Returns:
        Whether it was written, and the seconds that this took.

    Raises:
        CheckpointError: The folder holds one of another shape.
    """
    if (folder / "config.json").is_file():
        found = json.loads((folder / "config.json").read_text())
        if found != config | {"bits": bits}:
            differing = {
                key: found.get(key)
                for key in (*config, "bits")
                if found.get(key) != (config | {"bits": bits})[key]
            }
            raise CheckpointError(
                "the folder holds a checkpoint of another shape",
                path=folder,
                found=differing,
                expected={key: (config | {"bits": bits})[key] for key in differing},
                hint="choose another --folder",
            )
        return False, 0.0
    n_bytes = checkpoint_bytes(config, bits)
    check_disk(folder.parent, n_bytes, "the checkpoint")
    log(f"writing {gb(n_bytes)} of random packed weights")
    began, part = time.perf_counter(), folder.with_name(folder.name + ".part")
    if part.exists():
        shutil.rmtree(part)  # left by a run that was interrupted
    write_checkpoint(part, config | {"bits": bits}, PAPER[bits], PAPER[4])
    part.rename(folder)
    os.sync()
    return True, time.perf_counter() - began


def cold_read(folder: Path, most_bytes: int = 2_000_000_000) -> float:
    """Measure bytes per second of reading the checkpoint's files once, outside of the page cache."""
    drop_page_cache(folder)
    buffer, n_bytes, began = bytearray(64 << 20), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        if n_bytes >= most_bytes:
            break
        with open(path, "rb", buffering=0) as file:
            while n := file.readinto(buffer):
                n_bytes += n
    return n_bytes / (time.perf_counter() - began)
