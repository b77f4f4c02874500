"""Table 2 of 2312.17238: what each variant moves and keeps; none changes an answer, and all is restored."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixtral_offload import load_tokenizer, record
from mixtral_offload.core.placement import Sizes, make_plan
from mixtral_offload.errors import OffloadError, OptionError
from mixtral_offload.experiments import baselines as variants
from mixtral_offload.experiments.ablation import PAPER_TABLE_2, RESIDENT, Ablation, ablate, generate
from mixtral_offload.experiments.plots import plot_ablation
from mixtral_offload.runtime import build as building
from mixtral_offload.runtime import cache
from mixtral_offload.weights.source import DEMO

PROMPTS = ["Tell me a story about a fox.", "What is 12 + 30?"]
QUICK = {"cache_size": 2, "tokens": 6, "naive_tokens": 3, "repeats": 1, "ratio": 0.5}
PROMPT = {"input_ids": torch.arange(3, 23).unsqueeze(0)}
PASSES, NAIVE_PASSES = 2 * 6, 2 * 3  # prompts x tokens


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def model(offloaded):
    return offloaded(cache_size=2, store="ram")


@pytest.fixture
def partly_resident(offloaded, monkeypatch):
    """As planned for too little RAM: 12 of 48 experts are resident, all of layer 0 and half of layer 1."""

    def plan_for(checkpoint, options):
        sizes = Sizes(checkpoint.layers, checkpoint.n_experts, checkpoint.top_k, checkpoint.layout.n_bytes)
        return make_plan(sizes, 48 * sizes.expert_bytes, 36 * sizes.expert_bytes, cache_size=3)

    monkeypatch.setattr(building, "plan_for", plan_for)
    return offloaded(cache_size=3, store="ram")


def answer(model) -> list[int]:
    return generate(model, [PROMPT], 8)[1][0].tolist()


def test_each_variant_moves_what_its_name_says(offloaded, tokenizer, model):
    resident = offloaded(cache_size=8)
    found = ablate(model, tokenizer, PROMPTS, resident=resident, **QUICK)
    expert, counters = model.offload.layout.n_bytes, found.counters
    assert [*found.tokens_per_s] == [RESIDENT, *PAPER_TABLE_2] and [*counters] == [*PAPER_TABLE_2]
    assert counters["naive"]["bytes_moved"] == NAIVE_PASSES * 6 * 8 * expert
    forgetful = counters["without cache and prefetch"]
    assert forgetful["hits"] == 0 and forgetful["bytes_moved"] == forgetful["misses"] * expert
    full, plain = counters["full"], counters["without prefetch"]
    assert (full["hits"], full["misses"]) == (plain["hits"], plain["misses"])
    assert full["hits"] + full["misses"] == forgetful["misses"] >= PASSES * 6 * 2
    assert full["predictions"] > 0 == plain["predictions"] and full["prefetched"] > 0
    assert full["bytes_moved"] == full["misses"] * expert + full["wasted_bytes"]
    assert plain["bytes_moved"] == plain["misses"] * expert
    assert all(len(found.seconds_per_token[name]) == 2 for name in found.tokens_per_s)


def test_the_result_as_a_table_as_json_and_as_a_picture(tokenizer, model):
    found = ablate(model, tokenizer, PROMPTS[0], **QUICK)
    assert Ablation(**json.loads(found.to_json())) == found
    lines = str(found).splitlines()
    assert [line[:28].strip() for line in lines[1:5]] == [*PAPER_TABLE_2] and "3.16" in lines[1]
    figure, shown = plot_ablation(found)
    assert shown[:, 0].tolist() == [*found.tokens_per_s.values()]
    assert shown[-1].tolist() == [found.tokens_per_s["naive"], 1, 1]
    widths = sorted(bar.get_width() for bar in figure.axes[0].patches)
    assert widths == pytest.approx(sorted([*shown[:, 0], *shown[:, 2] * shown[-1, 0]]))
    everything = Ablation(**{**vars(found), "tokens_per_s": {RESIDENT: 1e6, **found.tokens_per_s}})
    figure, shown = plot_ablation(everything)
    assert np.isnan(shown[0, 2]) and "cut off" in figure.axes[0].texts[0].get_text()


@pytest.mark.parametrize("after", [None, 20, 380, 600])
def test_the_model_is_as_it_was(offloaded, tokenizer, monkeypatch, after):
    """An error after this many experts: while measuring, with predictions under way, in the naive variant."""
    model = offloaded(cache_size=3, store="disk", prefetch=2, look_ahead=2)
    offload, expected = model.offload, answer(model)
    own = offload.cache, offload.prefetcher, offload.cache.engine
    hooks = [len(module._forward_hooks) for module in model.modules()]
    if after is None:
        ablate(model, tokenizer, PROMPTS, **QUICK)
    else:
        left, own_way = iter(range(after, -1, -1)), offload.computation
        one_by_one = replace(
            own_way, run=lambda *rest: (1 // next(left), own_way.run(*rest))[1], experts=None
        )
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(offload, "computation", one_by_one)
            ablate(model, tokenizer, PROMPTS, **QUICK)
    assert (offload.cache, offload.prefetcher, offload.cache.engine) == own
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    offload.stats.reset()
    assert answer(model) == expected
    assert offload.stats.predictions > 0 and offload.stats.prefetched > 0


@pytest.mark.parametrize("with_resident", [False, True])
@pytest.mark.parametrize("kind", ["Forgetful", "Naive"])
def test_a_changed_answer_is_an_error(offloaded, tokenizer, model, monkeypatch, kind, with_resident):
    right = getattr(variants, kind).fetch

    def wrong(cache, layer, experts, *others):
        found = dict(right(cache, layer, experts, *others))
        yield from zip(found, [*found.values()][::-1])

    monkeypatch.setattr(getattr(variants, kind), "fetch", wrong)
    resident = offloaded(cache_size=8) if with_resident else None
    with pytest.raises(OffloadError, match="an answer depends on the variant"):
        ablate(model, tokenizer, PROMPTS, resident=resident, **QUICK)


def test_variants_take_no_memory_that_the_model_has(offloaded, monkeypatch):
    enough, few = offloaded(cache_size=4, store="ram", prefetch=2), offloaded(cache_size=2, store="ram")
    taken = []
    monkeypatch.setattr(
        cache, "_allocate", lambda n, *rest: taken.append(n) or torch.empty(n, rest[0]).byte()
    )
    for size in (2, 3, 4):
        caches = variants.make_variants(enough, size, n_staging=3)
        assert len(caches["naive"].memory) == 8 and len(caches["without cache and prefetch"].memory) == 2
        assert len(caches["full"].memory) == 6 * size + 3
    variants.make_variants(few, 3, n_staging=3)
    assert [n for n in taken if n] == [6 * 3 + 3 - 6 * 2]


def test_residents_stay_in_every_variant(tokenizer, partly_resident):
    model = partly_resident
    assert [len(of) for of in model.offload.plan.resident.values()] == [8, 4, 0, 0, 0, 0]
    full = variants.make_variants(model, 3, n_staging=3)["full"]
    assert {layer: full.n_slots(layer) for layer in model.offload.plan.slots} == model.offload.plan.slots
    expected = answer(model)
    found = ablate(model, tokenizer, PROMPTS, **QUICK)
    assert found.counters["naive"]["bytes_moved"] == NAIVE_PASSES * 36 * model.offload.layout.n_bytes
    assert found.counters["without cache and prefetch"]["hits"] >= PASSES * 2  # layer 0's at least
    assert answer(model) == expected


def test_the_link_is_throttled_until_the_block_ends(model):
    own = model.offload.cache.engine
    copy_s = variants.copy_seconds(model)
    with variants.throttled(model, 20):
        assert model.offload.cache.engine is not own
        assert variants.copy_seconds(model) > 5 * copy_s
    assert model.offload.cache.engine is own and answer(model)


def test_what_cannot_be_measured_is_refused(offloaded, tokenizer, model):
    for change, message in (
        ({"cache_size": 1}, "impossible cache_size"),
        ({"cache_size": 9}, "impossible cache_size"),
        ({"prefetch": 0}, "impossible prefetch"),
        ({"tokens": 1}, "impossible tokens"),
        ({"naive_tokens": 7}, "impossible naive_tokens"),
        ({"repeats": 0}, "impossible repeats"),
        ({"ratio": 0}, "impossible ratio"),
        ({"ratio": "fast"}, "impossible ratio"),
        ({"prompts": []}, "no prompts"),
        ({"resident": model}, "the same model with every expert"),
    ):
        with pytest.raises(OptionError, match=message):
            ablate(model, tokenizer, **{"prompts": PROMPTS, **QUICK, **change})
    everything = offloaded(DEMO, cache_size=8)
    with pytest.raises(OptionError, match="nothing to ablate"):
        ablate(everything, tokenizer, PROMPTS, **QUICK)
    with record(model), pytest.raises(OptionError, match="being recorded"):
        ablate(model, tokenizer, PROMPTS, **QUICK)


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_on_a_gpu_over_its_own_link_and_over_a_throttled_one(offloaded, tokenizer, ratio):
    model, resident = (offloaded(device="cuda", cache_size=n, store="ram") for n in (2, 8))
    own = model.offload.cache.engine
    found = ablate(model, tokenizer, PROMPTS, resident=resident, **{**QUICK, "ratio": ratio})
    assert found.counters["naive"]["bytes_moved"] == NAIVE_PASSES * 6 * 8 * model.offload.layout.n_bytes
    assert found.counters["full"]["hits"] == found.counters["without prefetch"]["hits"] > 0
    assert model.offload.cache.engine is own
