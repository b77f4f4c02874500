"""Two processes, or two threads, that write the same at once: nothing is lost or half written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mixtral_offload.analysis.recorder import record
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OffloadError
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.runtime.build import from_pretrained
from mixtral_offload.runtime.convert import convert_checkpoint
from mixtral_offload.weights.source import DEMO

from ..hub_server import HubServer
from .result import Result

REPO = "someone/model"


def check_at_once(n: int = 5) -> Result:
    """Run each writer twice at once, n times.

    A run is good if both end with success or with one of this package's errors, at least one with success,
    and the result is that of a single run.
    """
    wrong, tried = [], 0
    for number in range(n):
        for writer in (
            _job,
            _trace,
            _convert,
            _download,
            _threads_convert,
            _threads_trace,
            _threads_generate,
        ):
            with tempfile.TemporaryDirectory() as folder:
                tried += 1
                try:
                    problem = writer(Path(folder))
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
                if problem:
                    wrong.append(f"{writer.__name__} {number}: {problem}"[:600])
    return Result(
        "two processes or threads that write the same at once: lost or half written",
        len(wrong),
        tried,
        "runs",
        details={"wrong": wrong},
    )


def _processes(*commands: list[str], environment: dict | None = None) -> tuple[str, int]:
    """(what is wrong with how they ended, how many succeeded)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for command in commands
    ]
    ended = [(process, *process.communicate(timeout=300)) for process in running]
    for process, _, errors in ended:
        if process.returncode not in (0, 1) or "Traceback" in errors:
            return f"exit status {process.returncode}: {errors[-400:]}", 0
    succeeded = sum(process.returncode == 0 for process, *_ in ended)
    return "" if succeeded else f"none succeeded: {[errors[-200:] for *_, errors in ended]}", succeeded


def _cli(*arguments: str | Path) -> list[str]:
    return ["-m", "mixtral_offload", *map(str, arguments)]


def _job(folder: Path) -> str:
    lines = ["What is the capital of France?", "What is 2 + 3?", "Hello!"] * 3
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": line, "max_tokens": 8}) + "\n" for line in lines))
    command = _cli("generate", "--input", source, "--output", output, "--device", "cpu")
    problem, _ = _processes(command, command)
    if problem:
        return problem
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    if len(answers) != len(lines):
        return f"{len(answers)} answers for {len(lines)} lines"
    alone = folder / "alone.jsonl"
    problem, _ = _processes(_cli("generate", "--input", source, "--output", alone, "--device", "cpu"))
    return problem or ("" if alone.read_bytes() == output.read_bytes() else "other answers than alone")


def _trace(folder: Path) -> str:
    source, target = folder / "prompts.txt", folder / "report"
    source.write_text("What is the capital of France?\nHello!\n")
    command = _cli("trace", source, target, "--max-tokens", "3", "--device", "cpu")
    problem, _ = _processes(command, command)
    return problem or _whole_report(target)


def _whole_report(target: Path) -> str:
    trace = RoutingTrace.load(target / "trace.safetensors")
    rows = (target / "trace.csv").read_text().splitlines()
    if len(rows) < trace.n_tokens:
        return f"{len(rows)} rows for {trace.n_tokens} tokens"
    for path in target.glob("*.png"):
        Image.open(path).load()
    for path in target.glob("*.npy"):
        np.load(path)
    left = [
        path.name for path in target.iterdir() if path.suffix not in (".png", ".npy", ".csv", ".safetensors")
    ]
    return f"left behind: {left}" if left else ""


def _contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def _convert(folder: Path) -> str:
    command = _cli("convert", DEMO.parent / "fp16", folder / "target", "--bits", "4")
    problem, _ = _processes(command, command)
    return problem or _whole_checkpoint(folder)


def _whole_checkpoint(folder: Path) -> str:
    open_checkpoint(folder / "target")
    left = [path.name for path in folder.iterdir() if "partial" in path.name]
    return f"left behind: {left}" if left else ""


def _download(folder: Path) -> str:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    for number in (1, 2):
        (source / f"model-0000{number}-of-00002.safetensors").write_bytes(os.urandom(200_000))
    (source / "config.json").write_text('{"model_type": "mixtral"}')
    (source / "model.safetensors.index.json").write_text(
        json.dumps(
            {"weight_map": {f"k{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}}
        )
    )
    code = (
        "import sys; from mixtral_offload import errors; from mixtral_offload.weights import hub\n"
        "try: print(hub.download(sys.argv[1], endpoint=sys.argv[2], local_dir=sys.argv[3], progress=False))\n"
        "except errors.OffloadError as error: sys.exit(str(error))"
    )
    with HubServer(source, REPO) as server:
        command = ["-c", code, REPO, server.endpoint, str(target)]
        problem, _ = _processes(
            command, command, environment={"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}
        )
    there = _contents(target) if target.is_dir() else {}
    lost = [name for name, digest in _contents(source).items() if there.get(name) != digest]
    return problem or (f"lost or damaged: {lost}" if lost else "")


def _threads(*functions: Callable[[], object]) -> str:
    errors: list[BaseException] = []
    succeeded: list[object] = []

    def work(function: Callable[[], object]) -> None:
        try:
            succeeded.append(function())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    if any(thread.is_alive() for thread in threads):
        return "a thread hangs"
    foreign = [error for error in errors if not isinstance(error, OffloadError)]
    if foreign:
        return f"{type(foreign[0]).__name__}: {foreign[0]}"
    return "" if succeeded else f"none succeeded: {errors}"


def _threads_convert(folder: Path) -> str:
    convert = lambda: convert_checkpoint(DEMO, folder / "target")  # noqa: E731
    return _threads(convert, convert) or _whole_checkpoint(folder)


def _threads_trace(folder: Path) -> str:
    """Two models in two threads save their traces in the same place."""
    tokenizer, path, whole = load_tokenizer(), folder / "trace.safetensors", []

    def work(text: str) -> None:
        model = from_pretrained(device="cpu", cache_size=2)
        with record(model, tokenizer) as run, torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        for _ in range(20):
            run.trace.save(path)
        whole.append(run.trace.tokens.tolist())
        model.offload.cache.close()

    problem = _threads(lambda: work("Hello"), lambda: work("What is the capital of France?"))
    return problem or (
        "" if RoutingTrace.load(path).tokens.tolist() in whole else "a trace that neither has saved"
    )


def _threads_generate(folder: Path) -> str:
    """Two threads save one model, which a third one uses."""
    model, ids = from_pretrained(device="cpu", cache_size=2), torch.tensor([[300, 700, 900]])
    length = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **length)
    same: list[bool] = []
    save = lambda: model.save_pretrained(folder / "target")  # noqa: E731
    problem = _threads(save, save, lambda: same.append(torch.equal(model.generate(ids, **length), expected)))
    if problem or same != [True]:
        return problem or "another answer while it was saved"
    loaded = from_pretrained(folder / "target", device="cpu", cache_size=2)
    return (
        "" if torch.equal(loaded.generate(ids, **length), expected) else "the saved model answers otherwise"
    )
