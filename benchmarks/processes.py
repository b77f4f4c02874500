"""Runs the contestants of `fullsize.py` in processes of their own, and the ballast that fills RAM.

Run as a program, it is such a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
from contestants import Task, run_ours

from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.units import gb

STARTED_S = time.perf_counter()
SPARE_BYTES = 1_000_000_000  # of RAM, for what is neither budget nor ballast


def log(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED_S:8.1f} s] {text}", flush=True)


def _write_16bit(task: Task) -> dict:
    from dequantized import write_16bit

    return write_16bit(task)


def _run_accelerate(task: Task) -> dict:
    from rivals import run_accelerate

    return run_accelerate(task)


def _write_gguf(task: Task) -> dict:
    from llama_cpp_rival import write_gguf

    config = json.loads((Path(task.checkpoint) / "config.json").read_text())
    return {"bytes": write_gguf(Path(task.files), config)}


def _run_llama_cpp(task: Task) -> dict:
    from llama_cpp_rival import run_llama_cpp

    return run_llama_cpp(task)


WORKERS = {"ours": run_ours, "accelerate-files": _write_16bit, "accelerate": _run_accelerate,
           "llama.cpp-files": _write_gguf, "llama.cpp": _run_llama_cpp}  # fmt: skip


def work(name: str, task: str) -> None:
    """In a contestant's process: its result, or how it failed, as the last line of stdout."""
    if name == "ballast":
        import numpy as np

        held = np.ones(int(task), np.uint8)  # written to: memory that is only reserved holds nothing
        print(held.nbytes, flush=True)
        sys.stdin.read()  # until the parent process closes the pipe or ends
        return
    try:
        result = WORKERS[name](Task(**json.loads(task)))
    except Exception as error:  # of any kind: the other contestants go on
        import traceback

        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)


def in_process(name: str, task: Task, timeout_s: float) -> dict:
    """A contestant's result, with the wall time of its whole process; {"failed": why} if it has none."""
    log(f"{name} begins")
    began = time.perf_counter()
    command = [sys.executable, __file__, name, json.dumps(asdict(task))]
    environment = os.environ | {"OMP_NUM_THREADS": str(task.threads)}
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout_s, env=environment)
        lines = run.stdout.splitlines()
        ended = f"ended with {'signal' if run.returncode < 0 else 'status'} {abs(run.returncode)}"
        result = json.loads(lines[-1]) if lines and run.returncode == 0 else {"failed": ended}
    except subprocess.TimeoutExpired:
        result = {"failed": f"took longer than {timeout_s:.0f} s"}
    except ValueError:
        result = {"failed": f"no result, but: {lines[-1][:200]}"}
    result["wall_s"] = time.perf_counter() - began
    said = result.get("failed") or f"{result['wall_s']:.0f} s"
    log(f"{name}: {said}" + (f", {result['tokens_per_s']:.3f} tokens/s" if "tokens_per_s" in result else ""))
    return result


def check_machine_ram(machine_ram: int | None, ram: int) -> None:
    """Refuses, before anything is written, what `ballast` could not do."""
    total = psutil.virtual_memory().total
    if machine_ram is not None and not ram + SPARE_BYTES <= machine_ram <= total:
        raise OptionError(
            "impossible --machine-ram",
            expected=f"{gb(ram + SPARE_BYTES)} (--ram and some to spare) to {gb(total)}",
            found=gb(machine_ram),
            hint="give a smaller --ram",
        )


@contextmanager
def ballast(machine_ram: int | None):
    """Hold all but `machine_ram` bytes of this machine's memory meanwhile; yields the bytes held."""
    if machine_ram is None:
        yield 0
        return
    total = psutil.virtual_memory().total
    command = [sys.executable, __file__, "ballast", str(total - machine_ram)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if not holder.stdout.readline():
            raise CapacityError("the ballast got no memory", expected=gb(total - machine_ram))
        log(f"ballast of {gb(total - machine_ram)} holds")
        yield total - machine_ram
    finally:
        holder.stdin.close()
        holder.wait()


if __name__ == "__main__":
    work(*sys.argv[1:])
