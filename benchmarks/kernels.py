"""How fast a quantized matrix is multiplied straight from its packed bytes, at every bit width.

    python benchmarks/kernels.py [--device cuda] [--shape 14336 4096]

For one token (a matrix-vector product): packed bytes per second, compared with this device's copy bandwidth
and with dequantizing first. For a prompt: the matrix dequantized part by part, compared with dequantizing it
whole and with the library's product alone. The ways take turns. Writes benchmarks/results/kernels-DEVICE.json
and .png.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from synthetic import random_fields
from torch.nn import functional as F

from mixtral_offload.weights import kernels as packed
from mixtral_offload.weights.hqq import PAPER, Quantization, dequantize, matmul

RESULTS = Path(__file__).parent / "results"
WIDTHS = {
    **{f"{bits}-bit": PAPER[bits] for bits in (2, 3, 4, 8)},
    "3-bit, ten in 32 bits": Quantization(3, 64, 128, True),
    "2-bit, fp16 scales": Quantization(2, 16),
    "4-bit, fp16 scales": Quantization(4, 64),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(14336, 4096), help="rows and columns of the matrix"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--turns", type=int, default=15)
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


def measure(shape, quantization: Quantization, arguments, copy) -> dict:
    """Measure one width: seconds of each way, and the results' errors against the dequantized fp32 matrix."""
    device, dtype = arguments.device, torch.float32 if arguments.device == "cpu" else torch.float16
    fields = random_matrix(shape, quantization, device)
    n_bytes = sum(value.numel() * value.element_size() for value in fields.values())
    x = torch.randn(arguments.prompt, shape[1], device=device, dtype=dtype)
    begin = _now(device)
    packed.linear(x[:1], fields, shape, quantization)
    packed.linear(x, fields, shape, quantization)
    compile_s = _now(device) - begin
    weight = dequantize(fields, shape, quantization, torch.float32)
    expected = x.float() @ weight.T
    errors = {
        name: (
            (packed.linear(x[:n], fields, shape, quantization) - expected[:n]).norm() / expected[:n].norm()
        ).item()
        for name, n in (("token", 1), ("prompt", len(x)))
    }
    weight = weight.to(dtype)
    token = take_turns({
        "packed": lambda: packed.linear(x[:1], fields, shape, quantization),
        "dequantize, then matmul": lambda: matmul(x[:1], fields, shape, quantization),
        "16 bits" if dtype == torch.float16 else "fp32": lambda: F.linear(x[:1], weight), "copy": copy,
    }, arguments.turns, device)  # fmt: skip
    prompt = take_turns({
        "packed": lambda: packed.linear(x, fields, shape, quantization),
        "dequantize, then matmul": lambda: matmul(x, fields, shape, quantization),
        "matmul alone": lambda: F.linear(x, weight),
    }, max(3, arguments.turns // 3), device)  # fmt: skip
    return {"bytes": n_bytes, "error": errors, "compile_s": compile_s, "token_s": token, "prompt_s": prompt}


def plot_kernels(result: dict) -> tuple[Figure, list]:
    """Packed bytes per second of each width, both ways, and the device's copies."""
    names = list(result["widths"])
    rows = [
        (row["gb_per_s"], row["eager_gb_per_s"], row["copy_gb_per_s"]) for row in result["widths"].values()
    ]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for shift, index, label in ((-0.2, 0, "straight from packed bytes"), (0.2, 1, "dequantized first")):
        bars = axes.bar(
            [i + shift for i in range(len(names))], [row[index] for row in rows], 0.38, label=label
        )
        axes.bar_label(bars, [f"{row[index]:.2g}" for row in rows])
    axes.plot(
        range(len(names)),
        [row[2] for row in rows],
        "k_",
        markersize=40,
        label="this device's copies, read and written",
    )
    axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axes.set(
        ylabel="GB/s",
        yscale="log",
        title=f"One token times a {result['shape'][0]} x {result['shape'][1]} matrix, {result['device']}",
    )
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure, rows


def main() -> None:
    arguments = parse()
    shape, device = tuple(arguments.shape), arguments.device
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.zeros_like(source)
    name = (
        f"{platform.machine()}, {torch.get_num_threads()} threads"
        if device == "cpu"
        else torch.cuda.get_device_name(device)
    )
    result = {
        "device": name,
        "torch": torch.__version__,
        "shape": shape,
        "prompt": arguments.prompt,
        "widths": {},
    }
    with torch.no_grad():
        for label, quantization in WIDTHS.items():
            row = measure(shape, quantization, arguments, lambda: target.copy_(source))
            seconds = row["token_s"]
            row["gb_per_s"] = row["bytes"] / seconds["packed"] / 1e9
            row["eager_gb_per_s"] = row["bytes"] / seconds["dequantize, then matmul"] / 1e9
            row["copy_gb_per_s"] = 2 * source.numel() / seconds["copy"] / 1e9
            row["over_eager"] = row["gb_per_s"] / row["eager_gb_per_s"]
            result["widths"][label] = row
            prompt = row["prompt_s"]
            print(
                f"{label:20} {row['gb_per_s']:6.1f} GB/s ({row['gb_per_s'] / row['copy_gb_per_s']:.2f} of "
                f"copies), {row['over_eager']:5.1f} x eager, error {row['error']['token']:.1e}; "
                f"prompt of {arguments.prompt}: "
                f"{prompt['dequantize, then matmul'] / prompt['packed']:.1f} x eager, "
                f"{prompt['matmul alone'] / prompt['packed']:.2f} x the product alone; "
                f"compiled in {row['compile_s']:.1f} s",
                flush=True,
            )
    out = RESULTS / f"kernels-{device.split(':')[0]}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot_kernels(result)[0].savefig(out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
