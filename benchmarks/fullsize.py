"""A whole Mixtral-8x7B, or a model of Qwen3-30B-A3B's shape, in a small memory: this package and its rivals.

    python benchmarks/fullsize.py --folder FOLDER [--device cpu --ram 13GB] [--rivals accelerate llama.cpp]
    python benchmarks/fullsize.py --folder FOLDER --family qwen3_moe --bits 4 --ram 21GB --rivals llama.cpp

Speed and memory depend on shapes and bytes, not on values: the weights are random, written packed, nothing is
downloaded. Random weights route at random, so this package and accelerate replay a synthetic trace of a
stated locality (`--stay`). At the default, an LRU cache of 2, 3, 4 of 8 experts hits 0.354, 0.463, 0.572 of
it; of the routing of Mixtral-8x7B it hits 0.345, 0.464, 0.59, as a fork of dvmazur/mixtral-offloading
measured. Each contestant runs in its own process and begins with its files out of the page cache. Results are
ratios of one run's measurements. Experts are on disk on the CPU, in pinned RAM on CUDA. Writes
benchmarks/results/fullsize.json and .png.

The system's page cache is outside of `--ram`: with `--machine-ram` a ballast process holds the rest of this
machine's memory, which leaves the page cache the stated size.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from bigfiles import check_disk, cold_read, make_checkpoint
from contestants import Task, drop_page_cache
from machine import machine as describe
from processes import STARTED_S, ballast, check_machine_ram, in_process, log
from shapes import SIZES, Shape
from synthetic import config_of

from mixtral_offload.errors import OffloadError
from mixtral_offload.units import parse_size
from mixtral_offload.weights.hqq import PAPER

RESULTS = Path(__file__).parent / "results"
RIVALS = ("accelerate", "llama.cpp")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the files are, or are to be made")
    parser.add_argument("--family", choices=SIZES, default="mixtral")
    for name in ("layers", "hidden", "intermediate", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="default: the family's")
    parser.add_argument("--bits", type=int, choices=PAPER, default=2, help="of the experts; attention has 4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ram", default="13GB", help="what the package may plan with")
    parser.add_argument("--machine-ram", help="what the whole machine may use, page cache included")
    parser.add_argument("--cache-size", default="auto", help="experts per layer on the device, or auto")
    stay = "probability that the next token uses an expert too; 0.16: near what was measured on Mixtral-8x7B"
    parser.add_argument("--stay", type=float, default=0.16, help=stay)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=24, help="decoded after the prompt")
    parser.add_argument("--prompt", type=int, default=500, help="tokens of the prompt; 1 leaves it out")
    parser.add_argument("--options", type=json.loads, default={}, help="others for from_pretrained, as JSON")
    parser.add_argument(
        "--recall", type=float, default=0.8, help="of predictions, where options ask for prefetch"
    )
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    parser.add_argument("--accelerate-layers", type=int, default=4, help="measured, and scaled to all")
    parser.add_argument("--accelerate-dtype", choices=("auto", "float16", "bfloat16"), default="auto")
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or psutil.cpu_count(False) or os.cpu_count()
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for each contestant")
    parser.add_argument("--keep", action="store_true", help="do not delete the files made")
    parser.add_argument("--out", type=Path, default=RESULTS / "fullsize.json")
    arguments = parser.parse_args()
    arguments.config = config_of(arguments)
    arguments.accelerate_layers = min(arguments.accelerate_layers, arguments.layers)
    return arguments


def rival_files(name: str, arguments, config: dict) -> tuple[Path, int, str | None]:
    """(where a rival's files are, about how many bytes they have, why it cannot take part or None)."""
    if name == "llama.cpp":
        from llama_cpp_rival import file_bytes, missing

        config = config | {"bits": arguments.bits}
        why = missing(arguments.bits)
        return arguments.folder / "llama.gguf", 0 if why else file_bytes(config), why
    if arguments.family != "mixtral":
        return arguments.folder, 0, "accelerate's part of this benchmark knows Mixtral only"
    hidden, layers = arguments.hidden, arguments.accelerate_layers
    experts = 3 * Shape.of(config).n_experts * hidden * arguments.intermediate
    n_bytes = 2 * (layers * (experts + 4 * hidden**2) + 2 * arguments.vocab * hidden)
    return arguments.folder / f"accelerate-{layers}", n_bytes, None


def run_rival(name: str, arguments, task: Task, config: dict) -> dict:
    """A rival's row: its files made, measured and deleted again (unless --keep)."""
    files, n_bytes, missing = rival_files(name, arguments, config)
    if missing:
        return {"missing": missing}
    task, done = replace(task, files=str(files)), files.with_name(files.name + ".done")
    there, made = done.exists(), {}
    try:
        if not there:
            _remove(files)  # what an interrupted run may have left
            check_disk(arguments.folder, n_bytes, f"{name}'s files")
            made = in_process(f"{name}-files", task, arguments.timeout)
            if "failed" in made:
                return {"failed": f"writing its files: {made['failed']}"}
            done.touch()
            os.sync()
        drop_page_cache(files)
        return in_process(name, task, arguments.timeout) | {"files": made}
    except (OffloadError, OSError) as error:
        return {"failed": str(error)}
    finally:
        if not there and not arguments.keep:
            _remove(files)
            _remove(done)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def machine(arguments) -> dict:
    found = describe() | {"threads": arguments.threads, "ram_bytes": psutil.virtual_memory().total}
    for package in ("torch", "transformers", "accelerate", "llama_cpp_python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if arguments.device != "cpu":
        import torch

        found["device"] = torch.cuda.get_device_name(arguments.device)
    return found


def run(arguments) -> dict:
    """Run all contestants, one after the other; write the JSON after each."""
    config = arguments.config
    folder, ram = arguments.folder / "checkpoint", parse_size(arguments.ram)
    machine_ram = arguments.machine_ram and parse_size(arguments.machine_ram)
    check_machine_ram(machine_ram, ram)
    cache_size = arguments.cache_size if arguments.cache_size == "auto" else int(arguments.cache_size)
    task = Task(
        checkpoint=str(folder),
        device=arguments.device,
        ram=ram,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        stay=arguments.stay,
        seed=arguments.seed,
        recall=arguments.recall,
        threads=arguments.threads,
        dtype=arguments.accelerate_dtype,
        scaled_layers=arguments.accelerate_layers,
        options={"cache_size": cache_size} | arguments.options,
    )
    result = {
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("folder", "out", "config")},
        **machine(arguments),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    made, write_s = make_checkpoint(folder, config, arguments.bits)
    try:
        n_bytes = sum(path.stat().st_size for path in folder.iterdir())
        cold = cold_read(folder)
        result["checkpoint"] = {
            "bytes": n_bytes,
            "parameters": Shape.of(config).n_parameters,
            "write_s": write_s,
            "cold_read_bytes_per_s": cold,
        }
        result["contestants"] = rows = {}
        with ballast(machine_ram) as held:
            result["ballast_bytes"] = held
            for name in ("ours", *arguments.rivals):
                drop_page_cache(folder)
                one = in_process(name, task, arguments.timeout) if name == "ours" else None
                rows[name] = one or run_rival(name, arguments, task, config)
                finish(result, arguments.out)
    finally:
        if made and not arguments.keep:
            shutil.rmtree(folder)
    return result


def finish(result: dict, out: Path) -> None:
    """Ratios so far, and all of it into the file."""
    rows = result["contestants"]
    mine = rows["ours"].get("tokens_per_s")
    result["ratios"] = {
        f"ours over {name}": mine / row["tokens_per_s"]
        for name, row in rows.items()
        if name != "ours" and mine and "tokens_per_s" in row
    }
    result["total_s"] = time.perf_counter() - STARTED_S
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    arguments = parse()
    try:
        result = run(arguments)
    except OffloadError as error:
        sys.exit(f"error: {error}")
    from plots_fullsize import plot_fullsize

    figure, _ = plot_fullsize(result)
    figure.savefig(arguments.out.with_suffix(".png"), dpi=150)
    for name, row in result["contestants"].items():
        speed = f"{row['tokens_per_s']:.3f} tokens/s" if "tokens_per_s" in row else None
        log(f"{name}: {row.get('failed') or row.get('missing') or speed}")
    log(f"{result['ratios']}; all of it took {result['total_s']:.0f} s")


if __name__ == "__main__":
    main()
