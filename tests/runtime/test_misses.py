"""Misses that the CPU computes: the same answers, counted by replays, whatever goes wrong meanwhile."""

import pytest
import torch

from mixtral_offload import load_tokenizer, record
from mixtral_offload.analysis.plots.routing import CPU_CELL, STALL_CELL, plot_cells
from mixtral_offload.analysis.plots.timeline import ON_CPU_ROW, plot_recorded_pass
from mixtral_offload.analysis.replay import hit_rate_curves, replay
from mixtral_offload.analysis.timed_replay import timed_replay
from mixtral_offload.apps.expert_map import expert_grid, grid_html, watch
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.misses import MissCosts, MissRule
from mixtral_offload.core.trace import COMPUTED, MISS, RoutingTrace
from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.experiments.ablation import ablate
from mixtral_offload.experiments.baselines import make_variants, switched
from mixtral_offload.weights.native import find_native
from mixtral_offload.weights.source import DEMO
from tests.twin import relative_error

PROMPT = torch.tensor([[1, 300, 700, 900, 5, 6, 17, 18, 900]])
#: with them, "auto" splits the misses of a prompt, and of a token if there are two
EVEN = MissRule("auto", MissCosts(1.0, 1.5, 0.1))


def answer(model, ids=PROMPT, n=12):
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)


@pytest.fixture(scope="module")
def expected():
    from mixtral_offload import from_pretrained

    model = from_pretrained(DEMO, device="cpu", cache_size=8)
    with torch.inference_mode():
        return model(PROMPT).logits, answer(model)


@pytest.mark.both_products
@pytest.mark.parametrize("options", [{}, {"shared_slots": True, "policy": "lfu"}, {"cache_size": 3}])
@pytest.mark.parametrize("rule", [None, EVEN])
def test_on_one_processor_not_one_bit_differs(offloaded, expected, options, rule):
    """Here both are computed by the same code; beside a card, last bits differ."""
    model = offloaded(DEMO, **{"cache_size": 2, "store": "ram", "misses": "cpu", **options})
    if rule is not None:
        model.offload.cache.misses = rule
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(model(PROMPT).logits, expected[0])
    assert torch.equal(answer(model), expected[1])
    stats = model.offload.stats
    assert 0 < stats.computed < stats.misses


@pytest.mark.parametrize(
    "options", [{}, {"shared_slots": True, "policy": "lfu"}, {"cache_size": [2, 3, 4, 2, 5, 8]}]
)
@pytest.mark.parametrize("rule", [None, EVEN])
def test_a_replay_counts_what_the_run_counted(offloaded, tmp_path, options, rule):
    model = offloaded(DEMO, **{"cache_size": 2, "store": "ram", "misses": "cpu", **options})
    if rule is not None:
        model.offload.cache.misses = rule
    batch = torch.cat([PROMPT, PROMPT.flip(1)])
    with record(model) as recording:
        answer(model), answer(model, batch, 6)
    trace, stats = recording.trace, model.offload.stats
    trace.save(tmp_path / "trace.safetensors")
    for of in (trace, RoutingTrace.load(tmp_path / "trace.safetensors")):
        found = replay(of)
        assert (found.hits, found.misses) == (stats.hits, stats.misses)
        assert ((of.use_outcome == COMPUTED) == found.on_cpu).all()
        assert found.on_cpu.sum() == stats.computed > 0
        assert found.bytes_moved == stats.bytes_moved == of.use_bytes.sum()
    copied = replay(trace, misses=MissRule())
    assert copied.on_cpu.sum() == 0 and copied.hits > found.hits - stats.computed
    curve = hit_rate_curves(trace, ["lru"], [2])["lru"]
    assert curve.tolist() == [replay(trace, 2, "lru", False, misses=MissRule()).hit_rates().tolist()]


def test_with_predictions_only_a_timed_replay_knows(offloaded):
    model = offloaded(DEMO, cache_size=2, store="ram", misses="cpu", prefetch=2, throttle="2GB")
    with record(model) as recording:
        answer(model)
    with pytest.raises(OptionError, match="predictions arrived"):
        replay(recording.trace)
    costs = DeviceCosts(5.0, 1.0, 1.0, cpu_expert_s=3.0)
    timed = timed_replay(recording.trace, costs, prefetch=2)
    assert timed.stats.computed > 0 and timed.stats.prefetched > 0
    with pytest.raises(OptionError, match="computes no experts"):
        timed_replay(recording.trace, DeviceCosts(5.0, 1.0, 1.0), prefetch=2)
    assert timed_replay(recording.trace, DeviceCosts(5.0, 1.0, 1.0), misses="copy").stats.computed == 0


def test_what_cannot_be_is_refused(offloaded, monkeypatch):
    for options in ({"misses": "gpu"}, {"misses": None}):
        with pytest.raises(OptionError, match="unknown misses"):
            offloaded(DEMO, **options)
    with pytest.raises(OptionError, match="computes experts from RAM"):
        offloaded(DEMO, misses="cpu", store="disk")
    with pytest.raises(CapacityError, match="needs the experts in RAM"):
        offloaded(DEMO, cache_size=2, ram="6MB", misses="cpu", context_length=16)
    model = offloaded(DEMO, cache_size=8, misses="cpu")  # nothing is missing
    answer(model)
    assert model.offload.stats.computed == model.offload.stats.misses == 0


@pytest.mark.parametrize("options", [{"precision": "fast"}, {"precision": "exact"}], ids=str)
def test_the_same_products_compute_what_was_missing(offloaded, options):
    """On the CPU itself no bit depends on where an expert was computed."""
    if find_native()[0] is None and options["precision"] == "fast":
        pytest.skip("no kernels")
    ids = torch.tensor([[300, 700, 900, 12, 5, 77, 81]])
    whole = offloaded(DEMO, cache_size=8, **options)
    model = offloaded(DEMO, cache_size=2, store="ram", misses="cpu", **options)
    with torch.no_grad():
        for part in (ids, ids[:, :1], ids[:, 3:5]):
            assert torch.equal(model(part).logits, whole(part).logits)
    assert model.offload.stats.computed > 0


def test_experiments_copy_all_misses_with_the_model_s_policy(offloaded):
    model = offloaded(DEMO, cache_size=2, store="ram", misses="cpu")
    with pytest.raises(OptionError, match="all its misses must be copied"):
        ablate(model, load_tokenizer(), "Hello", cache_size=2)
    kept = {}
    for policy in ("lru", "lfu"):
        model = offloaded(DEMO, cache_size=2, store="ram", policy=policy)
        with switched(model, make_variants(model, 2, 0)["without prefetch"]):
            cache = model.offload.cache
            for expert in (0, 0, 1, 2):  # which of 0 (older) and 1 (used once) is evicted?
                with cache.lock:
                    assert [number for number, _ in cache.fetch(0, [expert])] == [expert]
            kept[policy] = sorted(cache.contents(0))
    assert kept == {"lru": [1, 2], "lfu": [0, 2]}


def test_costs_are_measured_where_the_model_runs(offloaded):
    slow = offloaded(DEMO, cache_size=2, store="ram", misses="auto", throttle="1MB")
    costs = slow.offload.cache.misses.costs
    assert costs.copy_s == pytest.approx(slow.offload.layout.n_bytes / 1e6, rel=0.5)
    assert 0 < costs.cpu_expert_s < costs.copy_s and costs.cpu_token_s >= 0
    answer(slow, n=3)
    assert slow.offload.stats.computed > 0  # so slow a link is worse than any processor
    assert slow.offload.settings()["misses"]["costs"]["copy_s"] == costs.copy_s


def test_a_trace_says_what_the_run_did(offloaded):
    model = offloaded(DEMO, cache_size=2, store="ram")
    model.offload.cache.misses = MissRule("cpu")  # but the model was built to copy
    with record(model) as recording:
        answer(model)
        with pytest.raises(OptionError, match="cannot change"):
            model.offload.cache.misses = MissRule()
    found, stats = replay(recording.trace), model.offload.stats
    assert (found.hits, found.misses, stats.computed) == (stats.hits, stats.misses, 0)


def test_a_replay_in_time_counts_the_same(offloaded):
    model = offloaded(DEMO, cache_size=2, store="ram", misses="cpu")
    with record(model) as recording:
        answer(model)
    costs = DeviceCosts(5.0, 1.0, 1.0, cpu_expert_s=3.0)
    for rule in (None, MissRule(), MissRule("cpu"), EVEN):
        found = replay(recording.trace, misses=rule, costs=costs)
        stats = found.timing.stats
        assert (found.hits, found.misses, found.on_cpu.sum()) == (stats.hits, stats.misses, stats.computed)


def test_an_error_on_the_cpu_leaves_a_sound_cache(offloaded, expected):
    model = offloaded(DEMO, cache_size=2, store="ram", misses="cpu")
    computation, calls = model.offload.computation, []

    def fail(x, views):
        calls.append(len(x))
        if len(calls) == 3:
            raise RuntimeError("once")
        return computation.on_cpu(x, views)

    from dataclasses import replace

    model.offload.computation = replace(computation, on_cpu=fail)
    model.offload.cache.misses = EVEN  # copies are under way meanwhile
    with pytest.raises(RuntimeError, match="once"), torch.inference_mode():
        model(PROMPT)
    assert torch.equal(answer(model), expected[1])


def test_gradients_flow_through_it(offloaded):
    def gradient(**options):
        model = offloaded(DEMO, cache_size=2, store="ram", **options)
        hidden = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
        model(inputs_embeds=hidden).logits[0, -1].max().backward()
        return hidden.grad, model.offload.stats

    (copied, _), (computed, stats) = gradient(), gradient(misses="cpu")
    assert relative_error(computed, copied) == 0
    assert stats.computed > 0


def test_it_is_seen(offloaded):
    model = offloaded(DEMO, cache_size=2, store="ram", misses="cpu")
    with watch(model) as watching, record(model, load_tokenizer(DEMO)) as recording:
        answer(model)
        grid = expert_grid(model, watching)
    assert any(COMPUTED in row for row in grid)
    assert "computed by the CPU" in grid_html(model)
    trace = recording.trace
    figure, shown = plot_cells(trace)
    assert (shown == CPU_CELL).any() and STALL_CELL == 3
    outcomes = trace.outcomes().swapaxes(0, 1)
    assert ((shown == CPU_CELL) == ((outcomes == COMPUTED).any(-1) & ~(outcomes == MISS).any(-1))).all()
    assert "computed by the CPU" in [text.get_text() for text in figure.legends[0].get_texts()]
    _, bars = plot_recorded_pass(trace, trace.n_passes - 1)
    n_computed = (trace.use_outcome[trace.use_pass == trace.n_passes - 1] == COMPUTED).sum()
    assert (bars[:, 0] == ON_CPU_ROW).sum() == n_computed > 0
    assert set(trace.rows()["outcome"]) <= {"hit", "miss", "computed by the CPU"}
    assert "computed by the CPU" not in grid_html(offloaded(DEMO, cache_size=2))
