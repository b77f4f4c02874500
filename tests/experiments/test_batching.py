"""Figures of batches: every variant gives the same answers and does what its name says."""

import numpy as np
import pytest

from mixtral_offload import load_tokenizer, record
from mixtral_offload.errors import OffloadError, OptionError
from mixtral_offload.experiments.baselines import continuous, no_end, static_batches, unsorted
from mixtral_offload.experiments.batching import (
    FULL,
    LEAVE_ONLY,
    STATIC,
    UNQUANTIZED,
    UNSORTED,
    ablate_batch,
    expected_bytes,
    measure_batches,
    measure_usage,
    take_turns,
    workload,
)
from mixtral_offload.experiments.plots import plot_batches
from mixtral_offload.runtime import forward


@pytest.fixture(scope="module")
def requests():
    return workload(load_tokenizer(), 6, lengths=(2, 4, 9))


@pytest.fixture
def model(offloaded):
    return offloaded(cache_size=3, batch_size=4)


def test_the_workload_is_the_same_every_time_and_as_asked(requests):
    tokenizer = load_tokenizer()
    assert requests == workload(tokenizer, 6, lengths=(2, 4, 9))
    assert len({len(request.ids) for request in requests}) > 3
    assert {request.max_new_tokens for request in workload(tokenizer, 40)} == {4, 8, 16, 32}
    two = workload(tokenizer, 3, ["One?", "Two?"])
    assert two[0].ids == two[2].ids != two[1].ids
    with pytest.raises(OptionError, match="no prompts"):
        workload(tokenizer, 3, [])
    with pytest.raises(OptionError, match=r"(?s)content.*'stories'"):  # a template would print the tuple
        workload(tokenizer, 3, [("stories", "One?")])


def test_batch_sizes_are_compared_over_the_same_answers(model, requests):
    found = measure_batches(model, requests, (1, 4), repeats=2)
    assert found.tokens == sum(request.max_new_tokens for request in requests)
    assert [len(found.seconds[n]) for n in (1, 4)] == [2, 2]
    assert 0 < found.bytes_per_token(4) < found.bytes_per_token(1)
    assert "kB moved per token" in str(found)


def test_other_answers_are_no_figures(model, requests):
    def wrong(model, requests):
        answers = continuous(model, requests, 4)
        answers[2][1] += 1
        return answers

    runs = {"right": (model, lambda model, requests: continuous(model, requests, 4)), "wrong": (model, wrong)}
    with pytest.raises(OffloadError, match=r"(?s)wrong.*request 2, token 1"):
        take_turns(runs, requests, 1)


def test_the_ablation_takes_each_away_and_changes_no_answer(model, requests):
    found = ablate_batch(model, requests, batch_size=4)
    assert [*found.seconds] == [FULL, LEAVE_ONLY, STATIC, UNSORTED, UNQUANTIZED]
    assert found.bytes_per_token(UNQUANTIZED) > 3 * found.bytes_per_token(FULL)
    assert found.bytes_per_token(UNSORTED) > found.bytes_per_token(FULL)


def test_unsorted_runs_each_token_for_itself(offloaded, requests):
    model = offloaded(cache_size=8, batch_size=4)
    n_tokens = sum(len(request.ids) + request.max_new_tokens - 1 for request in requests)
    with no_end(model):
        expected = continuous(model, requests, 4)
        sorted_uses = model.offload.stats.hits
        model.offload.stats.reset()
        with unsorted():
            assert continuous(model, requests, 4) == expected
    assert model.offload.stats.hits == n_tokens * 6 * 2 > sorted_uses


def test_static_batches_compute_what_has_ended(model, requests):
    with no_end(model), record(model) as run:
        answers = static_batches(model, requests, 4)
    assert [len(of) for of in answers] == [request.max_new_tokens for request in requests]
    groups = requests[:4], requests[4:]
    decoded = sum(len(group) * (max(of.max_new_tokens for of in group) - 1) for group in groups)
    assert run.trace.n_tokens == sum(len(request.ids) for request in requests) + decoded


def test_everything_is_restored_after_an_error(model):
    eos, own = model.generation_config.eos_token_id, forward.run_tokens
    with pytest.raises(ZeroDivisionError), no_end(model), unsorted():
        assert model.generation_config.eos_token_id is None and forward.run_tokens is not own
        _ = 1 / 0
    assert model.generation_config.eos_token_id == eos and forward.run_tokens is own


def test_expected_bytes_fall_with_the_batch(model, requests):
    usage = measure_usage(model, requests)
    assert usage.shape == (6, 8) and np.allclose(usage.sum(1), 2)
    expected = [expected_bytes(usage, 2, 1000, requests, n) for n in (1, 4, 16, 64)]
    assert expected == sorted(expected, reverse=True) and expected_bytes(usage, 8, 1000, requests, 4) == 0
    even = np.full((6, 8), 2 / 8)
    few, many = (expected_bytes(even, k, 1000, requests, 10_000) for k in (2, 6))
    # all are needed; the slots spare some
    assert few / many == pytest.approx(6 / 2, rel=0.6) and few > many


def test_the_picture_shows_the_figures(model, requests):
    found = measure_batches(model, requests, (1, 4))
    ablated = ablate_batch(model, requests, batch_size=4)
    figure, shown = plot_batches({3: found}, {3: {1: 5e4, 4: 2e4}}, {"here": ablated}, n_experts=8)
    assert shown["speed"].tolist() == [[found.tokens_per_s(1), found.tokens_per_s(4)]]
    assert shown["bytes"].tolist() == [[found.bytes_per_token(1), found.bytes_per_token(4)]]
    assert shown["expected"].tolist() == [[5e4, 2e4]]
    assert shown["ablation"].shape == (1, 5) and shown["ablation"][0, 0] == 1
    assert len(figure.axes) == 3
