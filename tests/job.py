"""For the tests of jobs: a job on the shipped model's tokenizer, and an engine that answers out of order."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

from mixtral_offload.core.counters import CacheStats
from mixtral_offload.generation.batch import Answer
from mixtral_offload.generation.jobs import Job, JobOptions
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.runtime.options import parse_options
from mixtral_offload.weights.source import DEMO

MODEL = SimpleNamespace(
    offload=SimpleNamespace(stats=CacheStats()), generation_config=SimpleNamespace(eos_token_id=1)
)


@dataclass
class Engine:
    """Replaces `generate_batch`: every third request first; an answer depends on its prompt and seed only.

    Attributes:
        dies_after: Number of answers after which `error` is raised.
        error: What is raised.
        seen: The requests so far.
    """

    dies_after: int | None = None
    error: BaseException = field(default_factory=KeyboardInterrupt)
    seen: list = field(default_factory=list)

    def __call__(self, model, requests, *, batch_size, temperature, top_p):
        requests = list(requests)
        self.seen += requests
        order = [number for first in range(3) for number in range(first, len(requests), 3)]
        for done, number in enumerate(order):
            if done == self.dies_after:
                raise self.error
            ids, seed = requests[number].ids, requests[number].seed or 0
            yield Answer(number, [*ids[2:-2], 100 + seed % 1000, 1], "complete")


def write(path, *lines):
    """Write objects as JSON lines, bytes as they are; return the path."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def run(monkeypatch, folder, engine=None, *, model=MODEL, offload=None, **options):
    """Run `in.jsonl` to `out.jsonl`, with `generate_batch` where `engine` is None; return the job."""
    options = {"input": folder / "in.jsonl", "output": folder / "out.jsonl", **options}
    with monkeypatch.context() as patch, Job(JobOptions(**options)) as job:
        if engine is not None:
            patch.setattr("mixtral_offload.generation.jobs.generate_batch", engine)
        offload = parse_options({"device": "cpu", **(offload or {})})
        job.prepare(load_tokenizer(DEMO), DEMO, offload)
        job.answer(model)
        job.finish()
    return job


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())
