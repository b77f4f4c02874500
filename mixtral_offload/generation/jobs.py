"""A job: a file of prompts becomes a file of answers, and resumes after an interrupt."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mixtral_offload.core.options import OffloadOptions
from mixtral_offload.errors import JobError, OptionError
from mixtral_offload.generation.batch import GenerationRequest, generate_batch
from mixtral_offload.generation.chat import TurnStats, context_length
from mixtral_offload.generation.job_input import BadLine, Line, encode_lines, list_bad, read_lines
from mixtral_offload.generation.journal import Journal, journal_of, ordered_of
from mixtral_offload.generation.templates import answer_text, turn_ends
from mixtral_offload.generation.tokenizer import RAW_TEMPLATE
from mixtral_offload.models.checkpoint import INDEX, read_config
from mixtral_offload.runtime.offload import OffloadedModel
from mixtral_offload.runtime.settings import check_sampling, ends_in, read_generation_config
from mixtral_offload.units import check_whole


@dataclass(frozen=True)
class JobOptions:
    """The options of a job; `max_tokens`, `seed` and `system` are for lines without their own.

    Attributes:
        input: A file of JSON lines.
        output: The file of answers.
        max_tokens: The longest answer.
        temperature: 0 is greedy.
        top_p: Sample among the likeliest tokens that have this probability together.
        seed: Makes sampled answers repeatable; None draws one, which the journal keeps.
        system: System prompt.
        raw: Continue prompts as they are, without a chat template.
        batch_size: Sequences at once.
        bad_lines: "refuse" the job, or "skip" them.
        restart: Discard what an earlier run has left.
    """

    input: Path
    output: Path
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int | None = None
    system: str | None = None
    raw: bool = False
    batch_size: int = 32
    bad_lines: str = "refuse"
    restart: bool = False

    def __post_init__(self) -> None:
        check_sampling(self.max_tokens, self.temperature, self.top_p, self.seed)
        check_whole("batch_size", self.batch_size)
        if self.bad_lines not in ("refuse", "skip"):
            raise OptionError("unknown bad_lines", expected="refuse or skip", found=self.bad_lines)
        if self.raw and self.system:
            raise OptionError("a system prompt has no place in a raw job", found=self.system)
        for path in (self.output, journal_of(self.output), ordered_of(self.output)):
            if os.path.realpath(path) == os.path.realpath(self.input):
                raise OptionError(
                    "the job would write over its input", found=path, hint="name another output"
                )


class Job:
    """A job on its output, which it locks: use it in `with`, or close it.

    Call `prepare`, which needs no model; then `answer`, if lines are `pending`; then `finish`.

    Attributes:
        options: The job's options.
        lines: The input's lines, encoded by `prepare`.
        journal: The answers so far.
        seed: The seed of sampled answers, known after `prepare`.
        n_kept: Answers of earlier runs.
        took: Counters of this run.

    Raises:
        JobError: The input or the output cannot be used.
    """

    def __init__(self, options: JobOptions) -> None:
        self.options = options
        self.sha256, self.lines = read_lines(options.input, options.raw)
        output = options.output  # only its folder is resolved: a link is replaced, not written through
        self.journal = Journal(Path(os.path.realpath(output.parent)) / output.name, options.restart)
        self.seed: int | None = None
        self.n_kept = 0
        self.took = TurnStats()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the output."""
        self.journal.close()

    @property
    def bad(self) -> list[BadLine]:
        """Lines that cannot be answered."""
        return [line for line in self.lines if isinstance(line, BadLine)]

    @property
    def pending(self) -> list[Line]:
        """Lines without an answer yet."""
        done = self.journal.places
        return [line for line in self.lines if isinstance(line, Line) and line.number not in done]

    @property
    def n_contexts(self) -> int:
        """Contexts in the plan's KV cache that a batch of the longest pending lines needs."""
        options = self.options
        lengths = (len(line.ids) + (line.max_tokens or options.max_tokens) for line in self.pending)
        longest = max(lengths, default=1)
        return -(-options.batch_size * min(longest, self.context) // self.context)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, folder: Path, offload: OffloadOptions) -> None:
        """Encode and check every line, and check that the journal belongs to this job.

        Args:
            tokenizer: The model's; a raw job replaces its chat template.
            folder: The checkpoint.
            offload: The options that the model will be built with.

        Raises:
            JobError: Bad lines are refused, or the journal belongs to another job.
        """
        options = self.options
        if options.raw:
            tokenizer.chat_template = RAW_TEMPLATE
        config = read_config(folder)
        self.context = context = context_length(config, offload)
        self.tokenizer, n_tokens = tokenizer, getattr(config, "vocab_size", None)
        turns = turn_ends(tokenizer)
        self.turn_ends, self.ends = turns, turns | ends_in(read_generation_config(folder), config)
        self.lines = encode_lines(self.lines, tokenizer, context, options.system, n_tokens)
        if self.bad and options.bad_lines == "refuse":
            raise JobError(
                f"{len(self.bad)} of {len(self.lines)} lines cannot be answered",
                path=options.input,
                found=list_bad(self.bad).replace("\n", "\n    "),
                hint="fix these lines, or skip them with --bad-lines skip",
            )
        drawn = (self.journal.header or {}).get("drawn_seed")
        if options.temperature > 0 and options.seed is None and drawn is None:
            drawn = secrets.randbits(32)
        self.seed = drawn if options.seed is None else options.seed
        numbers = [line.number for line in self.lines if isinstance(line, Line)]
        self.journal.begin(self._decides(folder, context, offload), numbers, {"drawn_seed": drawn})
        self.n_kept = len(self.journal.places)

    def answer(self, model: OffloadedModel, progress: Callable[[int], object] = lambda n: None) -> None:
        """Answer the pending lines; each answer is in the journal before the next one is generated.

        Args:
            model: Built with the options given to `prepare`.
            progress: Called with 1 after each answer.
        """
        options, pending, cache = self.options, self.pending, model.offload.stats
        begin, before = time.perf_counter(), replace(cache)
        answers = generate_batch(
            model,
            self._requests(pending),
            batch_size=options.batch_size,
            temperature=options.temperature,
            top_p=options.top_p,
        )
        for answer in answers:
            line = pending[answer.number]
            text = answer_text(self.tokenizer, answer.ids, self.ends)
            record = {"line": line.number, **line.kept, "answer": text, "ended": answer.ended}
            record |= {"n_prompt": len(line.ids), "n_tokens": len(answer.ids)}
            self.journal.add(line.number, record)
            n_prompt, n_tokens = self.took.n_prompt + len(line.ids), self.took.n_tokens + len(answer.ids)
            self.took = TurnStats(n_prompt, n_tokens, 0.0, time.perf_counter() - begin, cache - before)
            progress(1)
        if self.pending:
            raise JobError(
                "lines were left without an answer", found=f"{len(self.pending)} of {len(pending)}"
            )

    def finish(self) -> None:
        """Write the output: answers, and errors of bad lines, in the input's order."""
        errors = {bad.number: {"line": bad.number, "error": bad.error} for bad in self.bad}
        self.journal.finish([line.number for line in self.lines], errors)

    @property
    def skipped(self) -> str:
        """The bad lines, for a message."""
        return f"skipped, {_count(len(self.bad), 'bad line')} of {len(self.lines)}:\n{list_bad(self.bad)}"

    @property
    def summary(self) -> str:
        """What the job has done, for a message."""
        took, cache = self.took, self.took.cache
        text = _count(len(self.journal.places), "answer")
        if self.n_kept:
            text += f", {self.n_kept} of them from before"
        if self.bad:
            text += f", {_count(len(self.bad), 'bad line')} skipped"
        if not took.n_tokens:
            return text
        tokens = f"{took.n_tokens} tokens, {took.tokens_per_s:.1f} tokens/s"
        moved = f"{cache.bytes_moved / took.n_tokens / 1e6:.2f} MB moved per token"
        return f"{text}: {tokens}, {cache.hits_as_text}, {moved}"

    @property
    def resume_hint(self) -> str:
        """How to resume an interrupted job, for a message."""
        n_answers, n_lines = len(self.journal.places), len(self.lines) - len(self.bad)
        kept = f"{n_answers} of {n_lines} answers are kept in {self.journal.path}"
        return (
            f"{kept}; the same command{' without --restart' if self.options.restart else ''} resumes the job"
        )

    def _requests(self, pending: list[Line]) -> Iterator[GenerationRequest]:
        for line in pending:
            n_tokens = line.max_tokens or self.options.max_tokens
            yield GenerationRequest(list(line.ids), n_tokens, self._seed_of(line), self.turn_ends)

    def _seed_of(self, line: Line) -> int | None:
        """Derive a line's seed from the job's and the line's number only, so that no other line matters."""
        if line.seed is not None or self.seed is None:
            return line.seed
        return int.from_bytes(hashlib.sha256(f"{self.seed} {line.number}".encode()).digest()[:7], "big")

    def _decides(self, folder: Path, context: int, offload: OffloadOptions) -> dict[str, Any]:
        """Collect what decides the answers, by names for messages; batch size and cache do not.

        The weights are not hashed: name, configuration and index represent them.
        """
        options, tokens = self.options, hashlib.sha256()
        assert isinstance(offload.device, torch.device)  # of parsed options
        for line in self.lines:
            if isinstance(line, Line):
                tokens.update(f"{line.number}:".encode() + line.ids.tobytes())
        return {
            "sha256 of the input": self.sha256,
            "model": folder.resolve().name,
            "sha256 of config.json": _sha256(folder / "config.json"),
            "sha256 of the index": _sha256(folder / INDEX),
            "max tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
            "system prompt": options.system,
            "raw": options.raw,
            "end tokens": sorted(self.ends),
            "context length": context,
            "device": offload.device.type,
            "dtype": str(offload.dtype).removeprefix("torch."),
            "compile": offload.compile,
            "dequantize_on_load": offload.dequantize_on_load,
            "sha256 of the prompts' tokens": tokens.hexdigest(),  # tokenizer and chat template
        }


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
