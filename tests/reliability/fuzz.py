"""Random damage to the files that say what a checkpoint is: headers, indexes, configurations.

    python -m tests.reliability.fuzz [--headers 60000] [--indexes 20000] [--configs 20000] [--seed 0]

Each damaged file is opened as a user would open it. It must be harmless, or refused with an error of this
package, within bounds of time and memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import signal
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from mixtral_offload.errors import OffloadError
from mixtral_offload.models.checkpoint import INDEX, SINGLE, open_checkpoint
from mixtral_offload.runtime.convert import convert_checkpoint
from mixtral_offload.runtime.options import parse_options
from mixtral_offload.runtime.prepare import build_skeleton
from mixtral_offload.weights.safetensors_io import read_header

from .result import Result

LONGEST_S = 10.0
MOST_BYTES = 512 << 20
ABSURD = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x",
    "0", "-1", "\u0000", "\u202e", "é" * 300, "../../x", "/etc/passwd", [], {}, [0], [None], {"a": 0}, [[]],
    "mixtral", "torch.float16", "U8", "F4",
)  # fmt: skip


def check_fuzz(
    headers: int = 60_000, indexes: int = 20_000, configs: int = 20_000, seed: int = 0, log=lambda text: None
) -> Result:
    """Open damaged headers, indexes and configurations; wrong are foreign errors, hangs and memory growth."""
    logging.set_verbosity_error()
    draw, outcomes, faults = random.Random(seed), Counter(), []
    process, began_s = psutil.Process(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, ours = _checkpoints(Path(folder))
        for kind, n, try_one in (
            ("header", headers, lambda: _try_header(plain, draw)),
            ("index", indexes, lambda: _try_text(ours, INDEX, draw, open_checkpoint)),
            (
                "config",
                configs,
                lambda: _try_text(draw.choice((plain, ours)), "config.json", draw, _open_and_build),
            ),
        ):
            begin_bytes = process.memory_info().rss
            for number in range(n):
                outcome = _bounded(try_one)
                outcomes[f"{kind} {outcome.split(':')[0]}"] += 1
                if outcome.startswith(("FOREIGN", "HANG")):
                    faults.append(f"{kind} {number}: {outcome}")
                if number % 1000 == 999:
                    seconds = time.perf_counter() - began_s
                    log(f"{seconds:6.0f} s {kind} {number + 1}, faults {len(faults)} {faults[-1:]}")
            if (grown := process.memory_info().rss - begin_bytes) > MOST_BYTES:
                faults.append(f"{kind}: memory has grown by {grown >> 20} MiB")
    return Result(
        "damaged headers, indexes and configurations: foreign exceptions, hangs, memory",
        len(faults),
        headers + indexes + configs,
        "files",
        time.perf_counter() - began_s,
        {"outcomes": dict(outcomes), "faults": faults[:20]},
    )


def _checkpoints(folder: Path) -> tuple[Path, Path]:
    """A small plain checkpoint in one file, and the same converted to ours, with an index."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=64,
    )
    plain, ours = folder / "plain", folder / "ours"
    MixtralForCausalLM(config).half().save_pretrained(plain)
    (plain / "generation_config.json").unlink(missing_ok=True)
    convert_checkpoint(plain, ours)
    return plain, ours


def _open_and_build(folder: Path) -> None:
    build_skeleton(open_checkpoint(folder), parse_options({"device": "cpu"}))


def _bounded(function: Callable[[], None]) -> str:
    """Call `function`; return "harmless", "refused", "HANG" or "FOREIGN: ..." with the place."""

    def late(*_):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        function()
    except OffloadError as error:
        return "refused" if len(str(error)) < 4000 else f"FOREIGN: a message of {len(str(error))} characters"
    except TimeoutError:
        return "HANG"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return f"FOREIGN: {type(error).__name__}: {str(error)[:200]} ({place})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return "harmless"


def _try_header(folder: Path, draw: random.Random) -> None:
    """Damage the header of a weights file, its length or its size, and read it."""
    data = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    header = _damaged_json(header, draw) if draw.random() < 0.7 else _damaged_bytes(header, draw)
    said = (
        len(header)
        if draw.random() < 0.9
        else draw.choice((0, 1, len(header) + 1, 2**31, 2**63 - 1, 2**64 - 1))
    )
    body = data[8 + length :]
    body = body if draw.random() < 0.8 else body[: draw.randrange(len(body))]
    path = folder.parent / "damaged.safetensors"
    path.write_bytes(struct.pack("<Q", said) + header + body)
    for stored in read_header(path).values():
        assert 0 <= stored.offset <= stored.offset + stored.n_bytes <= path.stat().st_size


def _try_text(folder: Path, name: str, draw: random.Random, open_it: Callable[[Path], None]) -> None:
    """Damage one JSON file of a checkpoint, and open the checkpoint."""
    path = folder / name
    whole = path.read_bytes()
    damaged = _damaged_json(whole, draw) if draw.random() < 0.8 else _damaged_bytes(whole, draw)
    other = folder.parent / f"{name}.whole"
    os.replace(path, other)
    try:
        path.write_bytes(damaged)
        open_it(folder)
    finally:
        os.replace(other, path)


def _damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    way, damaged = draw.randrange(5), bytearray(data)
    at = draw.randrange(max(len(data), 1))
    if way == 0:
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    elif way == 1:
        del damaged[at:]
    elif way == 2:
        del damaged[at : at + draw.randint(1, 64)]
    elif way == 3:
        damaged[at:at] = draw.randbytes(draw.randint(1, 64))
    else:
        damaged = bytearray(
            draw.choice(
                (
                    b"",
                    b"{}",
                    b"[]",
                    b"null",
                    b"[" * 100_000,
                    b'{"a":' * 50_000,
                    b"\xff\xfe",
                    b"0",
                    b"\x00" * 64,
                )
            )
        )
    return bytes(damaged)


def _damaged_json(data: bytes, draw: random.Random) -> bytes:
    """Replace, remove, add or repeat some values anywhere in the tree."""
    tree = copy.deepcopy(json.loads(data))
    for _ in range(draw.randint(1, 3)):
        nodes = list(_containers(tree))
        node = draw.choice(nodes)
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        way = draw.randrange(4)
        if not keys or way == 0:
            value = copy.deepcopy(draw.choice(ABSURD))
            if isinstance(node, dict):
                node[draw.choice(("x", "layers", "__metadata__", "quant_method", "k" * 300))] = value
            else:
                node.append(value)
            continue
        key = draw.choice(keys)
        if way == 1:
            del node[key]
        elif way == 2 and isinstance(node, dict):
            node[
                draw.choice((key + "x", key[:-1], key.replace("0", "1"), key.replace("experts", "expert")))
            ] = node.pop(key)
        elif way == 3 and len(keys) > 1:
            node[key] = copy.deepcopy(node[draw.choice(keys)])
        else:
            node[key] = copy.deepcopy(draw.choice(ABSURD))
    try:
        return json.dumps(tree).encode()
    except ValueError:  # more digits than Python writes
        return data


def _containers(tree):
    if isinstance(tree, dict | list):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _containers(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in (("headers", 60_000), ("indexes", 20_000), ("configs", 20_000), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    print(check_fuzz(**vars(parser.parse_args()), log=lambda text: print(text, flush=True)))
