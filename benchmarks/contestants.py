"""What the contestants of `fullsize.py` share (timing, memory, tasks), and this package's own run."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

STARTED_S = time.perf_counter()
SAMPLE_S = 0.05


@dataclass(frozen=True)
class Task:
    """A contestant's task, in JSON's types.

    Attributes:
        checkpoint: Folder of the packed checkpoint.
        ram: Bytes.
        prompt, tokens: Tokens of the first pass, and decoded after it.
        stay, seed: Of the routing.
        recall: Of the predictions, if the options ask for some.
        files: The contestant's own folder or file, if it needs one.
        scaled_layers: Layers that accelerate gets.
        options: For `from_pretrained`.
    """

    checkpoint: str
    device: str
    ram: int
    prompt: int
    tokens: int
    stay: float
    seed: int
    recall: float
    threads: int
    files: str = ""
    scaled_layers: int = 4
    dtype: str = "auto"
    options: dict = field(default_factory=dict)


def log(text: str) -> None:
    """Write to stderr, unbuffered; a contestant's stdout is for its result."""
    print(f"[{time.perf_counter() - STARTED_S:8.1f} s] {text}", file=sys.stderr, flush=True)


def status_bytes(*names: str) -> int | None:
    """Sum of fields of /proc/self/status in bytes; None where the system has no such file."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return None
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", path.read_text(), re.M))
    return sum(int(found[name]) for name in names) * 1024


class MemoryPeak:
    """Measures the peak of anonymous and shared memory of this process, without the page cache."""

    def __init__(self):
        self.anon_bytes = self._read()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @staticmethod
    def _read() -> int | None:
        return status_bytes("RssAnon", "RssShmem")

    def _run(self) -> None:
        while self.anon_bytes is not None and not self._end.wait(SAMPLE_S):
            self.anon_bytes = max(self.anon_bytes, self._read())

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._end.set()
        self._thread.join()

    def result(self) -> dict:
        """anon_bytes: the sampled peak. peak_rss_bytes: the kernel's, pages of mapped files included."""
        return {"anon_bytes": self.anon_bytes, "peak_rss_bytes": status_bytes("VmHWM")}


class TokenClock:
    """A streamer for `generate` that notes the seconds of each pass, the prompt's first.

    between: called with the number of passes so far, outside of what is timed.
    """

    def __init__(self, between: Callable[[int], None] = lambda n: None):
        self.seconds: list[float] = []
        self._between, self._began_s = between, None

    def put(self, ids) -> None:
        now = time.perf_counter()
        if self._began_s is not None:  # the first call brings the prompt, before any pass
            self.seconds.append(now - self._began_s)
            log(f"pass {len(self.seconds)}: {self.seconds[-1]:.3f} s")
        self._between(len(self.seconds))
        self._began_s = time.perf_counter()

    def end(self) -> None:
        pass


def timed_generate(
    model, n_prompt: int, n_tokens: int, between: Callable[[int], None] = lambda n: None
) -> list[float]:
    """Seconds of the pass over a prompt of random tokens, then of `n_tokens` single-token passes."""
    import torch

    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, n_prompt), generator=generator).to(device)
    clock, n = TokenClock(between), n_tokens + 1
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
            streamer=clock, pad_token_id=0,
        )  # fmt: skip
    return clock.seconds


def speeds(seconds: Sequence[float], n_prompt: int) -> dict:
    """The common part of a contestant's result, from the seconds of each pass."""
    first, *rest = seconds
    return {
        "tokens_per_s": len(rest) / sum(rest), "seconds_per_token": rest, "prompt_tokens": n_prompt,
        "first_token_s": first,
    }  # fmt: skip


def run_ours(task: Task) -> dict:
    """Run this package's model with forced routing: a warm-up pass, then from an empty cache."""
    import torch

    torch.set_num_threads(task.threads)
    with MemoryPeak() as memory:
        began = time.perf_counter()
        model, routing, experts = _forced_model(task)
        offload, built_s = model.offload, time.perf_counter() - began
        log(f"built in {built_s:.1f} s\n{offload.plan}")
        began = time.perf_counter()
        # a virtual machine may have to provide its memory first: seconds per GB
        for row in offload.cache.memory:
            row.zero_()
        log(f"touched its slots in {time.perf_counter() - began:.1f} s")
        timed_generate(model, 1, 0)
        routing.reset()
        with offload.cache.lock:
            offload.cache.clear()
            offload.stats.reset()
        marks = []
        seconds = timed_generate(
            model, task.prompt, task.tokens, lambda n: marks.append(asdict(offload.stats))
        )
    recall = task.recall if offload.prefetcher else None
    result = speeds(seconds, task.prompt) | memory.result()
    result |= {
        "build_s": built_s,
        "plan": str(offload.plan),
        "run": offload.settings(),
        "prefetch_recall": recall,
    }
    if offload.options.device.type == "cuda":
        result["device_peak_bytes"] = torch.cuda.max_memory_allocated(offload.options.device)
    result |= _traffic(task, model, experts, marks, sum(seconds[1:]))
    offload.cache.close()
    return result


def _forced_model(task: Task):
    """(model, its forced routing, the experts it is forced to: int16 [N, L, k])."""
    from forced_routing import ForcedPredictions, ForcedRouting, sticky_experts

    from mixtral_offload.runtime.build import from_pretrained

    place = "disk" if task.device.startswith("cpu") else "ram"
    options = {"store": place, "ram": task.ram, "device": task.device} | task.options
    model = from_pretrained(task.checkpoint, **options)
    checkpoint = model.offload.checkpoint
    shape = len(checkpoint.layers), checkpoint.n_experts, checkpoint.top_k
    experts = sticky_experts(task.prompt + task.tokens, *shape, task.stay, task.seed)
    routing = ForcedRouting(model, experts)
    if model.offload.prefetcher is not None:
        model.offload.prefetcher.predictor = ForcedPredictions(
            routing, checkpoint.n_experts, task.recall, task.seed
        )
    return model, routing, experts


def _traffic(task: Task, model, experts, marks: list[dict], decode_s: float) -> dict:
    """Measure hits, bytes moved and the link's use while decoding; compare the hits with the trace's replay.

    Args:
        marks: Counters before and after each pass.
    """
    from forced_routing import forced_trace

    from mixtral_offload.analysis.replay import replay

    after_prompt, end = marks[1], marks[-1]
    hits, misses, moved = (end[k] - after_prompt[k] for k in ("hits", "misses", "bytes_moved"))
    trace = forced_trace(experts, task.prompt, model.offload.settings())
    replayed = replay(trace)
    agrees = (replayed.hits, replayed.misses) == (end["hits"], end["misses"])
    if not agrees:
        log(f"THE CACHE DIFFERS FROM THE TRACE'S REPLAY: {end['hits']} hits, the replay has {replayed.hits}")
    missed = (trace.use_pass > 0) & ~replayed.hit
    keys = list(zip(trace.use_layer[missed].tolist(), trace.use_expert[missed].tolist()))
    link = link_speed(model.offload, keys)
    return {
        "hit_rate": hits / (hits + misses),
        "hit_rate_with_prompt": end["hits"] / (end["hits"] + end["misses"]),
        "replayed_hit_rate_with_prompt": replayed.hit_rate,
        "replay_agrees": agrees,
        "bytes_per_token": moved / task.tokens,
        "prompt_bytes": after_prompt["bytes_moved"],
        "wait_s": end["wait_s"] - after_prompt["wait_s"],
        "link_bytes_per_s": link,
        "link_use": moved / decode_s / link if link else None,
    }


def link_speed(offload, keys: list[tuple[int, int]]) -> float | None:
    """Measure the link with the simplest way to move the same experts, in bytes per second.

    From disk, their files are read again in the same order into one buffer, while the cache keeps its slots;
    from pinned RAM, one buffer is copied to the GPU repeatedly. None if nothing had to be moved.
    """
    import torch

    if not keys or offload.plan.store is None:
        return None
    header_bytes = 1 << 20  # more than any file's
    buffer = torch.empty(offload.layout.n_bytes + header_bytes, dtype=torch.uint8)
    if offload.plan.store == "disk":
        of = offload.checkpoint.experts
        paths = [next(iter(of[key].values())).path for key in keys]
        began, n_bytes = time.perf_counter(), 0
        for path in paths:
            n_bytes += _read_into(path, buffer)
        return n_bytes / (time.perf_counter() - began)
    if offload.options.device.type == "cpu":
        target = torch.empty_like(buffer)
    else:
        buffer, target = buffer.pin_memory(), torch.empty_like(buffer, device=offload.options.device)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        target.copy_(buffer)
        if target.is_cuda:
            torch.cuda.synchronize(target.device)
        times.append(time.perf_counter() - began)
    return buffer.numel() / sorted(times)[len(times) // 2]


def _read_into(path: Path, buffer) -> int:
    """Read a whole file into the buffer, again from its start if the file is larger; return the bytes."""
    view, total = memoryview(buffer.numpy()), 0
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(view):
            total += n
    return total


def drop_page_cache(*paths: str | Path) -> None:
    """Drop these files (or all files of these folders) from the page cache; mapped pages stay."""
    for path in map(Path, paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                handle = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(handle)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(handle)
