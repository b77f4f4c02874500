"""Device costs are measured on a live model, part by part, and the model is left as it was."""

import time

import pytest

from mixtral_offload import from_pretrained
from mixtral_offload.analysis.recorder import record
from mixtral_offload.errors import OptionError
from mixtral_offload.experiments.calibration import (
    EXPERTS,
    EXPERTS_END,
    LAYERS,
    LAYERS_END,
    mark_parts,
    measure_costs,
    token_parts,
)


def test_a_token_s_time_is_split():
    kinds = [LAYERS, EXPERTS, EXPERTS_END, EXPERTS, EXPERTS_END, LAYERS_END]
    slow, token = [0, 5, 9, 12, 14, 20], [0, 3, 4, 7, 9, 10]  # the first two warm up; 5 between two tokens
    times = [25 * number + at for number, of in enumerate([slow, slow, token, token, token]) for at in of]
    assert token_parts(list(zip(kinds * 5, times)), 2) == (25 - 10, 10 - 3, 3)


def test_costs_are_measured_on_the_live_model():
    model = from_pretrained(cache_size=2, prefetch=2)
    held, began = model.offload.prefetcher, time.perf_counter()
    costs = measure_costs(model)
    took = time.perf_counter() - began
    token_s = costs.token_s + 6 * (costs.attention_s + 2 * costs.expert_s)
    assert min(costs.copy_s, costs.attention_s, costs.expert_s, costs.token_s) > 0 and costs.chunks == 1
    assert 0.05 * took < token_s * 2 * 24 < 2 * took  # two runs of 24 tokens, and little else
    mark_parts(model, 8)
    assert (model.offload.stats.misses, model.offload.stats.hits) == (12, 7 * 12)  # it repeats itself
    assert model.offload.prefetcher is held and not model.model.layers[0]._forward_pre_hooks
    with record(model), pytest.raises(OptionError, match="being recorded"):
        measure_costs(model)
    with pytest.raises(OptionError, match="n_passes"):
        measure_costs(model, 3)
    with pytest.raises(OptionError, match="copies nothing"):
        measure_costs(from_pretrained(cache_size=8))
