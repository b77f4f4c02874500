"""What the command line takes.

Knows options and their help. Knows nothing of what they do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from mixtral_offload import __version__

DEMO = "demo"


def build_parser(commands: dict[str, Callable]) -> argparse.ArgumentParser:
    """commands: name -> what runs it; it is called with the parsed arguments, which hold it as `run`."""
    parser = argparse.ArgumentParser(
        prog="mixtral-offload", description="Run Mixture-of-Experts models whose experts do not fit on the device.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (help, *groups) in COMMANDS.items():
        command = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(run=commands[name], refuse=command.error)
        for add in groups:
            add(command)
    return parser


def add_generate_options(parser) -> None:
    parser.add_argument("prompt", nargs="?", help="the prompt; - reads it from standard input")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without chat template"
    )
    parser.add_argument(
        "--input", metavar="FILE",
        help='answer a file instead: lines like {"prompt": "..."} or {"messages": [...]}, with system, max_tokens, '
        "seed, id where wanted",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FILE",
        help="where the answers go, in the same order; interrupted, the same command goes on",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, metavar="N", help="lines at a time (default: 32)")
    parser.add_argument(
        "--bad-lines", choices=("refuse", "skip"),
        help="lines that cannot be answered: do not start (refuse, the default), or answer the others",
    )  # fmt: skip
    parser.add_argument(
        "--restart", action="store_true", default=None, help="begin anew, whatever is in the output already"
    )


def add_trace_options(parser) -> None:
    parser.add_argument("prompts", help="a file: one prompt on each line, or set<TAB>prompt to compare sets")
    parser.add_argument("folder", help="where the trace, its table and the pictures go")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default: 64)")


def add_download_options(parser) -> None:
    parser.add_argument("model", help="hub repository, as owner/name")
    parser.add_argument("--local-dir", help="folder to put it in (default: the hub's cache)")
    parser.add_argument("--revision", help="branch, tag or commit")


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
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None,
        help="products from packed bytes through torch.compile (default: where experts are large)",
    )  # fmt: skip
    parser.add_argument(
        "--unpack",
        action="store_true",
        default=None,
        help="everything on the device, dequantized once: fast and large",
    )


def add_plan_options(parser) -> None:
    widths = (16, 8, 4, 3, 2)
    parser.add_argument(
        "model", help='folder, config.json or hub repository (only config.json is read), or "demo"'
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--vram", required=True, help="device memory that is free, like 15GB")
    parser.add_argument("--ram", required=True, help="host memory that is free for experts, like 12GB")
    parser.add_argument(
        "--link", required=True, help="bytes per second from host to device, like 12GB/s (PCIe 3.0 x16)"
    )
    parser.add_argument("--bandwidth", help="the device memory's bytes per second (default: 320GB/s, a T4's)")
    parser.add_argument("--disk", help="bytes per second from disk, where RAM is too small (default: 1GB/s)")
    parser.add_argument("--bits", type=int, choices=widths, default=2, help="of the experts (default: 2)")
    parser.add_argument(
        "--attention-bits", type=int, choices=widths, default=4, help="of the attention (default: 4)"
    )
    parser.add_argument("--context-length", type=int, help="tokens to leave memory for (default: 4096)")
    parser.add_argument(
        "--cache-size", type=_cache_size, help='experts per layer on the device (default: "auto")'
    )
    routing = parser.add_mutually_exclusive_group()
    routing.add_argument(
        "--trace", help="expect the routing of this trace, as `mixtral-offload trace` writes it"
    )
    routing.add_argument("--curve", help="expect hit rates like chance, mixtral or demo (default: mixtral)")
    parser.add_argument("--prefetch", type=int, help="experts of each coming layer to guess (default: 2)")
    parser.add_argument("--look-ahead", type=int, help="layers ahead to guess for (default: 1)")


def add_sampling_options(parser) -> None:
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--system", help="system prompt")


def add_convert_options(parser) -> None:
    parser.add_argument("source", help="folder of a checkpoint, 16-bit or quantized")
    parser.add_argument("target", help="folder to write; must not exist (an interrupted run goes on)")
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


def add_verify_options(parser) -> None:
    parser.add_argument("model", help='folder or hub repository, or "demo"')
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")


def _cache_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected "auto" or a number, found {text!r}') from None


#: name -> help and the groups of options it takes
COMMANDS = {
    "chat": (
        "talk with a model in the terminal",
        add_model_options,
        add_offload_options,
        add_sampling_options,
    ),
    "generate": (
        "answer one prompt, or a file of them",
        add_generate_options,
        add_model_options,
        add_offload_options,
        add_sampling_options,
    ),
    "trace": (
        "record what a file of prompts routes, and draw it",
        add_trace_options,
        add_model_options,
        add_offload_options,
    ),
    "download": ("fetch a checkpoint from the hub", add_download_options),
    "info": (
        "what a checkpoint holds, what it needs, whether it fits here",
        add_model_options,
        add_offload_options,
    ),
    "plan": (
        "what would go where on a stated card, and how fast it can be: from a model's config.json alone",
        add_plan_options,
    ),
    "convert": (
        "quantize a checkpoint: one file per expert, readable with safetensors",
        add_convert_options,
    ),
    "verify": (
        "read every byte of a checkpoint: checksums, structure, finite numbers",
        add_verify_options,
    ),
}
