"""Every picture shows what its array says, and the array says what a naive count says."""

from collections import Counter

import numpy as np
import pytest

from mixtral_offload import load_tokenizer
from mixtral_offload.analysis.plots.cache import (
    plot_hit_heatmap,
    plot_hit_rates,
    plot_reuse,
    plot_speculation,
)
from mixtral_offload.analysis.plots.routing import (
    CELLS,
    PREDICTED_CELL,
    STALL_CELL,
    cells,
    entropy,
    plot_activations,
    plot_cells,
    plot_transitions,
    plot_usage,
)
from mixtral_offload.analysis.plots.timeline import plot_recorded_pass
from mixtral_offload.analysis.recall import collect_states, first_layer_recall, measure_recall
from mixtral_offload.analysis.replay import cache_contents, replay
from mixtral_offload.apps.cli import main
from mixtral_offload.apps.trace_report import pictures, read_prompts, trace_prompts
from mixtral_offload.core.trace import HIT, MISS, PREFETCHED, RoutingTrace
from mixtral_offload.errors import OptionError
from mixtral_offload.weights.source import DEMO

PROMPTS = [
    ("stories", "Tell me a story about a fox."),
    ("sums", "What is 12 + 30?"),
    ("sums", "What is 7 times 8?"),
]


@pytest.fixture(scope="module")
def run():
    from mixtral_offload import from_pretrained

    model = from_pretrained(cache_size=3, prefetch=2, throttle="60MB")
    return model, *trace_prompts(model, load_tokenizer(DEMO), PROMPTS, 32)


def test_sets_of_prompts_are_kept_apart(run):
    _, trace, texts, sets = run
    assert set(sets) == {"stories", "sums"}
    assert sum(map(len, sets.values())) == trace.n_tokens
    stories = "".join(trace.pieces[i] for i in sets["stories"])
    assert "fox" in stories and "12" not in stories
    assert [len(text) - 1 for text in texts[:1]] == [len(sets["stories"])]  # the last token is never an input


def test_activations_are_the_router_s_weights_and_the_run_s_cache(run):
    _, trace, _, _ = run
    _, shown = plot_activations(trace, layers=[1, 4], tokens=slice(5, 25))
    assert shown.shape == (2, 8, 20)
    token, layer = 9, 4
    assert {e: w for e, w in enumerate(shown[1, :, token - 5]) if w} == pytest.approx(
        dict(zip(trace.experts[token, layer].tolist(), trace.weights[token, layer].tolist()))
    )
    held = cache_contents(trace)
    hits = trace.use_outcome == HIT
    found = held[trace.use_pass, trace.use_layer, trace.use_expert]
    assert (found == hits).all()
    assert held.sum(-1).max() == 3


def test_cells_show_the_worst_of_a_token_s_uses(run):
    _, trace, _, _ = run
    figure, shown = plot_cells(trace, slice(0, 50))
    wasted = cells(trace)[1]
    outcomes = trace.outcomes()
    for token, layer in np.ndindex(50, 6):
        of = set(outcomes[token, layer].tolist())
        assert shown[layer, token] == (
            STALL_CELL if MISS in of else PREDICTED_CELL if PREFETCHED in of else 0
        )
    assert wasted.sum() == len(trace.wasted_pass)
    of_run = [name for name in CELLS if name != "computed by the CPU"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*of_run, "wasted prediction"]


def test_shares_and_entropies(run):
    _, trace, _, sets = run
    _, shares = plot_usage({name: trace.usage(tokens) for name, tokens in sets.items()})
    counted = Counter(trace.experts[sets["sums"], 2].ravel().tolist())
    assert shares[2, 1] == pytest.approx([counted[e] / sum(counted.values()) for e in range(8)])
    assert entropy(np.full(8, 1 / 8)) == pytest.approx(3) and entropy(np.eye(8)[0]) == 0


def test_transitions_count_pairs(run):
    _, trace, _, _ = run
    _, chance = plot_transitions(trace)
    pairs, ones = Counter(), Counter()
    for token in range(trace.n_tokens):
        for a in trace.experts[token, 3]:
            ones[a] += 1
            pairs.update((a, b) for b in trace.experts[token, 4])
    for (a, b), n in pairs.items():
        assert chance[3, a, b] == pytest.approx(n / ones[a])
    assert chance[3].sum(1).max() == pytest.approx(2)


def test_hit_rates_are_those_of_the_replays(run):
    _, trace, _, _ = run
    _, rates = plot_hit_rates(trace, ["lru", "belady"])
    assert rates.shape == (2, 7, 6)
    assert rates[0, 1].tolist() == replay(trace, 3, "lru").hit_rates().tolist()
    _, heatmap = plot_hit_heatmap(trace, bins=4)
    uses, hits = np.zeros((6, 4)), np.zeros((6, 4))
    for number, layer, outcome in zip(trace.use_pass, trace.use_layer, trace.use_outcome):
        uses[layer, number * 4 // trace.n_passes] += 1
        hits[layer, number * 4 // trace.n_passes] += outcome == HIT
    assert heatmap == pytest.approx(hits / uses)


def test_reuse_distances_explain_lru(run):
    """Token by token, an LRU cache of n slots has exactly the uses at a distance below n."""
    _, trace, _, _ = run
    single = RoutingTrace.from_routing(trace.experts, trace.weights, 8)
    _, shares = plot_reuse(single)
    for slots in (2, 5):
        below = shares[:, :slots].sum(1)
        rates = replay(single, slots, "lru").hit_rates()
        assert (below <= rates + 1e-9).all() and (shares[:, : slots - 1].sum(1) <= below).all()
        assert rates == pytest.approx(below, abs=0.08)  # two experts of one token are used at once


def test_precision_and_recall(run):
    model, trace, _, _ = run
    _, shown = plot_speculation(trace)
    stats = model.offload.stats
    right = (trace.use_outcome == PREFETCHED).sum()
    assert right == stats.prefetched
    weights = np.bincount(trace.use_layer[trace.use_outcome != HIT], minlength=6)
    assert (shown[1] * weights).sum() == pytest.approx(right)
    assert (shown >= 0).all() and (shown <= 1).all()


def test_the_timeline_adds_up(run):
    _, trace, _, _ = run
    number = 20
    _, bars = plot_recorded_pass(trace, number)
    total = 1e3 * (trace.spans[number, -1, 1] - trace.spans[number - 1, -1, 1])
    compute = sum(length for row, _, length in bars if row in (0, 1, 2))
    assert 0.8 * total < compute <= total * 1.001  # the rest is Python between the parts
    assert (bars[:, 1] >= -1e-6).all() and (bars[:, 1] + bars[:, 2] <= total + 1e-6).all()
    with pytest.raises(OptionError, match="two passes"):
        plot_recorded_pass(RoutingTrace.from_routing(trace.experts[:1], trace.weights[:1], 8))


def test_recall_by_its_definition(run):
    model, _, texts, _ = run
    layers = model.offload.layers
    states = collect_states(model, layers, texts)
    recall = measure_recall(layers, states, (1, 2, 10), "after")
    assert recall.look_aheads == (1, 2, 5)  # as far as six layers allow
    assert recall.recall.shape == (3, 6, 9)
    assert np.isnan(recall.recall[2, :5]).all() and (recall.average()[:, -1] == 1).all()
    target, found, wanted = 3, 0, 0
    for hidden, chosen in zip(states.after[target - 1], states.chosen[target]):
        predicted = layers[target].router(hidden).topk(2).indices.tolist()
        found += len({*predicted} & {*chosen.tolist()})
        wanted += len(chosen)
    assert recall.recall[0, target, 2] == pytest.approx(found / wanted)
    assert recall.average()[0, 2] > 0.6 > recall.chance()[2]
    assert first_layer_recall(layers, states)["router on the token's embedding"][2] > 0.5


def test_the_trace_command_writes_every_picture(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{name}\t{text}\n" for name, text in PROMPTS))
    options = ["--cache-size", "2", "--prefetch", "2", "--max-tokens", "12"]
    assert main(["trace", str(prompts), str(tmp_path / "out"), *options]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    names = ["activations", "cells", "usage", "transitions", "hit_rates", "hit_rates_shared", "hit_heatmap"]
    names += ["reuse", "speculation", "timeline", "recall"]
    files = {f"{name}.{kind}" for name in names for kind in ("png", "npy")}
    assert written == {"trace.safetensors", "trace.csv"} | files
    assert all((tmp_path / "out" / name).stat().st_size > 200 for name in written)
    trace = RoutingTrace.load(tmp_path / "out" / "trace.safetensors")
    assert len((tmp_path / "out" / "trace.csv").read_text().splitlines()) > trace.n_tokens * 12
    assert "pictures" not in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "none.txt"), str(tmp_path / "out")]) == 1
    assert "none.txt" in capsys.readouterr().err
    with pytest.raises(OptionError, match="no prompts"):
        prompts.write_text("\n")
        read_prompts(prompts)


def test_every_picture_has_a_title_and_labels(run):
    model, trace, texts, sets = run
    for name, figure, _ in pictures(model, trace, texts, sets):
        assert figure.get_suptitle(), name
        assert any(axes.get_xlabel() for axes in figure.axes), name
