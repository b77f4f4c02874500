"""Timed replay: schedules computed by hand, and the shipped model's own trace."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.analysis.recorder import record
from mixtral_offload.analysis.replay import replay
from mixtral_offload.analysis.timed_replay import ATTENTION, EXPERT, OUTSIDE, timed_replay
from mixtral_offload.core.copy_order import NEEDED, RIGHT, WRONG
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.trace import PREFETCHED, RoutingTrace
from mixtral_offload.errors import OptionError
from mixtral_offload.weights.source import DEMO

COSTS = DeviceCosts(copy_s=16, attention_s=8, expert_s=2, token_s=1)  # a chunk takes 1


def routed(experts, predictions=None, n_experts=4) -> RoutingTrace:
    """experts `[N, L, k]`, predictions `[N, L, D, n]`; an expert has 160 bytes, so that a chunk has 10."""
    experts = np.array(experts)
    return RoutingTrace.from_routing(experts, np.ones(experts.shape), n_experts, 160, predictions)


def merged(trace, passes) -> RoutingTrace:
    """The same tokens in fewer passes, with the predictions of each pass's last token."""
    passes = np.array(passes, np.int32)
    uses = np.stack([passes[trace.use_pass], trace.use_layer, trace.use_expert], 1)
    use_pass, use_layer, use_expert = np.unique(uses, axis=0).astype(np.int32).T
    last = np.append(np.flatnonzero(np.diff(passes)), len(passes) - 1)
    kept = np.isin(trace.predicted_pass, last)
    columns = {name: getattr(trace, name)[kept] for name in vars(trace) if name.startswith("predicted_")}
    columns["predicted_pass"] = passes[columns["predicted_pass"]]
    spans = np.zeros((len(last), trace.n_layers, 2))
    columns |= {"use_pass": use_pass, "use_layer": use_layer, "use_expert": use_expert}
    return replace(trace, passes=passes, spans=spans, **columns)


def copies(timed) -> list[tuple]:
    """(layer, expert, kind, begin, end) of each stretch on the link."""
    events = timed.events
    rows = zip(events.copy_layer, events.copy_expert, events.copy_kind, *events.copy_span_s.T)
    return [tuple(map(float, row)) for row in rows]


# --- by hand ---


def test_without_predictions_each_miss_stalls_from_its_routing_on():
    timed = timed_replay(routed([[[0], [1]], [[0], [1]]]), COSTS, cache_size=1, keep_events=True)
    # embedding to 1, attention to 9, copy to 25, expert to 27; attention to 35, copy to 51, expert to 53
    assert copies(timed) == [(0, 0, NEEDED, 9, 25), (1, 1, NEEDED, 35, 51)]
    assert timed.pass_s.tolist() == [53, 1 + 2 * (8 + 2)] and timed.stall_s.tolist() == [[16, 16], [0, 0]]
    assert (timed.stats.hits, timed.stats.misses, timed.stats.prefetched) == (2, 2, 0)
    assert (timed.stats.bytes_moved, timed.stats.wasted_bytes, timed.link_busy_s) == (320, 0, 32)
    assert timed.time_per_token == 37 and timed.floor_s == 21 and timed.link_use == 32 / 74
    spans = timed.events.part_span_s[timed.events.part_kind == EXPERT]
    assert spans.tolist() == [[25, 27], [51, 53], [62, 64], [72, 74]]


def test_a_right_prediction_is_half_way_when_it_is_needed():
    timed = timed_replay(
        routed([[[0], [1]]], [[[[0]], [[1]]]]), COSTS, cache_size=1, prefetch=1, keep_events=True
    )
    assert copies(timed) == [(0, 0, RIGHT, 1, 17), (1, 1, RIGHT, 19, 35)]
    assert timed.pass_s.tolist() == [37] and timed.stall_s.tolist() == [[8, 8]]
    assert (timed.stats.prefetched, timed.stats.predictions, timed.stats.wasted_bytes) == (2, 2, 0)


def test_a_wrong_prediction_delays_by_no_more_than_the_chunk_under_way():
    costs, trace = replace(COSTS, attention_s=8.5), routed([[[0], [1]]], [[[[3]], [[2]]]])
    timed = timed_replay(trace, costs, cache_size=1, prefetch=1, keep_events=True)
    assert copies(timed) == [
        (0, 3, WRONG, 1, 10),
        (0, 0, NEEDED, 10, 26),
        (1, 2, WRONG, 28, 37),
        (1, 1, NEEDED, 37, 53),
    ]
    assert timed.pass_s.tolist() == [55] == timed_replay(trace, costs, cache_size=1).pass_s + 2 * 0.5
    stats = timed.stats
    assert (stats.wasted_bytes, stats.bytes_moved, stats.prefetched) == (180, 500, 0)
    # cancelled at a chunk's very end, the next one does not begin
    assert timed_replay(trace, COSTS, cache_size=1, prefetch=1).pass_s.tolist() == [53]
    # waits for all of it: to 17, 33, 35, 51 ...
    whole = timed_replay(trace, replace(costs, chunks=1), cache_size=1, prefetch=1)
    assert whole.pass_s.tolist() == [69] and whole.stats.wasted_bytes == 320


def test_a_promoted_prediction_goes_before_later_copies():
    trace = routed([[[0, 1]]], [[[[2, 1]]]])
    timed = timed_replay(trace, replace(COSTS, attention_s=8.5), cache_size=2, prefetch=2, keep_events=True)
    assert copies(timed) == [(0, 2, WRONG, 1, 10), (0, 1, RIGHT, 10, 26), (0, 0, NEEDED, 26, 42)]
    assert timed.events.part_expert.tolist() == [-1, -1, 1, 0] and timed.pass_s.tolist() == [44]


def test_a_newer_prediction_replaces_an_earlier_one_that_has_not_begun():
    # from the embeddings, 3 for layer 2; after layer 0, 2
    trace = routed([[[0], [1], [2]]], [[[[0]] * 3, [[1], [1], [0]], [[2], [2], [3]]]])
    timed = timed_replay(trace, COSTS, cache_size=1, prefetch=1, look_ahead=3, keep_events=True)
    assert copies(timed) == [(0, 0, RIGHT, 1, 17), (1, 1, RIGHT, 17, 33), (2, 2, RIGHT, 33, 49)]
    assert timed.pass_s.tolist() == [51] and timed.stats.predictions == 4 and timed.stats.wasted_bytes == 0


def test_hits_run_during_copies_and_the_host_and_a_long_prompt_take_time():
    trace = routed([[[0, 1]], [[0, 2]]])
    assert timed_replay(trace, COSTS, cache_size=2).stall_s.tolist() == [[16 + 14], [14]]
    late = timed_replay(trace, replace(COSTS, latency_s=3), cache_size=2)
    assert late.stall_s.tolist() == [[33], [17]]
    slow = timed_replay(trace, replace(COSTS, host_s=20), cache_size=2, keep_events=True)  # 16 + 2 + 2
    assert slow.pass_compute_s.tolist() == [21, 21] and slow.stall_s.tolist() == [[30], [14]]
    assert slow.events.part_kind.tolist() == [OUTSIDE, ATTENTION, EXPERT, EXPERT] * 2
    prompt = merged(routed([[[0, 1]], [[0, 2]]]), [0, 0])  # 0 runs for two tokens, 1 and 2 for one
    costs = replace(COSTS, prompt_attention_s=0.5, prompt_expert_s=0.25)
    assert timed_replay(prompt, costs, cache_size=4).pass_compute_s.tolist() == [1 + 8.5 + 2.25 + 2 + 2]
    assert np.isnan(timed_replay(prompt, costs, cache_size=4).time_per_token)


def test_perfect_predictions_cross_the_end_of_a_token():
    timed = timed_replay(
        routed([[[0]], [[1]]]), COSTS, cache_size=1, prefetch=1, perfect=True, keep_events=True
    )
    # 0: 1 to 17, expert to 19; 1: from there to 35, while the next token's head, embedding and attention run
    # to 28
    assert copies(timed) == [(0, 0, RIGHT, 1, 17), (0, 1, RIGHT, 19, 35)]
    assert timed.pass_s.tolist() == [19, 18]


@pytest.mark.parametrize(
    "name, value",
    [
        ("copy_s", 0),
        ("attention_s", -1),
        ("expert_s", float("nan")),
        ("chunks", 1.5),
        ("host_s", "1"),
        ("token_s", float("inf")),
        ("latency_s", -1),
    ],
)
def test_impossible_costs_are_refused(name, value):
    with pytest.raises(OptionError, match=f"impossible {name}"):
        replace(COSTS, **{name: value})


def test_impossible_settings_are_refused():
    trace = routed([[[0], [1]]], [[[[0]], [[1]]]])
    for options, message in (
        ({"prefetch": 2}, "fewer predictions than this prefetch"),
        ({"prefetch": -1}, "impossible"),
        ({"prefetch": 1, "look_ahead": 2}, "fewer predictions than this look_ahead"),
        ({"perfect": True}, "impossible prefetch"),
        ({"cache_size": 0}, "impossible cache_size"),
        ({"prefetch": 1, "perfect": True, "look_ahead": 3}, "at most 2 layers"),
    ):
        with pytest.raises(OptionError, match=message):
            timed_replay(trace, COSTS, **options)
    with pytest.raises(OptionError, match="without costs"):
        replay(trace, prefetch=1)
    for predictions in (np.zeros((1, 3, 1, 1), int), np.full((1, 2, 1, 1), 4)):
        with pytest.raises(OptionError, match="predictions"):
            routed([[[0], [1]]], predictions)
    gap = replace(
        trace, **{name: value[:1] for name, value in vars(trace).items() if name.startswith("use_")}
    )
    with pytest.raises(OptionError, match="used nothing in some layer"):
        timed_replay(gap, COSTS)


def test_predictions_from_before_the_embeddings_are_not_in_the_trace():
    trace = routed([[[0], [1]]], [[[[0], [2]], [[1], [3]]]])
    columns = [getattr(trace, f"predicted_{name}") for name in ("pass", "from", "layer", "expert", "rank")]
    assert np.stack(columns, 1).tolist() == [[0, -1, 0, 0, 0], [0, -1, 1, 3, 0], [0, 0, 1, 1, 0]]


# --- the shipped model ---


@pytest.fixture(scope="module")
def recorded():
    """(trace, calls of the cache's `prefetch` in order) of the shipped model at 2 experts per layer."""
    tokenizer, model = load_tokenizer(DEMO), from_pretrained(cache_size=2, prefetch=2, look_ahead=2)
    calls, own = [], model.offload.cache.prefetch
    model.offload.cache.prefetch = lambda *arguments: (calls.append(arguments), own(*arguments))
    with record(model, tokenizer) as recording, torch.inference_mode():
        for prompt in ("Tell me a story about a fox.", "What is the capital of Peru?"):
            message = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            model.generate(**ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)
    model.offload.cache.close()
    return recording.trace, calls


def test_a_trace_keeps_every_prediction(recorded, tmp_path):
    trace, calls = recorded
    made = [
        (layer, expert, rank, layer - distance)
        for layer, experts, distance in calls
        for rank, expert in enumerate(experts)
    ]
    columns = (trace.predicted_layer, trace.predicted_expert, trace.predicted_rank, trace.predicted_from)
    assert list(zip(*(column.tolist() for column in columns))) == made
    prompts = np.bincount(trace.passes) >= 8  # two experts from the embeddings, then all of each layer
    expected = np.where(prompts, 2 * 2 + 5 * 8, (6 + 5) * 2)
    assert prompts.any() and np.bincount(trace.predicted_pass).tolist() == expected.tolist()
    trace.save(tmp_path / "trace.safetensors")
    again = RoutingTrace.load(tmp_path / "trace.safetensors")
    columns = {name: value for name, value in vars(trace).items() if name.startswith("predicted_")}
    assert all((getattr(again, name) == value).all() for name, value in columns.items())


def test_it_counts_what_the_run_counted(recorded):
    trace, _ = recorded
    for options in ({}, {"prefetch": 2}, {"prefetch": 1, "look_ahead": 2}):
        timed = timed_replay(trace, DeviceCosts(5.5, 0.4, 0.3), **options)
        assert (timed.stats.hits, timed.stats.misses) == (trace.counters["hits"], trace.counters["misses"])
    # over a link without stalls, a miss is prefetched if any prediction named it: here and in the run
    fast = timed_replay(trace, DeviceCosts(1e-3, 1.0, 1.0), prefetch=2)
    # (of a prompt, within the staging rows)
    one, missed = trace.predicted_layer - trace.predicted_from == 1, ~replay(trace).hit
    columns = trace.predicted_pass, trace.predicted_layer, trace.predicted_expert
    predicted = set(zip(*(of[one].tolist() for of in columns)))
    needed = set(zip(*(of[missed].tolist() for of in (trace.use_pass, trace.use_layer, trace.use_expert))))
    of_prompts = {use for use in predicted & needed if (trace.passes == use[0]).sum() >= 8}
    most = len(predicted & needed)
    assert 0.5 * len(needed) < most - len(of_prompts) < fast.stats.prefetched < most
    both = timed_replay(trace, DeviceCosts(1e-3, 1.0, 1.0), prefetch=2, look_ahead=2)
    live = (trace.use_outcome == PREFETCHED).sum()
    assert abs(both.stats.prefetched - live) <= 0.05 * live


def test_predictions_bring_the_time_down_towards_the_floor(recorded):
    trace, _ = recorded
    for size in (2, 4, 6):
        costs = DeviceCosts(5.5, 0.4, 0.3)
        none, one, two = (
            replay(trace, size, costs=costs, prefetch=2 * (n > 0), look_ahead=max(n, 1)).timing
            for n in range(3)
        )
        assert 1 < two.over_floor < one.over_floor < none.over_floor < 2
        perfect = timed_replay(trace, costs, cache_size=size, prefetch=2, look_ahead=2, perfect=True)
        assert 1 <= perfect.over_floor < two.over_floor
    assert replay(trace, 2).timing is None


def test_predicting_takes_time():
    """After every layer but the last, and from the embeddings; only with predictions."""
    trace = routed([[[0], [1]]] * 3, [[[[0], [2]], [[1], [3]]]] * 3)
    free, dear = (DeviceCosts(8.0, 1.0, 2.0, predict_s=seconds) for seconds in (0.0, 0.5))
    assert timed_replay(trace, dear).pass_s.tolist() == timed_replay(trace, free).pass_s.tolist()
    slower, faster = (timed_replay(trace, costs, prefetch=1).pass_compute_s for costs in (dear, free))
    assert np.allclose(slower - faster, 2 * 0.5)  # two layers: from the embeddings, and after the first one
