"""Synthetic routing has the stated locality, and its predictions the stated recall."""

import numpy as np
import pytest

from mixtral_offload.analysis.replay import replay
from mixtral_offload.analysis.synthetic import (
    CURVES,
    MIXTRAL_RECALL,
    fit_stay,
    lru_hit_rates,
    recall_by_layer,
    sticky_predictions,
    sticky_trace,
)
from mixtral_offload.errors import OptionError


def test_every_token_uses_different_experts_that_exist():
    trace = sticky_trace(200, 3, 5, 4, 0.5)
    assert trace.experts.shape == (200, 3, 4)
    assert (np.diff(np.sort(trace.experts, -1)) > 0).all()  # k different ones, even where few others are left
    assert trace.experts.min() == 0 and trace.experts.max() == 4
    assert len(trace.use_expert) == trace.experts.size


def test_stay_0_is_chance_and_stay_1_never_changes():
    for n_experts, top_k, slots in ((8, 2, 2), (8, 2, 6), (8, 6, 7), (32, 4, 10)):
        rate = replay(sticky_trace(3000, 2, n_experts, top_k, 0.0), slots).hit_rate
        assert rate == pytest.approx(slots / n_experts, abs=0.015)
    trace = sticky_trace(50, 2, 8, 2, 1.0)
    assert (np.sort(trace.experts, -1) == np.sort(trace.experts[0], -1)).all()


def test_the_share_that_stays_is_the_one_stated():
    trace = sticky_trace(4000, 2, 64, 2, 0.4)
    before, now = trace.experts[:-1, :, None, :], trace.experts[1:, :, :, None]
    kept = (before == now).any(-1).mean()
    assert kept == pytest.approx(0.4 + 0.6 * 1.6 / 62.8, abs=0.015)  # a new draw may be the same expert
    uses = trace.usage()
    assert uses.min() > 0.5 * uses.mean()  # all are equally likely


def test_hit_rates_of_all_sizes_are_those_of_replays():
    trace = sticky_trace(400, 3, 8, 2, 0.3, seed=4)
    rates = lru_hit_rates(trace)
    for slots in range(2, 9):
        assert rates[slots] == pytest.approx(replay(trace, slots).hit_rate, abs=1e-12)


@pytest.mark.parametrize("stay", [0.05, 0.35, 0.8])
def test_stay_is_fitted_to_its_hit_rates(stay):
    trace = sticky_trace(4000, 4, 16, 4, stay, seed=9)
    measured = {slots: replay(trace, slots).hit_rate for slots in (4, 8)}
    assert fit_stay(measured, 16, 4) == pytest.approx(stay, abs=0.03)


@pytest.mark.parametrize("name, within", [("mixtral", 0.025), ("demo", 0.07)])
def test_stay_fits_a_measured_curve(name, within):
    """The shipped model uses experts of earlier tokens again, which one number cannot state.

    Its smallest cache is 0.06 too good, its larger ones are 0.04 too bad.
    """
    curve = CURVES[name]
    rates = lru_hit_rates(sticky_trace(3000, 4, 8, 2, curve.stay, seed=3))
    off = [abs(rates[slots] - rate) for slots, rate in curve.hit_rates.items()]
    assert max(off) < within
    for stay in (curve.stay - 0.1, curve.stay + 0.1):  # no other number is better
        others = lru_hit_rates(sticky_trace(3000, 4, 8, 2, stay, seed=3))
        assert sum(o * o for o in off) < sum((others[s] - rate) ** 2 for s, rate in curve.hit_rates.items())
    assert CURVES["chance"].stay == 0


def found(trace, predicted):
    """Share of needed experts among the predicted, `[L, D]`; nan where there are none."""
    hits = (predicted[..., None, :] == trace.experts[:, :, None, :, None]).any(-1).mean((0, 3))
    return np.where((predicted < 0).all((0, 3)), np.nan, hits)


@pytest.mark.parametrize("n_predictions", [1, 2, 3, 7])
def test_predictions_have_the_stated_recall(n_predictions):
    trace = sticky_trace(4000, 4, 8, 2, 0.2)
    predicted = sticky_predictions(trace, [0.45, 0.3], n_predictions, 2)
    assert predicted.shape == (4000, 4, 2, n_predictions) and predicted.dtype == np.int16
    assert (predicted[:, 0] == -1).all() and (predicted[:, 1, 1] == -1).all()  # no layer is that far before
    there = predicted[:, 2:]
    assert there.min() >= 0 and (np.diff(np.sort(there, -1)) > 0).all()  # n different ones
    if n_predictions < 7:
        np.testing.assert_allclose(found(trace, predicted)[2:], [[0.45, 0.3]] * 2, atol=0.02)
    else:  # 7 of 8 leave out at most one
        assert (found(trace, predicted)[2:] >= 0.5).all()


def test_recall_by_layer_as_measured_on_mixtral():
    recall = recall_by_layer(7, 2)
    assert recall[:, 0].tolist() == [*MIXTRAL_RECALL, 0.88, 0.88]
    assert recall[6, 1] == pytest.approx(0.88 * 0.91)
    trace = sticky_trace(3000, 7, 8, 2, 0.2)
    np.testing.assert_allclose(
        found(trace, sticky_predictions(trace, recall, 2, 2))[2:], recall[2:], atol=0.02
    )


def test_a_trace_holds_its_predictions():
    """Those from the embeddings, before layer 0, are left out: their recall was not measured."""
    trace = sticky_trace(500, 4, 8, 2, 0.2, recall=[0.9, 0.4], look_aheads=2, seed=2)
    assert (trace.experts == sticky_trace(500, 4, 8, 2, 0.2, seed=2).experts).all()
    distance = trace.predicted_layer - trace.predicted_from
    assert trace.predicted_from.min() == 0 and set(distance) == {1, 2} and set(trace.predicted_rank) == {0, 1}
    assert len(distance) == 500 * 2 * (3 + 2)  # 3 layers have one before them, 2 have two
    chosen = trace.experts[trace.predicted_pass, trace.predicted_layer]
    needed = (chosen == trace.predicted_expert[:, None]).any(-1)
    assert needed[distance == 1].mean() == pytest.approx(0.9, abs=0.02)
    assert needed[distance == 2].mean() == pytest.approx(0.4, abs=0.03)


def test_impossible_numbers_are_refused():
    trace = sticky_trace(10, 2, 8, 2, 0.2)
    for wrong in ({"stay": 1.2}, {"stay": -0.1}, {"top_k": 9}, {"n_tokens": 0}, {"n_layers": 2.5}):
        with pytest.raises(OptionError, match="impossible"):
            sticky_trace(**{"n_tokens": 10, "n_layers": 2, "n_experts": 8, "top_k": 2, "stay": 0.2, **wrong})
    with pytest.raises(OptionError, match=r"recall of 0 to 0\.5"):
        sticky_predictions(trace, 0.8, 1, 1)  # one prediction cannot find 0.8 of two
    with pytest.raises(OptionError, match="impossible predictions"):
        sticky_predictions(trace, 0.8, 9, 1)
    with pytest.raises(OptionError, match=r"\[1\] or \[2, 1\]"):
        sticky_predictions(trace, [0.8, 0.7, 0.6], 2, 1)
    for wrong in ({}, {1: 0.2}, {3: 1.2}):
        with pytest.raises(OptionError, match="impossible hit rates"):
            fit_stay(wrong, 8, 2)
