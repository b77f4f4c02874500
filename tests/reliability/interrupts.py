"""An interrupt in the middle of an answer changes no later answer."""

from __future__ import annotations

import random
import signal
import threading
import time
from contextlib import suppress

import torch

from mixtral_offload.generation.chat import ChatSession
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.runtime.build import from_pretrained

from .result import Result

QUESTIONS = ("What is the capital of France?", "Tell me a story about a fox.", "What is 47 + 38?")


def check_interrupts(n: int = 50, seed: int = 0, n_tokens: int = 24) -> Result:
    """Send n real SIGINTs at random moments of `generate` and of a chat, in turns; generate again after each.

    A later answer is wrong unless it equals that of a fresh session on a model that was never interrupted.
    """
    draw, tokenizer, wrong, hit = random.Random(seed), load_tokenizer(), 0, 0
    undisturbed = from_pretrained(device="cpu", cache_size=8)
    expected = [answer(undisturbed, tokenizer, text, n_tokens) for text in QUESTIONS]
    model = from_pretrained(device="cpu", cache_size=2, prefetch=2, throttle="500MB")
    ids = tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    begin = time.perf_counter()
    answer(model, tokenizer, QUESTIONS[1], n_tokens)
    usual_s = time.perf_counter() - begin
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for number in range(n):
            chat = ChatSession(model, tokenizer, max_new_tokens=n_tokens)
            with suppress(KeyboardInterrupt):
                timer = interrupt_after(draw.uniform(0, usual_s))
                try:
                    if number % 2:
                        "".join(chat.send(QUESTIONS[1]))
                    else:
                        model.generate(ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)
                    while True:  # the answer was faster
                        time.sleep(1)
                finally:
                    timer.join()
            hit += 1
            which = number % len(QUESTIONS)
            wrong += answer(model, tokenizer, QUESTIONS[which], n_tokens) != expected[which]
            if number % 2:  # the interrupted conversation itself goes on
                wrong += answer(model, tokenizer, QUESTIONS[0], n_tokens) != expected[0]
    finally:
        signal.signal(signal.SIGINT, previous)
    model.offload.cache.close()
    return Result("interrupts in generation, next answers as a fresh session's", wrong, hit, "interrupts")


def answer(model, tokenizer, text: str, n_tokens: int) -> str:
    """The answer of a fresh session."""
    with torch.no_grad():
        return "".join(ChatSession(model, tokenizer, max_new_tokens=n_tokens).send(text))


def interrupt_after(seconds: float) -> threading.Thread:
    def work() -> None:
        time.sleep(seconds)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=work)
    thread.start()
    return thread
