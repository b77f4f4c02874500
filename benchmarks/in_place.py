"""Experts on disk: read into a slot and computed there, or computed from the file's mapping.

    python benchmarks/in_place.py --folder FOLDER

Files of one expert each, of Mixtral-8x7B's shape at 2 bits, laid out as a slot is: the best case for a
mapping. Cold ones are dropped from the system's page cache before each turn; warm ones are in it. One token
is computed. Ways take turns. Writes benchmarks/results/in-place.json.
"""

import argparse
import io
import json
import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from machine import machine, words
from products import random_matrix

from mixtral_offload.runtime.store import FilePart, host_slab
from mixtral_offload.weights.hqq import PAPER
from mixtral_offload.weights.layout import ExpertLayout
from mixtral_offload.weights.native import find_native

RESULTS = Path(__file__).parent / "results"
HIDDEN, INTERMEDIATE = 4096, 14336
SHAPES = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
WAYS = ("slot", "mapping", "mapping, read ahead")


def write_experts(folder: Path, n: int) -> tuple[ExpertLayout, list[Path]]:
    """Write n random experts, each as a slot holds it."""
    fields = {of: random_matrix(shape, PAPER[2], "cpu") for of, shape in SHAPES.items()}
    sizes = {
        (of, name): (value.dtype, value.numel())
        for of, each in fields.items()
        for name, value in each.items()
    }
    layout = ExpertLayout.build(HIDDEN, INTERMEDIATE, sizes, folder, "random")
    row = torch.zeros(layout.n_bytes, dtype=torch.uint8)
    for of, views in layout.views(row).items():
        for name, view in views.items():
            view.copy_(fields[of][name].view(view.shape))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.expert" for i in range(n)]
    for path in paths:
        path.write_bytes(row.numpy().data)
    os.sync()
    return layout, paths


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    here = machine()
    print(words(here), flush=True)
    layout, paths = write_experts(arguments.folder, arguments.experts)
    native, why_not = find_native()
    if native is None:
        raise SystemExit(why_not)
    experts, x = native.experts(layout), torch.randn(1, HIDDEN)
    slot, pool = host_slab(1, layout.n_bytes)[0], ThreadPoolExecutor(1)

    def open_file(path: Path) -> io.FileIO:
        return open(path, "rb", buffering=0)

    def from_slot(path: Path) -> torch.Tensor:
        FilePart(open_file, pool, path, 0, layout.n_bytes, ahead=(0, layout.n_bytes)).read_into(slot)
        return experts.run(x, [slot.data_ptr()])

    def from_mapping(path: Path, ahead: bool) -> torch.Tensor:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        if ahead:
            mapped.madvise(mmap.MADV_WILLNEED)
        view = torch.frombuffer(mapped, dtype=torch.uint8)
        return experts.run(x, [view.data_ptr()])

    ways = {
        "slot": from_slot,
        "mapping": lambda path: from_mapping(path, False),
        "mapping, read ahead": lambda path: from_mapping(path, True),
    }
    expected = from_slot(paths[0])
    times: dict[str, list[float]] = {f"{state}: {name}": [] for state in ("cold", "warm") for name in ways}
    times["in RAM"] = []
    for turn in range(arguments.turns + 1):  # the first one warms up
        for i, path in enumerate(paths):
            name = WAYS[(i + turn) % len(WAYS)]
            drop(path)
            for state in ("cold", "warm"):
                began_s = time.perf_counter()
                found = ways[name](path)
                if turn:
                    times[f"{state}: {name}"].append(time.perf_counter() - began_s)
                assert torch.equal(found, expected)
            began_s = time.perf_counter()
            experts.run(x, [slot.data_ptr()])
            if turn:
                times["in RAM"].append(time.perf_counter() - began_s)
    medians = {name: statistics.median(of) for name, of in times.items()}
    for name, seconds in medians.items():
        print(f"{name:26} {1e3 * seconds:7.1f} ms, {layout.n_bytes / seconds / 1e9:5.2f} GB/s", flush=True)
    result = {"machine": here, "expert_bytes": layout.n_bytes, "seconds": medians}
    (RESULTS / "in-place.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
