"""Copies on the worker thread: they arrive, they fail loudly, they can be abandoned at any time."""

import gc
import threading
import time

import pytest
import torch

from mixtral_offload.copies import ABANDONED, RUNNING, Copy
from mixtral_offload.transfer import ThreadEngine
from mixtral_offload.worker import Waiting

CPU = torch.device("cpu")


def copy_of(n_bytes, value=7):
    slot = torch.zeros(n_bytes, dtype=torch.uint8)
    half = n_bytes // 2
    source = torch.full((n_bytes,), value, dtype=torch.uint8)
    return Copy([(0, source[:half]), (half, source[half:])], slot)


def test_bytes_are_there_after_wait():
    engine = ThreadEngine(CPU, 1000)
    copies = [copy_of(1000, value) for value in range(20)]
    for copy in copies:
        engine.start(copy)
    for value, copy in enumerate(copies):
        copy.wait()
        assert (copy.slot == value).all()
    engine.close()


def test_link_of_a_stated_speed():
    engine = ThreadEngine(CPU, 1000, link_bytes_per_s=10_000)
    copy = copy_of(1000)
    begin = time.perf_counter()
    engine.start(copy)
    copy.wait()
    assert time.perf_counter() - begin >= 0.1  # never faster; how much slower is the machine's business
    engine.close()


def test_a_copy_that_waits_in_the_queue_can_be_abandoned_and_never_writes():
    engine = ThreadEngine(CPU, 1000, link_bytes_per_s=10_000)
    first, second = copy_of(1000), copy_of(1000)
    engine.start(first)
    engine.start(second)
    second.abandon()
    assert second.is_over
    first.wait()
    engine.close()  # the worker has seen the second one by now
    assert second.state == ABANDONED
    assert (second.slot == 0).all()


def test_abandoning_a_running_copy_waits_until_it_cannot_write():
    engine = ThreadEngine(CPU, 1000, link_bytes_per_s=100_000)
    copy = copy_of(20_000)
    engine.start(copy)
    while copy.state == "created":
        time.sleep(0.001)
    copy.abandon()
    assert copy.state == ABANDONED
    written = copy.slot.clone()
    time.sleep(0.1)
    assert (copy.slot == written).all() and (copy.slot == 0).any()
    engine.close()


def test_a_copy_never_started_can_be_abandoned():
    copy = copy_of(10)
    copy.abandon()
    assert not copy.begin()


def test_an_error_on_the_worker_reaches_the_one_who_waits_and_the_worker_lives_on():
    engine = ThreadEngine(CPU, 1000)
    bad, good = (
        Copy([(0, torch.zeros(8, dtype=torch.uint8))], torch.zeros(4, dtype=torch.uint8)),
        copy_of(100),
    )
    engine.start(bad)
    engine.start(good)
    with pytest.raises(ValueError):
        bad.wait()
    good.wait()
    assert (good.slot == 7).all()
    engine.close()


def test_dropping_the_engine_ends_its_thread():
    before = set(threading.enumerate())
    engine = ThreadEngine(CPU, 10)
    (thread,) = set(threading.enumerate()) - before
    assert thread.is_alive()
    del engine
    gc.collect()
    assert not thread.is_alive()


def test_a_closed_engine_refuses_instead_of_letting_the_asker_wait():
    engine = ThreadEngine(CPU, 10)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.start(copy_of(10))


def test_a_wait_of_a_microsecond_ends():
    """SimpleQueue's own timeout once left the worker asleep for ever, and with it whoever waited for its copy."""

    def wait():
        for number in range(40_000):
            Waiting().until(time.perf_counter() + number % 50 * 1e-7)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_news_end_a_wait_at_once_and_are_not_lost():
    waiting = Waiting()
    copies = [copy_of(8) for _ in range(3)]
    for copy in copies:
        threading.Timer(0.05, waiting.put, [copy]).start()
        begin = time.perf_counter()
        waiting.until(begin + 30)
        assert time.perf_counter() - begin < 10
        assert waiting.pick() is copies[0]
    for copy in copies:
        assert waiting.pick() is copy
        waiting.remove(copy)


def test_a_guess_that_has_begun_and_was_overtaken_is_promoted_at_once():
    engine = ThreadEngine(CPU, 16_000, link_bytes_per_s=16_000 / 0.4)
    first, earlier = copy_of(16_000), copy_of(16_000)
    first.due, earlier.due = 5, 4
    engine.start(first)
    while first.state != RUNNING:
        time.sleep(0.001)
    engine.start(earlier)
    while earlier.state != RUNNING:
        time.sleep(0.001)
    engine.promote(first)
    first.wait()
    assert earlier.state == RUNNING and earlier.moved_bytes < 8_000
    engine.close()
