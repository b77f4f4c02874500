"""A link of a stated speed: nothing comes earlier, and time passes on it whether somebody looks or not."""

import threading
import time

import pytest
import torch

from mixtral_offload.core.copy_order import NOW
from mixtral_offload.runtime.engines import ABANDONED, CREATED, DONE, Copy, ThrottledEngine, make_engine

CPU = torch.device("cpu")
COPY_S = 0.08


@pytest.fixture
def engine():
    return ThrottledEngine(CPU, 1600, 1600 / COPY_S)


def copy_of(value=7, due=NOW):
    half, slot = torch.full((800,), value, dtype=torch.uint8), torch.zeros(1600, dtype=torch.uint8)
    return Copy([(0, half), (800, half)], slot, due)


def waited_s(*copies) -> float:
    begin = time.perf_counter()
    for copy in copies:
        copy.wait()
    return time.perf_counter() - begin


def test_a_copy_takes_its_time_and_no_thread(engine):
    threads, copies = threading.active_count(), [copy_of(value) for value in (3, 4)]
    for copy in copies:
        engine.start(copy)
    assert waited_s(*copies) >= 2 * COPY_S * 0.99 and threading.active_count() == threads
    assert [int(copy.slot.unique()) for copy in copies] == [3, 4]
    assert copies[0].ended_s == copies[1].began_s and copies[1].state == DONE


def test_time_passes_without_calls(engine):
    copy = copy_of()
    engine.start(copy)
    time.sleep(COPY_S * 1.5)
    assert waited_s(copy) < COPY_S / 2
    assert copy.ended_s - copy.asked_s == pytest.approx(COPY_S)


def test_a_needed_copy_waits_for_one_chunk_of_a_prediction_which_continues_after_it(engine):
    predicted, need = copy_of(due=3), copy_of()
    engine.start(predicted)
    time.sleep(COPY_S / 2)
    assert predicted.has_begun and not need.has_begun
    engine.start(need)
    need.wait()
    assert COPY_S <= need.ended_s - need.asked_s <= COPY_S * (1 + 1.1 / 16)
    engine.promote(predicted)
    predicted.wait()
    assert predicted.ended_s - predicted.asked_s == pytest.approx(2 * COPY_S)


def test_a_promoted_prediction_goes_before_an_earlier_one(engine):
    first, second = copy_of(due=4), copy_of(due=5)
    engine.start(first)
    engine.start(second)
    engine.promote(second)
    second.wait()
    assert second.ended_s - second.asked_s <= COPY_S * (1 + 1.1 / 16)


def test_a_cancelled_copy_moves_nothing_more_and_its_row_is_free_after_the_chunk_under_way(engine):
    copy, untouched = copy_of(due=1), copy_of(due=2)
    engine.start(copy)
    engine.start(untouched)
    time.sleep(COPY_S / 2)
    engine.cancel(copy)
    engine.cancel(untouched)
    assert copy.state == untouched.state == ABANDONED and untouched.is_over and untouched.moved_bytes == 0
    assert 0 < copy.moved_bytes < 1600 and copy.ended_s - copy.began_s >= COPY_S / 2 * 0.9
    time.sleep(COPY_S / 16)
    assert copy.is_over and (copy.slot == 0).all()
    with pytest.raises(RuntimeError, match="cancelled"):
        copy.wait()


def test_abandoning_needs_no_waiting_and_leaves_the_link_to_others(engine):
    copy, other = copy_of(), copy_of()
    engine.start(copy)
    engine.start(other)
    begin = time.perf_counter()
    copy.abandon()
    assert time.perf_counter() - begin < COPY_S / 2
    other.wait()
    assert other.ended_s - other.asked_s <= COPY_S * (1 + 1.1 / 16)


def test_an_error_reaches_the_one_who_waits_and_the_engine_lives_on(engine):
    bad, good = copy_of(), copy_of()
    bad.slot = torch.zeros(4, dtype=torch.uint8)
    engine.start(bad)
    engine.start(good)
    with pytest.raises(RuntimeError):
        bad.wait()
    good.wait()
    assert (good.slot == 7).all()


def test_a_closed_engine_refuses(engine):
    engine.close()
    copy = copy_of()
    with pytest.raises(RuntimeError, match="closed"):
        engine.start(copy)
    assert copy.state == CREATED


def test_a_stated_speed_makes_it():
    assert isinstance(make_engine(CPU, False, 1600, 1e6), ThrottledEngine)
