"""The command line's commands, options and help; not what they do."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from mixtral_offload import __version__
from mixtral_offload.core.misses import MISSES
from mixtral_offload.core.options import declared


def build_parser(commands: dict[str, Callable]) -> argparse.ArgumentParser:
    """Make the parser.

    Args:
        commands: name -> what runs it; it is called with the parsed arguments, which hold it as `run`.
    """
    parser = argparse.ArgumentParser(
        prog="mixtral-offload", allow_abbrev=False,
        description="Run Mixture-of-Experts models whose experts do not fit on the device.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (help, *groups) in COMMANDS.items():
        command = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(run=commands[name], refuse=command.error)
        for group in groups:
            _add(command, group)
    return parser


def given(arguments: argparse.Namespace, *groups: Group) -> dict[str, Any]:
    """Return the options of these groups that were given, or have a default, by name."""
    names = [name.lstrip("-").replace("-", "_") for group in groups for name, *_ in group]
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _add(parser: argparse.ArgumentParser, group: Group) -> None:
    exclusive = None
    for name, help, settings in group:
        place: Any = parser
        if settings.get("exclusive"):
            place = exclusive = exclusive or parser.add_mutually_exclusive_group()
        place.add_argument(name, help=help, **{key: of for key, of in settings.items() if key != "exclusive"})


def _flag(option: dataclasses.Field) -> Option:
    """Make an option of the command line from one of `from_pretrained`; None where it is not given."""
    settings = {"default": None, **option.metadata["flag"]}
    if option.name == "compile":
        settings["action"] = argparse.BooleanOptionalAction
    elif option.default is False:
        settings["action"] = "store_true"
    help = option.metadata["help"]
    if option.default not in (None, False, "auto"):
        help += f" Default: {option.default}."
    return "--" + option.name.replace("_", "-"), help, settings


#: name, help, settings of argparse; "exclusive": at most one of these may be given
Option = tuple[str, str | None, dict[str, Any]]
Group = tuple[Option, ...]
INT, CACHE_SIZE, ONE = {"type": int}, declared()["cache_size"].metadata["flag"], {"exclusive": True}
FLAG = {"action": "store_true", "default": None}
WIDTHS = {"type": int, "choices": (16, 8, 4, 3, 2)}
REVISION: Option = ("--revision", "branch, tag or commit of a hub repository", {})
GENERATE: Group = (
    ("prompt", "the prompt; - reads it from standard input", {"nargs": "?"}),
    ("--raw", "continue the text as it is, without chat template", {"action": "store_true"}),
    ("--input", 'answer a file instead: lines like {"prompt": "..."} or {"messages": [...]}, with system, '
     "max_tokens, seed, id where wanted", {"metavar": "FILE"}),
    ("--output", "where the answers go, in the same order; after an interrupt, the same command resumes",
     {"metavar": "FILE"}),
    ("--batch-size", "lines at a time (default: 32)", {**INT, "metavar": "N"}),
    ("--bad-lines", "lines that cannot be answered: do not start (refuse, the default), or answer the others",
     {"choices": ("refuse", "skip")}),
    ("--restart", "discard the answers that are kept, and start over", FLAG),
)  # fmt: skip
TRACE: Group = (
    ("prompts", "a file: one prompt on each line, or set<TAB>prompt to compare sets", {}),
    ("folder", "where the trace, its table and the pictures go", {}),
    ("--max-tokens", "longest answer (default: 64)", {**INT, "default": 64}),
)
DOWNLOAD: Group = (
    ("model", "hub repository, as owner/name", {}),
    ("--local-dir", "folder to put it in (default: the hub's cache)", {}),
    ("--revision", "branch, tag or commit", {}),
)
MODEL: Group = (
    ("--model", "folder or hub repository (default: the small model that ships with the package)",
     {"default": "demo"}),
    ("--tokenizer", "folder or hub repository of the tokenizer, if not the model's own", {}),
    REVISION,
)  # fmt: skip
OFFLOAD: Group = tuple(_flag(field) for field in declared().values() if field.metadata["flag"] is not None)
PLAN: Group = (
    ("model", 'folder, config.json or hub repository (only config.json is read), or "demo"', {}),
    REVISION,
    ("--vram", "device memory that is free, like 15GB", {"required": True}),
    ("--ram", "host memory that is free for experts, like 12GB", {"required": True}),
    ("--link", "bytes per second from host to device, like 12GB/s (PCIe 3.0 x16)", {"required": True}),
    ("--bandwidth", "the device memory's bytes per second (default: 320GB/s, a T4's)", {}),
    ("--disk", "bytes per second from disk, where RAM is too small (default: 1GB/s)", {}),
    ("--bits", "of the experts (default: 2)", {**WIDTHS, "default": 2}),
    ("--attention-bits", "of the attention (default: 4)", {**WIDTHS, "default": 4}),
    ("--context-length", "tokens to leave memory for (default: 4096)", INT),
    ("--cache-size", 'experts per layer on the device (default: "auto")', CACHE_SIZE),
    ("--trace", "expect the routing of this trace, as `mixtral-offload trace` writes it", ONE),
    ("--curve", "expect hit rates like chance, mixtral or demo (default: mixtral)", ONE),
    ("--prefetch", "experts of each coming layer to predict (default: 2)", INT),
    ("--look-ahead", "how many layers ahead to predict (default: 1)", INT),
    ("--misses", "copy experts that the device lacks (default), or let the CPU compute them, or some (auto)",
     {"choices": MISSES}),
    ("--cpu", "bytes of packed experts per second that the CPU computes, for --misses", {}),
)  # fmt: skip
SAMPLING: Group = (
    ("--max-tokens", "longest answer (default: 512)", {**INT, "default": 512}),
    ("--temperature", "0 is greedy (default)", {"type": float, "default": 0.0}),
    ("--top-p", None, {"type": float, "default": 0.95}),
    ("--seed", None, INT),
    ("--system", "system prompt", {}),
)
CONVERT: Group = (
    ("source", "folder of a checkpoint, 16-bit or quantized", {}),
    ("target", "folder to write; must not exist (an interrupted run resumes)", {}),
    ("--bits", "of the experts (default: as stored)", WIDTHS),
    ("--group-size", "weights per scale (default: 64; 16 at 2 bits)", INT),
    (
        "--scale-group-size",
        "store scales and zeros in 8 bits, in groups of this size (default: fp16 scales)",
        INT,
    ),
    ("--attention-bits", "of the attention (default: as stored)", WIDTHS),
    ("--default-cache-size", "cache size to use where this checkpoint is loaded without one", INT),
    ("--device", "where to quantize (default: cpu)", {"default": "cpu"}),
)
VERIFY: Group = (("model", 'folder or hub repository, or "demo"', {}), REVISION)
#: name -> help and the groups of options it takes
COMMANDS: dict[str, tuple[Any, ...]] = {
    "chat": ("talk with a model in the terminal", MODEL, OFFLOAD, SAMPLING),
    "generate": ("answer one prompt, or a file of them", GENERATE, MODEL, OFFLOAD, SAMPLING),
    "trace": ("record the routing of a file of prompts, and draw it", TRACE, MODEL, OFFLOAD),
    "download": ("fetch a checkpoint from the hub", DOWNLOAD),
    "info": ("what a checkpoint holds, what it needs, whether it fits here", MODEL, OFFLOAD),
    "plan": ("plan for a stated device and project its speed, from a model's config.json alone", PLAN),
    "convert": ("quantize a checkpoint: one file per expert, readable with safetensors", CONVERT),
    "verify": ("read every byte of a checkpoint: checksums, structure, finite numbers", VERIFY),
}  # fmt: skip
