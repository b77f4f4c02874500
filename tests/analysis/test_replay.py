"""A replay counts the hits and misses of the live cache, for every policy, pool and size."""

from itertools import product

import numpy as np
import pytest
import torch

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.analysis.recorder import record
from mixtral_offload.analysis.replay import best_allocation, hit_rate_curves, replay
from mixtral_offload.core.trace import HIT, MISS, PREFETCHED, RoutingTrace
from mixtral_offload.errors import OptionError
from mixtral_offload.weights.source import DEMO

PROMPTS = ["Tell me a story about a fox.", "What is 12 + 30?", "What is the capital of Peru?"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


def run(tokenizer, n_tokens=24, **options) -> RoutingTrace:
    model = from_pretrained(**options)
    with record(model, tokenizer) as recording:
        for prompt in PROMPTS:
            message = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            with torch.inference_mode():
                model.generate(**ids, max_new_tokens=n_tokens, do_sample=False)
    return recording.trace


@pytest.fixture(scope="module")
def trace(tokenizer):
    return run(tokenizer, cache_size=3)


def which_hit(trace, hit):
    columns = trace.use_pass, trace.use_layer, trace.use_expert
    return set(zip(*(column[hit].tolist() for column in columns)))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_size": 2},
        {"cache_size": 5, "policy": "lfu"},
        {"cache_size": 3, "policy": "lrfu", "shared_slots": True},
        {"cache_size": 2, "shared_slots": True, "store": "disk"},
        {"cache_size": [2, 3, 4, 2, 5, 8]},
        {"cache_size": 4, "prefetch": 2, "look_ahead": 2},
    ],
)
def test_a_replay_counts_what_the_run_counted(tokenizer, trace, options):
    live = run(tokenizer, **options)
    for replayed in (
        replay(live),
        replay(trace, options["cache_size"], options.get("policy"), options.get("shared_slots")),
    ):
        assert replayed.hits == live.counters["hits"] > 0
        assert replayed.misses == live.counters["misses"] > 0
        assert which_hit(replayed.trace, replayed.hit) == which_hit(live, live.use_outcome == HIT)
        if not options.get("prefetch") and replayed.trace is live:
            assert replayed.bytes_moved == live.counters["bytes_moved"] == live.use_bytes.sum()


def test_prefetch_changes_only_when_bytes_move(tokenizer):
    live = run(tokenizer, cache_size=2, prefetch=2)
    counters = live.counters
    assert counters["prefetched"] == (live.use_outcome == PREFETCHED).sum() > 0
    assert counters["misses"] - counters["prefetched"] == (live.use_outcome == MISS).sum()
    # up to two are for the token after the last
    assert 0 <= counters["predictions"] - counters["prefetched"] - len(live.wasted_pass) <= 2
    assert live.use_bytes.sum() == counters["misses"] * live.expert_bytes
    assert (
        live.wasted_bytes.sum() >= counters["wasted_bytes"]
    )  # the last dropped prediction may still be moving


def test_no_policy_beats_belady(trace):
    for shared in (False, True):
        curves = hit_rate_curves(trace, shared=shared)
        if not shared:
            assert all((curve <= curves["belady"] + 1e-9).all() for curve in curves.values())
        average = {name: curve.mean(1) for name, curve in curves.items()}
        assert (average["lru"] <= average["belady"] + 0.01).all()
        assert (np.diff(average["belady"]) >= 0).all() and curves["lru"].shape == (7, 6)
        assert average["lru"][-1] > 0.9  # only first uses miss


def test_the_best_allocation_is_the_best_of_all(trace):
    total = 15
    found = best_allocation(trace, total)
    assert sum(found) == total
    every = [sizes for sizes in product(range(2, 5), repeat=6) if sum(sizes) == total]
    hits = hit_rate_curves(trace, ["lru"], range(2, 9))["lru"] * np.bincount(trace.use_layer)
    gained = {sizes: sum(hits[size - 2, layer] for layer, size in enumerate(sizes)) for sizes in every}
    assert replay(trace, found).hits >= round(max(gained.values()))
    assert replay(trace, found).hits >= replay(trace, [2, 3, 2, 3, 2, 3]).hits
    with pytest.raises(OptionError, match="12 to 48"):
        best_allocation(trace, 5)


def test_impossible_replays_are_refused(trace):
    with pytest.raises(OptionError, match="2 to 8"):
        replay(trace, 1)
    with pytest.raises(OptionError, match="belady"):
        replay(trace, 3, "fifo")


def test_a_trace_survives_its_file_and_makes_a_table(trace, tokenizer, tmp_path):
    trace.save(tmp_path / "trace.safetensors")
    again = RoutingTrace.load(tmp_path / "trace.safetensors")
    for name in ("settings", "counters", "pieces"):
        assert getattr(again, name) == getattr(trace, name)
    assert (again.experts == trace.experts).all()
    rows = again.rows()
    assert {len(column) for column in rows.values()} == {trace.n_tokens * 6 * 2}
    assert set(rows["outcome"]) == {"hit", "miss"}
    assert "".join(trace.pieces).startswith("<s><|user|>Tell me a story about a fox.")
    assert np.allclose(trace.weights.sum(-1), 1, atol=1e-3)
    with pytest.raises(OptionError, match="not a routing trace"):
        RoutingTrace.load(next(DEMO.glob("*.safetensors")))


def test_the_trace_is_what_the_model_routed(trace, tokenizer):
    """The same tokens through the model with every expert resident give the same experts."""
    model = from_pretrained(cache_size=8)
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    start = 0
    for end in (*np.flatnonzero(trace.tokens[1:] == tokenizer.bos_token_id) + 1, trace.n_tokens):
        chosen.clear()
        with torch.inference_mode():
            model(torch.tensor([trace.tokens[start:end].tolist()]))
        routed = torch.stack(chosen, 1).sort(-1).values.numpy()
        assert (routed == np.sort(trace.experts[start:end], -1)).mean() > 0.99  # but for ties
        start = end


def test_a_pass_that_was_interrupted_is_left_out(tokenizer):
    model = from_pretrained(cache_size=2, prefetch=2)
    ids = torch.tensor([tokenizer("Hello there")["input_ids"]])
    router = model.model.layers[3].mlp.gate
    with record(model, tokenizer) as recording:
        model(ids)
        hook = router.register_forward_hook(lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        hook.remove()
        model(ids[:, :2])
    trace = recording.trace
    assert trace.n_passes == 2 and trace.n_tokens == ids.shape[1] + 2
    assert set(trace.use_pass.tolist()) == {0, 1} and trace.outcomes().shape == (trace.n_tokens, 6, 2)


def test_the_bytes_of_a_trace_are_those_of_its_counters(offloaded, tokenizer):
    """Also where predictions were dropped just before the recording ended, and were still being copied."""
    model = offloaded(cache_size=2, prefetch=4, look_ahead=3, throttle="200MB")
    ids = tokenizer("Tell me a story about a fox.", return_tensors="pt")["input_ids"]
    with record(model, tokenizer) as recording:
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        model.offload.cache.clear()  # drops what is predicted
    trace = recording.trace
    wasted = trace.counters["wasted_bytes"]
    assert wasted > 0 and trace.counters["bytes_moved"] == trace.use_bytes.sum() + wasted
