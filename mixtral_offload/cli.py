"""The command line: chat, generate, trace, download, info, convert.

Knows the terminal. Everything it does is a function of the package, called with the options given.
"""

from __future__ import annotations

import argparse
import sys

from . import __version__
from .errors import OffloadError

DEMO = "demo"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of ours are one message, never a traceback."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except OffloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixtral-offload", description="Run Mixture-of-Experts models whose experts do not fit on the device.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    chat = command("chat", run_chat, "talk with a model in the terminal")
    generate = command("generate", run_generate, "answer one prompt")
    generate.add_argument("prompt", help="the prompt; - reads it from standard input")
    generate.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without chat template"
    )
    for sub in (chat, generate):
        add_model_options(sub)
        add_offload_options(sub)
        add_sampling_options(sub)
    trace = command("trace", run_trace, "record what a file of prompts routes, and draw it")
    trace.add_argument("prompts", help="a file: one prompt on each line, or set<TAB>prompt to compare sets")
    trace.add_argument("folder", help="where the trace, its table and the pictures go")
    trace.add_argument("--max-tokens", type=int, default=64, help="longest answer (default: 64)")
    add_model_options(trace)
    add_offload_options(trace)
    download = command("download", run_download, "fetch a checkpoint from the hub")
    download.add_argument("model", help="hub repository, as owner/name")
    download.add_argument("--local-dir", help="folder to put it in (default: the hub's cache)")
    download.add_argument("--revision", help="branch, tag or commit")
    info = command("info", run_info, "what a checkpoint holds, what it needs, whether it fits here")
    add_model_options(info)
    add_offload_options(info)
    convert = command(
        "convert", run_convert, "quantize a checkpoint: one file per expert, readable with safetensors"
    )
    add_convert_options(convert)
    return parser


def add_model_options(parser) -> None:
    parser.add_argument(
        "--model",
        default=DEMO,
        help="folder or hub repository (default: the small model that ships with the package)",
    )
    parser.add_argument(
        "--tokenizer", help="folder or hub repository of the tokenizer, if not the model's own"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")


def add_offload_options(parser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="of activations")
    parser.add_argument("--cache-size", type=_cache_size, help='experts per layer on the device, or "auto"')
    parser.add_argument(
        "--store", default="auto", choices=("auto", "ram", "disk"), help="home of the other experts"
    )
    parser.add_argument("--vram", help="device memory to use, like 15GB (default: what is free)")
    parser.add_argument("--ram", help="host memory to use, like 12GB (default: what is free)")
    parser.add_argument(
        "--context-length", type=int, default=4096, help="tokens to leave memory for (default: 4096)"
    )
    parser.add_argument(
        "--link", help="slow copies down to this many bytes per second, like 12GB, for experiments"
    )

    parser.add_argument(
        "--prefetch",
        type=int,
        help="experts of each coming layer to guess and copy ahead (default: 2 on CUDA, 0 on cpu)",
    )
    parser.add_argument("--look-ahead", type=int, help="layers ahead to guess for (default: 1)")
    parser.add_argument(
        "--policy", choices=("lru", "lfu", "lrfu"), help="which expert leaves the cache (default: lru)"
    )
    parser.add_argument(
        "--shared-slots", action="store_true", default=None, help="one pool of slots for all layers"
    )


def add_sampling_options(parser) -> None:
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--system", help="system prompt")


def add_convert_options(parser) -> None:
    parser.add_argument("source", help="folder of a checkpoint, 16-bit or quantized")
    parser.add_argument("target", help="folder to write; must not exist")
    parser.add_argument(
        "--bits", type=int, choices=(16, 8, 4, 3, 2), help="of the experts (default: as stored)"
    )
    parser.add_argument("--group-size", type=int, help="weights per scale (default: 64; 16 at 2 bits)")
    parser.add_argument(
        "--scale-group-size",
        type=int,
        help="8-bit scales and zeros, so many scales per group (default: fp16 scales)",
    )
    parser.add_argument(
        "--attention-bits", type=int, choices=(16, 8, 4, 3, 2), help="of the attention (default: as stored)"
    )
    parser.add_argument(
        "--default-cache-size",
        type=int,
        help="recommend a cache size to those who load it without naming one",
    )
    parser.add_argument("--device", default="cpu", help="where to solve (default: cpu)")


def _cache_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected "auto" or a number, found {text!r}') from None


def load(arguments):
    """(model, tokenizer) as the options ask; prints the plan to standard error."""
    from .offload import DEMO as demo_folder
    from .offload import from_pretrained
    from .tokenizer import load_tokenizer

    source = demo_folder if arguments.model == DEMO else arguments.model
    hub = {"revision": arguments.revision} if arguments.revision else None
    names = ("device", "dtype", "cache_size", "store", "vram", "ram", "context_length", "link", "prefetch", "look_ahead",
             "policy", "shared_slots")  # fmt: skip
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    model = from_pretrained(source, hub=hub, progress=sys.stderr.isatty(), **options)
    print(f"{model.offload.plan}\n", file=sys.stderr)
    return model, load_tokenizer(source, arguments.tokenizer, hub=hub)


def session(arguments):
    from .chat import ChatSession

    model, tokenizer = load(arguments)
    return ChatSession(
        model, tokenizer, system_prompt=arguments.system, max_new_tokens=arguments.max_tokens,
        temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed,
    )  # fmt: skip


def run_chat(arguments) -> None:
    chat = session(arguments)
    print(
        "Write a message. Ctrl-C stops an answer; /clear starts anew; /exit or Ctrl-D ends.", file=sys.stderr
    )
    while (text := _read("\nyou> ")) not in (None, "/exit"):
        if text == "/clear":
            chat.clear()
        elif text.strip():
            _answer(chat, text)
    print(f"\n{chat.total}", file=sys.stderr)


def _read(prompt: str) -> str | None:
    """One line, or None at the end of input. Ctrl-C at the prompt ends the session too."""
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(chat, text: str) -> None:
    answer = chat.send(text)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        answer.close()
        print(" [stopped]")
    except OffloadError as error:
        print(f"error: {error}", file=sys.stderr)


def run_generate(arguments) -> None:
    chat = session(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if arguments.raw:
        chat.tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    for piece in chat.send(prompt):
        print(piece, end="", flush=True)
    print()
    print(chat.total, file=sys.stderr)


def run_trace(arguments) -> None:
    from .report import read_prompts, write_report

    prompts = read_prompts(arguments.prompts)
    model, tokenizer = load(arguments)
    trace, written = write_report(model, tokenizer, prompts, arguments.folder, arguments.max_tokens)
    print(f"{trace.n_tokens} tokens through {trace.n_layers} layers; {model.offload.stats.hit_rate:.0%} hits")
    print("\n".join(str(path) for path in written if path.suffix != ".npy"))


def run_download(arguments) -> None:
    from .hub import download, plan_download
    from .plan import gb

    options = {"revision": arguments.revision, "local_dir": arguments.local_dir}
    plan = plan_download(arguments.model, **options)
    print(
        f"{plan.repo_id}: {len(plan.files)} files, {gb(plan.total_bytes)}, {gb(plan.remaining_bytes)} to fetch"
    )
    print(f"into {plan.folder}, where {gb(plan.free_bytes)} are free")
    print(f"complete: {download(arguments.model, **options)}")


def run_info(arguments) -> None:
    from .info import describe

    print(describe(arguments))


def run_convert(arguments) -> None:
    from tqdm import tqdm

    from .checkpoint import open_checkpoint
    from .convert import convert_checkpoint
    from .quantization import Quantization

    def quantization(bits):
        if bits is None:
            return None
        group = arguments.group_size or (16 if bits == 2 else 64)
        scale = arguments.scale_group_size
        return Quantization(16) if bits == 16 else Quantization(bits, group, scale, scale is not None)

    n_experts = len(open_checkpoint(arguments.source).experts)
    experts, attention = quantization(arguments.bits), quantization(arguments.attention_bits)
    recommended = arguments.default_cache_size
    extra = None if recommended is None else {"offload": {"cache_size": recommended}}
    with tqdm(total=n_experts, unit="expert", desc="convert") as bar:
        convert_checkpoint(
            arguments.source, arguments.target, experts, attention,
            device=arguments.device, config_extra=extra, progress=bar.update,
        )  # fmt: skip
    print(f"written: {arguments.target}")
