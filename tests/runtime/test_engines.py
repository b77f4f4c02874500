"""Copies on the worker thread: they arrive, they fail loudly, they can be abandoned at any time."""

import gc
import threading
import time

import pytest
import torch

from mixtral_offload.runtime import engines as transfer
from mixtral_offload.runtime.engines import ABANDONED, RUNNING, Copy, ThreadEngine

CPU = torch.device("cpu")
LARGE = 4 << 20  # 16 chunks


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


@pytest.fixture
def slowly(monkeypatch):
    """Every chunk of the worker thread takes 10 ms more."""
    move = transfer.copy_chunk

    def slow(*arguments):
        time.sleep(0.01)
        move(*arguments)

    monkeypatch.setattr(transfer, "copy_chunk", slow)


def test_a_copy_that_waits_in_the_queue_can_be_abandoned_and_never_writes(slowly):
    engine = ThreadEngine(CPU, 1000)
    first, second = copy_of(1000), copy_of(1000)
    engine.start(first)
    engine.start(second)
    second.abandon()
    assert second.is_over
    first.wait()
    engine.close()  # the worker has seen the second one by now
    assert second.state == ABANDONED
    assert (second.slot == 0).all()


def test_abandoning_a_running_copy_waits_until_it_cannot_write(slowly):
    engine = ThreadEngine(CPU, LARGE)
    copy = copy_of(LARGE)
    engine.start(copy)
    while copy.state == "created":
        time.sleep(0.001)
    copy.abandon()
    assert copy.state == ABANDONED
    written = copy.slot.clone()
    time.sleep(0.1)
    assert (copy.slot == written).all() and (copy.slot == 0).any()
    engine.close()


def test_the_earlier_prediction_goes_first_and_a_needed_copy_before_both(slowly):
    engine = ThreadEngine(CPU, LARGE)
    late, earlier, need = (copy_of(LARGE) for _ in range(3))
    late.due, earlier.due = 5, 4
    for copy in (late, earlier, need):
        engine.start(copy)
        while copy.state != RUNNING:
            time.sleep(0.001)
    need.wait()
    assert earlier.state == late.state == RUNNING
    engine.promote(late)
    late.wait()
    assert earlier.state == RUNNING and (late.slot == 7).all()
    earlier.wait()
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
