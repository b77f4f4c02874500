"""Hours of use in one process: chats, long answers, changing settings, interrupts; no growth, no divergence.

python -m tests.reliability.soak [--turns 2000] [--tokens 100000] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import time
from contextlib import suppress

import psutil
import torch

from mixtral_offload.generation.chat import ChatSession
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.runtime.build import from_pretrained

from .drops import MIB, own_bytes
from .identity import HELD_OUT
from .interrupts import interrupt_after
from .result import Result

TURN_TOKENS = 16
LONG_TOKENS = 400
TURNS_PER_MODEL = 40
GROWTH = 16 * MIB  # of the process's own memory between the first and the last quarter


def check_soak(turns: int = 2000, tokens: int = 100_000, seed: int = 0, log=lambda text: None) -> Result:
    """Chat for `turns` turns and generate `tokens` tokens, the rest in long answers, with random settings.

    Every turn and long answer is compared with that of a model with all experts on the device, which takes
    part in the same conversations, undisturbed. A tenth of the turns is interrupted first, by SIGINT or stop.

    Returns:
        Wrong are answers that differ, and growth over GROWTH.
    """
    draw, tokenizer = random.Random(seed), load_tokenizer()
    questions = [json.loads(line)["messages"][0]["content"] for line in HELD_OUT.read_text().splitlines()]
    reference = from_pretrained(device="cpu", cache_size=8)
    done = {"turns": 0, "long": 0, "tokens": 0, "interrupts": 0}
    wrong, held, began_s = 0, [], time.perf_counter()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while done["turns"] < turns or done["tokens"] < tokens:
            model = from_pretrained(device="cpu", **_random_options(draw))
            chats = [ChatSession(of, tokenizer, max_new_tokens=TURN_TOKENS) for of in (model, reference)]
            for _ in range(min(TURNS_PER_MODEL, turns - done["turns"])):
                wrong += not _same_turn(chats, draw.choice(questions), draw, done)
            if done["tokens"] < tokens:
                ids = torch.tensor([tokenizer(draw.choice(questions)).input_ids])
                length = {"max_new_tokens": LONG_TOKENS, "min_new_tokens": LONG_TOKENS, "do_sample": False}
                answers = [of.generate(ids, **length) for of in (model, reference)]
                wrong += not torch.equal(*answers)
                done["tokens"] += LONG_TOKENS
                done["long"] += 1
            model.offload.cache.close()
            del model, chats
            held.append(own_bytes())
            log(f"{time.perf_counter() - began_s:7.0f} s {done} wrong {wrong}, {held[-1] / MIB:.0f} MiB")
    finally:
        signal.signal(signal.SIGINT, previous)
    quarter = max(len(held) // 4, 1)
    growth = min(held[-quarter:]) - min(held[: 2 * quarter][quarter - 1 :])
    details = done | {
        "models": len(held),
        "growth_bytes": growth,
        "threads_at_the_end": psutil.Process().num_threads(),
        "open_files_at_the_end": len(psutil.Process().open_files()),
    }
    return Result(
        "a soak of chats and long answers with random settings and interrupts",
        wrong + (growth > GROWTH),
        done["turns"] + done["long"],
        "answers",
        time.perf_counter() - began_s,
        details,
    )


def _same_turn(chats: list[ChatSession], text: str, draw: random.Random, done: dict[str, int]) -> bool:
    """Whether both chats give the same answer, the first one perhaps after an interrupt; counts in `done`."""
    if draw.random() < 0.2 or chats[1].context_used > 300:
        for chat in chats:
            chat.clear()
    if draw.random() < 0.1:
        done["interrupts"] += _disturb(chats[0], text, draw)
    is_same = "".join(chats[0].send(text)) == "".join(chats[1].send(text))
    done["turns"] += 1
    done["tokens"] += chats[0].last.n_tokens
    return is_same


def _random_options(draw: random.Random) -> dict:
    prefetch = draw.choice((0, 2, 4))
    return {
        "cache_size": draw.randint(2, 7),
        "prefetch": prefetch,
        "look_ahead": draw.randint(1, 3),
        "store": draw.choice(("ram", "disk")),
        "policy": draw.choice(("lru", "lfu", "lrfu")),
        "shared_slots": draw.random() < 0.3,
        "throttle": draw.choice((None, "4GB")),
    }


def _disturb(chat: ChatSession, text: str, draw: random.Random) -> int:
    """Interrupt an answer, and take it back. Returns 1."""
    before, kept = list(chat.messages), draw.random() < 0.5
    with suppress(KeyboardInterrupt):
        if kept:
            for _ in chat.send(text):
                chat.stop()
        else:
            timer = interrupt_after(draw.uniform(0, 0.2))
            try:
                "".join(chat.send(text))
                while True:
                    time.sleep(1)
            finally:
                timer.join()
    chat.messages = before
    return 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    print(check_soak(**vars(parser.parse_args()), log=lambda text: print(text, flush=True)))
