"""A projection is a timed replay: it agrees with hand counts and with the replay without times."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoConfig

from mixtral_offload.analysis.projection import BANDWIDTH_SHARE, PROMPT_TOKENS, estimate_costs, project
from mixtral_offload.analysis.replay import replay
from mixtral_offload.analysis.synthetic import as_prompt, recall_by_layer, sticky_trace, with_plan
from mixtral_offload.core.placement import make_plan
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError
from mixtral_offload.models.sizes import model_sizes

LAYERS, E, K = 3, 8, 2
RATES = {"link_bytes_per_s": 1e9, "bandwidth_bytes_per_s": 50e9, "host_s": 0.0}


@pytest.fixture(scope="module")
def sizes():
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=E,
        vocab_size=1000,
        max_position_embeddings=4096,
    )
    return model_sizes(config)


def plan_of(sizes, slots: int, n_ram: int = 10**6):
    """`slots` experts per layer on the device, RAM for n_ram experts."""
    return make_plan(sizes.for_plan, slots * LAYERS * sizes.expert_bytes, n_ram * sizes.expert_bytes)


def one_after_the_other(n: int, step: int) -> RoutingTrace:
    """Token t uses experts t * step and t * step + 1 of each layer."""
    first = np.arange(n)[:, None, None] * step % E
    experts = np.broadcast_to((first + np.arange(K)) % E, (n, LAYERS, K))
    return RoutingTrace.from_routing(experts, np.ones((n, LAYERS, K)), E)


def by_hand(sizes, context=4096):
    rate = BANDWIDTH_SHARE * RATES["bandwidth_bytes_per_s"]
    attention = LAYERS * 2 * (128 * 128 + 64 * 128) * 4.25 / 8  # with scales, about 4.25 bits per weight
    kv = 2 * LAYERS * 64 * context * 2
    head = 1000 * 128 * 2
    return (attention + kv + head + LAYERS * K * sizes.expert_bytes) / rate


def test_without_misses_only_compute_is_left(sizes):
    found = project(sizes, plan_of(sizes, 2), one_after_the_other(8, 0), **RATES)
    assert found.hit_rate == 1 and found.misses_per_token == 0 and found.over_floor == pytest.approx(1)
    assert found.time_per_token_s == found.compute_s == pytest.approx(by_hand(sizes), rel=0.02)


def test_if_every_use_is_a_miss_the_link_is_the_limit(sizes):
    found = project(sizes, plan_of(sizes, 2), one_after_the_other(8, 2), **RATES)
    copies_s = LAYERS * K * sizes.expert_bytes / 1e9
    assert found.hit_rate == 0 and found.misses_per_token == LAYERS * K
    assert copies_s < found.time_per_token_s < copies_s + found.compute_s
    assert found.compute_s == pytest.approx(by_hand(sizes), rel=0.02)
    assert found.tokens_per_s == 1 / found.time_per_token_s


def test_the_kv_cache_is_read_with_every_token(sizes):
    plan, trace = plan_of(sizes, 2), one_after_the_other(8, 0)
    short = project(sizes, plan, trace, **RATES, context=100)
    assert short.time_per_token_s == pytest.approx(by_hand(sizes, 100), rel=0.02)


def test_the_host_limits_small_layers(sizes):
    found = project(sizes, plan_of(sizes, 2), one_after_the_other(8, 0), **{**RATES, "host_s": 0.01})
    assert found.time_per_token_s == pytest.approx(LAYERS * 0.01 + found.costs.token_s)


@pytest.mark.parametrize("slots, n_ram", [(3, 24), (5, 24), (6, 14), (8, 24)])
def test_hits_are_those_of_the_replay_without_times(sizes, slots, n_ram):
    """Also if some experts are resident (RAM for 14 of 24), or all of them."""
    trace, plan = sticky_trace(64, LAYERS, E, K, 0.3), plan_of(sizes, slots, n_ram)
    assert (plan.n_resident > 0) == (n_ram < 24 or slots == 8)
    found = project(sizes, plan, trace, **RATES)
    hit = replay(with_plan(trace, plan)).hit[trace.use_pass >= 32]
    assert found.hit_rate == pytest.approx(hit.mean(), abs=1e-12)
    assert found.hit_rate > 0.25
    if slots == 8:
        assert found.hit_rate == 1


def test_the_first_token_waits_for_every_needed_expert_once(sizes):
    """A prompt of more than 500 tokens needs all 24 experts; those that are resident need no copy."""
    trace = sticky_trace(64, LAYERS, E, K, 0.1)
    slow = {**RATES, "link_bytes_per_s": 1e7}
    copy_s = sizes.expert_bytes / 1e7
    found = project(sizes, plan_of(sizes, 3), trace, **slow)
    assert 24 * copy_s < found.first_token_s < 24.5 * copy_s
    plan = plan_of(sizes, 6, 14)
    found = project(sizes, plan, trace, **slow)
    assert (24 - plan.n_resident) * copy_s < found.first_token_s < (24.5 - plan.n_resident) * copy_s
    everything = project(sizes, plan_of(sizes, 8), trace, **slow)
    costs = everything.costs
    least = LAYERS * (costs.attention_s + 8 * costs.expert_s)
    arithmetic = LAYERS * PROMPT_TOKENS * (costs.prompt_attention_s + K * costs.prompt_expert_s)
    assert everything.first_token_s == pytest.approx(least + arithmetic + costs.token_s, rel=0.02)


def test_a_prompt_s_uses_are_its_experts(sizes):
    trace = sticky_trace(7, LAYERS, E, K, 0.1)
    prompt = as_prompt(trace)
    assert prompt.n_passes == 1 and prompt.n_tokens == 7
    used = {(int(layer), int(expert)) for layer, expert in zip(prompt.use_layer, prompt.use_expert)}
    assert len(used) == len(prompt.use_expert)
    assert used == {(layer, int(e)) for of in trace.experts for layer in range(LAYERS) for e in of[layer]}


def test_predictions_and_a_faster_link_help(sizes):
    trace = sticky_trace(64, LAYERS, E, K, 0.2, recall=recall_by_layer(LAYERS, 2), look_aheads=2)
    plan, times = plan_of(sizes, 4), []
    link = sizes.expert_bytes / estimate_costs(sizes, 1e9, 50e9, 0.0, 4096).attention_s
    equal = {**RATES, "link_bytes_per_s": link}  # a copy lasts as long as a layer's attention
    for changed in ({}, {"prefetch": 2}, {"prefetch": 2, "link_bytes_per_s": 2 * link}):
        times.append(project(sizes, plan, trace, **{**equal, **changed}).time_per_token_s)
    assert times[0] > 1.02 * times[1] > 1.02 * 1.02 * times[2]


def test_from_disk_copies_are_no_faster_than_the_disk(sizes):
    trace, plan = sticky_trace(32, LAYERS, E, K, 0.2), plan_of(sizes, 4, 0)
    assert plan.store == "disk"
    found = project(sizes, plan, trace, **RATES, disk_bytes_per_s=1e8)
    assert found.disk and found.costs.copy_s == sizes.expert_bytes / 1e8
    assert (
        project(sizes, plan, trace, **RATES, disk_bytes_per_s=1e12).costs.copy_s == sizes.expert_bytes / 1e9
    )
    in_ram = project(sizes, plan_of(sizes, 4), trace, **RATES, disk_bytes_per_s=1e8)
    assert in_ram.costs.copy_s == sizes.expert_bytes / 1e9


def test_layers_without_experts_take_time(sizes):
    more = replace(sizes, linear={(512, 128): 3})
    before, after = (estimate_costs(of, 1e9, 50e9, 0.0, 100) for of in (sizes, more))
    assert LAYERS * (after.attention_s - before.attention_s) == pytest.approx(3 * 512 * 128 * 2 / 25e9)


def test_impossible_numbers(sizes):
    plan, trace = plan_of(sizes, 4), one_after_the_other(8, 2)
    for name in ("link_bytes_per_s", "bandwidth_bytes_per_s"):
        with pytest.raises(OptionError, match="impossible"):
            project(sizes, plan, trace, **{**RATES, name: 0})
    with pytest.raises(OptionError, match="another model\n  expected: 3 layers x 8 experts, 2 per token"):
        project(sizes, plan, sticky_trace(8, 4, E, K, 0.1), **RATES)
    with pytest.raises(OptionError, match="no tokens that were generated one by one"):
        project(sizes, plan, as_prompt(trace), **RATES)
