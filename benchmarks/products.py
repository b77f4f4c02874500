"""How fast a quantized matrix is multiplied straight from its packed bytes, at every bit width.

    python benchmarks/products.py [--device cuda] [--shape 14336 4096] [--without compiled]

For one token (a matrix-vector product): packed bytes per second of the package's kernels (exact and fast), of
torch.compile's, of dequantizing first, and of the library's product in fp32, compared with this device's
copies. For a prompt: the same ways, compared with the library's product alone. The ways take turns, over
several copies of the matrix that no cache holds, on the CPU in huge pages, as the package's slots are. Writes
benchmarks/results/kernels-NAME.json, named after the kernels or the device.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from machine import machine, words
from synthetic import random_fields
from torch.nn import functional as F

from mixtral_offload.runtime.store import host_slab
from mixtral_offload.weights import kernels as compiled
from mixtral_offload.weights.hqq import PAPER, Quantization, dequantize, matmul
from mixtral_offload.weights.layout import ALIGNMENT
from mixtral_offload.weights.native import find_native

RESULTS = Path(__file__).parent / "results"
WIDTHS = {
    **{f"{bits}-bit": PAPER[bits] for bits in (2, 3, 4, 8, 16)},
    "3-bit, ten in 32 bits": Quantization(3, 64, 128, True),
    "2-bit, fp16 scales": Quantization(2, 16),
    "4-bit, fp16 scales": Quantization(4, 64),
}
#: bytes of all copies of a matrix: more than a processor's cache
SPREAD_BYTES = 300_000_000
#: a matrix of the shipped model, which a processor's cache does hold
SMALL = (256, 192)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(14336, 4096), help="rows and columns of the matrix"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=[*WIDTHS])
    parser.add_argument("--without", nargs="+", default=(), help="ways to leave out")
    return parser.parse_args()


def take_turns(ways: dict, turns: int, device: str) -> dict[str, float]:
    """Median seconds of each way; every turn runs all of them."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):  # the first two warm up
        for name, way in ways.items():
            begin = _now(device)
            way()
            if turn > 1:
                times[name].append(_now(device) - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_matrix(shape, quantization: Quantization, device: str) -> dict:
    """Random packed words; scales and zeros that differ, so that a mistake in them shows."""
    generator = torch.Generator().manual_seed(0)
    fields = random_fields(shape, quantization, generator)
    if "meta.zero_q" in fields:
        fields["meta.zero_q"].random_(100, 156, generator=generator)
    for name in ("meta.scale", "meta.meta_scale.scale"):
        if name in fields:
            fields[name] *= torch.rand(fields[name].shape, generator=generator) + 0.5
    return {name: value.to(device) for name, value in fields.items()}


def in_one_row(fields: dict) -> dict:
    """A copy of a matrix in one piece of memory, aligned as in the package's rows."""
    sizes = [-(-value.nbytes // ALIGNMENT) * ALIGNMENT for value in fields.values()]
    device = next(iter(fields.values())).device
    is_cpu = device.type == "cpu"
    row = host_slab(1, sum(sizes))[0] if is_cpu else torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    copies = {}
    for (name, value), part in zip(fields.items(), row.split(sizes)):
        copies[name] = part[: value.nbytes].view(value.dtype).view(value.shape).copy_(value)
    return copies


def ways_of(arguments: argparse.Namespace, shape, quantization: Quantization) -> dict:
    """The ways to multiply: name -> function of x and a matrix's fields."""
    native = find_native()[0] if arguments.device == "cpu" else None
    ways = {
        "compiled": compiled.linear,
        "dequantized first": matmul,
    }
    if native is not None:
        ways = {"exact": native.linear, "fast": lambda *of: native.linear(*of, fast=True)} | ways
    return {
        name: lambda x, fields, way=way: way(x, fields, shape, quantization)
        for name, way in ways.items()
        if name not in arguments.without
    }


def measure(shape, quantization: Quantization, arguments: argparse.Namespace, copy) -> dict:
    """Measure one width: seconds of each way, and its error against the dequantized fp32 matrix."""
    device, dtype = arguments.device, torch.float32 if arguments.device == "cpu" else torch.float16
    fields = random_matrix(shape, quantization, device)
    n_bytes = sum(value.numel() * value.element_size() for value in fields.values())
    n_copies = 1 + min(SPREAD_BYTES // n_bytes, 15)
    many = itertools.cycle([in_one_row(fields) for _ in range(n_copies)])
    x = torch.randn(arguments.prompt, shape[1], device=device, dtype=dtype)
    ways, row = ways_of(arguments, shape, quantization), {"bytes": n_bytes, "error": {}, "prompt_error": {}}
    weight = dequantize(fields, shape, quantization, torch.float32)
    expected = x.float() @ weight.T
    for name, way in ways.items():  # compiles
        for of, key, n in ((x[:1], "error", 1), (x, "prompt_error", len(x))):
            row[key][name] = ((way(of, fields) - expected[:n]).norm() / expected[:n].norm()).item()
    weight = weight.to(dtype)
    library = "library, fp32" if dtype == torch.float32 else "library, 16 bits"
    token = {name: lambda way=way: way(x[:1], next(many)) for name, way in ways.items()}
    token |= {library: lambda: F.linear(x[:1], weight), "copy": copy}
    row["token_s"] = take_turns(token, arguments.turns, device)
    prompt = {name: lambda way=way: way(x, next(many)) for name, way in ways.items() if name != "fast"}
    prompt |= {library: lambda: F.linear(x, weight)}
    row["prompt_s"] = take_turns(prompt, max(3, arguments.turns // 3), device)
    return row


def main() -> None:
    arguments = parse()
    shape, device = tuple(arguments.shape), arguments.device
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.zeros_like(source)
    result = {"machine": machine(device), "shape": shape, "small": SMALL, "prompt": arguments.prompt}
    result |= {"widths": {}, "small_widths": {}}
    print(words(result["machine"]), flush=True)
    with torch.no_grad():
        for label in arguments.widths:
            quantization = WIDTHS[label]
            row = measure(shape, quantization, arguments, lambda: target.copy_(source))
            seconds, prompt = row["token_s"], row["prompt_s"]
            row["gb_per_s"] = {
                name: row["bytes"] / s / 1e9 for name, s in seconds.items() if name in row["error"]
            }
            row["copy_gb_per_s"] = 2 * source.numel() / seconds["copy"] / 1e9
            result["widths"][label] = row
            speeds = ", ".join(
                f"{name} {speed:.1f} GB/s ({row['error'][name]:.0e})"
                for name, speed in row["gb_per_s"].items()
            )
            print(f"{label:22} {speeds}; copies {row['copy_gb_per_s']:.0f} GB/s", flush=True)
            print(f"{'':22} prompt: " + ", ".join(f"{name} {s * 1e3:.0f} ms" for name, s in prompt.items()))
            ways = ways_of(arguments, SMALL, quantization)
            fields, x = random_matrix(SMALL, quantization, device), torch.randn(1, SMALL[1], device=device)
            small = {
                name: lambda way=way, x=x, fields=fields: way(x, fields)
                for name, way in ways.items()
                if name != "compiled"
            }
            of = result["small_widths"][label] = take_turns(small, 20 * arguments.turns, device)
            print(f"{'':22} small: " + ", ".join(f"{name} {s * 1e6:.0f} us" for name, s in of.items()))
    name = result["machine"]["kernels"] if device == "cpu" else device.split(":")[0]
    (RESULTS / f"kernels-{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
