"""The command line: chat, generate, trace, download, info, plan, convert, verify.

Handles the terminal; each command calls one function of the package with the given options.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

from mixtral_offload.apps.parser import OFFLOAD, PLAN, build_parser, given
from mixtral_offload.errors import DownloadError, OffloadError
from mixtral_offload.system.safe_output import safe_output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mixtral_offload.generation.chat import ChatSession
    from mixtral_offload.generation.jobs import Job
    from mixtral_offload.runtime.offload import OffloadedModel
    from mixtral_offload.weights.hqq import Quantization


@safe_output()
def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status. An `OffloadError` is one message, never a traceback."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    commands = {
        "chat": run_chat,
        "generate": run_generate,
        "trace": run_trace,
        "download": run_download,
        "info": run_info,
        "plan": run_plan,
        "convert": run_convert,
        "verify": run_verify,
    }
    arguments = build_parser(commands).parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except OffloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has gone
        drop_output()
        return 141
    except OSError as error:  # a full disk behind standard output, a deleted file
        where = "" if error.filename is None else f"\n  file: {error.filename}"
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        drop_output()
        return 1


def drop_output() -> None:
    """Discard what standard output still buffers; otherwise the flush at exit fails too."""
    with contextlib.suppress(OSError, ValueError):  # standard output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load(arguments: Namespace) -> tuple[OffloadedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer; print the plan to standard error."""
    from mixtral_offload.generation.tokenizer import load_tokenizer
    from mixtral_offload.runtime.options import parse_options

    parse_options(given(arguments, OFFLOAD))  # validate options before downloading
    tokenizer = load_tokenizer(arguments.model, arguments.tokenizer, hub=_hub(arguments))
    return load_model(arguments), tokenizer


def _hub(arguments: Namespace) -> dict[str, str]:
    """Arguments for the hub."""
    return {"revision": arguments.revision} if arguments.revision else {}


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings without files and lines of code."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def load_model(arguments: Namespace, batch_size: int = 1) -> OffloadedModel:
    """Load the model; print the plan and notices to standard error."""
    from mixtral_offload.runtime.build import from_pretrained
    from mixtral_offload.runtime.settings import notice

    options = given(arguments, OFFLOAD) | {"progress": sys.stderr.isatty(), "batch_size": batch_size}
    with _plain_warnings():
        model = from_pretrained(arguments.model, hub=_hub(arguments), **options)
    notes = [f"notice: {text}"] if (text := notice(model)) else []
    if seconds := model.offload.compile_s:
        how = "kept for the next start; --no-compile does without, and is slower"
        notes.append(f"compiled in {seconds:.0f} s ({how})")
    print(model.offload.plan, *(f"  - {note}" for note in notes), "", sep="\n", file=sys.stderr)
    return model


def session(arguments: Namespace) -> ChatSession:
    """Begin the conversation of `chat` or `generate`."""
    from mixtral_offload.generation.chat import ChatSession
    from mixtral_offload.runtime.settings import check_sampling

    sampling = {
        "max_new_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    check_sampling(**sampling)
    return ChatSession(*load(arguments), system_prompt=arguments.system, **sampling)


def run_chat(arguments: Namespace) -> None:
    from mixtral_offload.apps.terminal import chat_loop

    chat_loop(session(arguments), "\nyou> " if sys.stdin.isatty() else "")


def run_generate(arguments: Namespace) -> None:
    from mixtral_offload.generation.tokenizer import RAW_TEMPLATE

    refuse_contradictions(arguments)
    if arguments.input is not None:
        return run_job(arguments)
    chat = session(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if arguments.raw:
        chat.tokenizer.chat_template = RAW_TEMPLATE
    for piece in chat.send(prompt):
        print(piece, end="", flush=True)
    print()
    print(chat.total, file=sys.stderr)


def refuse_contradictions(arguments: Namespace) -> None:
    """End the program if options of `generate` exclude each other."""
    if arguments.raw and arguments.system:
        arguments.refuse("--system has no place in a --raw prompt")
    if arguments.prompt is not None and arguments.input is not None:
        arguments.refuse("give a prompt or --input, not both")
    if arguments.input is None:
        if arguments.prompt is None:
            arguments.refuse("give a prompt, or --input and --output")
        for name in ("output", "batch_size", "bad_lines", "restart"):
            if getattr(arguments, name) is not None:
                arguments.refuse(f"--{name.replace('_', '-')} belongs to --input")
    elif "-" in (arguments.input, arguments.output):
        arguments.refuse("--input and --output are files: an interrupted job resumes from them")
    elif arguments.output is None:
        arguments.refuse("--input needs --output, the file for the answers")


def run_job(arguments: Namespace) -> None:
    """Answer a file of prompts. Input and journal are checked before anything is fetched or loaded."""
    from pathlib import Path

    from mixtral_offload.generation.jobs import Job, JobOptions
    from mixtral_offload.generation.tokenizer import load_tokenizer
    from mixtral_offload.runtime.options import parse_options
    from mixtral_offload.weights.source import resolve

    settings = {field.name: getattr(arguments, field.name) for field in fields(JobOptions)}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {"input": Path(arguments.input), "output": Path(arguments.output)}
    options = parse_options(given(arguments, OFFLOAD))
    with Job(JobOptions(**settings)) as job:
        tokenizer = load_tokenizer(arguments.model, arguments.tokenizer, hub=_hub(arguments))
        job.prepare(tokenizer, resolve(arguments.model, **_hub(arguments)), options)
        if job.bad:
            print(job.skipped, file=sys.stderr)
        try:
            answer(job, arguments)
            job.finish()
        except BaseException:
            if job.journal.places:
                print(f"\n{job.resume_hint}", file=sys.stderr)
            raise
    print(job.summary, file=sys.stderr)


def answer(job: Job, arguments: Namespace) -> None:
    """Answer the lines that have no answer yet; if there are none, load no model."""
    from tqdm import tqdm

    if not job.pending:
        return
    model, n_lines = load_model(arguments, batch_size=job.n_contexts), len(job.lines) - len(job.bad)
    with tqdm(
        total=n_lines, initial=job.n_kept, unit="line", desc="generate", disable=not sys.stderr.isatty()
    ) as bar:
        job.answer(model, bar.update)


def run_trace(arguments: Namespace) -> None:
    from mixtral_offload.apps.trace_report import read_prompts, write_report
    from mixtral_offload.runtime.settings import check_sampling

    check_sampling(arguments.max_tokens, 0.0, 1.0, None)
    prompts = read_prompts(arguments.prompts)
    model, tokenizer = load(arguments)
    trace, written = write_report(model, tokenizer, prompts, arguments.folder, arguments.max_tokens)
    print(f"{trace.n_tokens} tokens through {trace.n_layers} layers; {model.offload.stats.hit_rate:.0%} hits")
    print("\n".join(str(path) for path in written if path.suffix != ".npy"))


def run_download(arguments: Namespace) -> None:
    from mixtral_offload.units import gb
    from mixtral_offload.weights.hub import download, plan_download

    options = {"revision": arguments.revision, "local_dir": arguments.local_dir}
    try:
        plan = plan_download(arguments.model, **options)
        files = f"{len(plan.files)} files, {gb(plan.total_bytes)}, {gb(plan.remaining_bytes)} to fetch"
        print(f"{plan.repo_id}: {files}\ninto {plan.folder}, where {gb(plan.free_bytes)} are free")
    except DownloadError:
        pass  # `download` reports the error unless a complete local copy exists
    print(f"complete: {download(arguments.model, **options)}")


def run_info(arguments: Namespace) -> None:
    from mixtral_offload.analysis.reports import inspect

    print(inspect(arguments.model, revision=arguments.revision, **given(arguments, OFFLOAD)))


def run_plan(arguments: Namespace) -> None:
    from mixtral_offload.analysis.reports import plan

    options = given(arguments, PLAN)
    source, rates = options.pop("model"), {"link_bandwidth": options.pop("link")}
    if "cpu" in options:
        rates["cpu_bandwidth"] = options.pop("cpu")
    print(plan(source, **rates, **options))


def run_convert(arguments: Namespace) -> None:
    from pathlib import Path

    from tqdm import tqdm

    from mixtral_offload.models.checkpoint import open_checkpoint
    from mixtral_offload.runtime.convert import convert_checkpoint
    from mixtral_offload.runtime.options import parse_device
    from mixtral_offload.units import check_whole
    from mixtral_offload.weights.work_folder import resume_hint

    device = parse_device(arguments.device)
    experts = _quantization(arguments, arguments.bits)
    attention = _quantization(arguments, arguments.attention_bits)
    checkpoint = open_checkpoint(arguments.source)
    if (recommended := arguments.default_cache_size) is not None:
        check_whole("default cache size", recommended, checkpoint.top_k, checkpoint.n_experts)
    with tqdm(total=len(checkpoint.experts), unit="expert", desc="convert") as bar, terminable():
        try:
            convert_checkpoint(
                arguments.source,
                arguments.target,
                experts,
                attention,
                device=str(device),
                config_extra=None if recommended is None else {"offload": {"cache_size": recommended}},
                progress=bar.update,
                report=lambda text: bar.write(text, file=sys.stderr),
            )
        except (KeyboardInterrupt, SystemExit):
            if hint := resume_hint(Path(arguments.target).absolute()):
                bar.write(hint, file=sys.stderr)
            raise
    print(f"written: {arguments.target}")


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, with its own exit status, so that files are closed."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_verify(arguments: Namespace) -> None:
    from tqdm import tqdm

    from mixtral_offload.runtime.verify import verify
    from mixtral_offload.weights.source import resolve

    folder = resolve(arguments.model, **_hub(arguments))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
        result = verify(folder, bar.update)
    print(result)


def _quantization(arguments: Namespace, bits: int | None) -> Quantization | None:
    from mixtral_offload.weights.hqq import Quantization

    group, scale = arguments.group_size, arguments.scale_group_size
    if (group or scale) and {arguments.bits, arguments.attention_bits} <= {None, 16}:
        arguments.refuse("a group size needs --bits or --attention-bits, of less than 16")
    if bits is None:
        return None
    group = (16 if bits == 2 else 64) if group is None else group
    split = bits == 3 and group % 8 == 0
    return Quantization(16) if bits == 16 else Quantization(bits, group, scale, scale is not None, split)
