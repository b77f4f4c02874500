"""Speculative loading: answers never depend on it, and a needed expert never waits for a whole wrong one."""

import time

import pytest
import torch

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.analysis.recorder import record
from mixtral_offload.errors import OptionError
from mixtral_offload.runtime.engines import ABANDONED, DONE, Copy, ThreadEngine, ThrottledEngine
from mixtral_offload.runtime.prefetch import FoldedRouters, Prefetcher, next_router
from mixtral_offload.weights.source import DEMO

PROMPTS = ["Tell me a story about a fox.", "What is 12 + 30?", "How do I sort a list in Python?"]


def always_wrong(hidden, layers):
    return -next_router(hidden, layers)


def random(hidden, layers):
    return torch.randn(len(layers), hidden.shape[0], layers[0].router.weight.shape[0])


class Stale:
    """Says at each call what it should have said at the call before."""

    def __init__(self):
        self.last = None

    def __call__(self, hidden, layers):
        right = next_router(hidden, layers)
        said, self.last = self.last, right
        return right if said is None or said.shape != right.shape else said


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(DEMO)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        for text in PROMPTS
    ]


@torch.inference_mode()
def answers(model, prompts):
    """Logits of each prompt and 16 greedy tokens with their scores."""
    found = []
    for prompt in prompts:
        out = model.generate(
            **prompt, max_new_tokens=16, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        found += [model(**prompt).logits, out.sequences, torch.stack(out.logits)]
    return found


@pytest.fixture(scope="module")
def undisturbed(prompts):
    return answers(from_pretrained(cache_size=8), prompts)


@pytest.mark.parametrize("moments", [("before",), ("after",), ("before", "after")])
@pytest.mark.parametrize("predictor", [None, always_wrong, random, Stale()])
@pytest.mark.parametrize(
    "options",
    [
        {"cache_size": 3, "prefetch": 3, "look_ahead": 3, "store": "disk"},
        {"cache_size": 2, "prefetch": 8, "look_ahead": 5, "throttle": "50MB"},
        {"cache_size": 2, "prefetch": 2, "shared_slots": True, "policy": "lrfu"},
    ],
)
def test_no_prediction_changes_a_bit(offloaded, prompts, undisturbed, predictor, options, moments):
    model = offloaded(**options)
    offload = model.offload
    offload.prefetcher.close()
    how = offload.options.prefetch, offload.options.look_ahead, predictor, moments
    offload.prefetcher = Prefetcher(model, offload.layers, offload.prefetch, *how, passes=offload.passes)
    assert all(torch.equal(a, b) for a, b in zip(answers(model, prompts), undisturbed))
    assert model.offload.stats.predictions > 0


def test_a_good_predictor_helps_and_a_bad_one_only_wastes(offloaded, prompts):
    """With a link as slow as the compute, right predictions shorten the wait; hits are the same."""
    rates = {}
    for predictor in (next_router, always_wrong):
        model = offloaded(cache_size=2, prefetch=2)
        model.offload.prefetcher.predictor = predictor
        answers(model, prompts)
        stats = model.offload.stats
        rates[predictor] = stats.prefetched / stats.misses, stats.hits, stats.misses
    assert rates[next_router][0] > 2 * rates[always_wrong][0]
    assert rates[next_router][1:] == rates[always_wrong][1:]


def copy_of(n_bytes, value, due):
    source = torch.full((n_bytes,), value, dtype=torch.uint8)
    return Copy([(0, source)], torch.zeros(n_bytes, dtype=torch.uint8), due)


def test_a_needed_copy_overtakes_a_prediction_at_full_speed():
    n_bytes = 256 << 20  # 64 chunks
    engine = ThreadEngine(torch.device("cpu"), n_bytes)
    predicted, needed = copy_of(n_bytes, 1, 3), copy_of(4096, 2, -1)
    engine.start(predicted)
    while not predicted.moved_bytes:
        time.sleep(0)
    engine.start(needed)
    needed.wait()
    assert predicted.state != DONE and (needed.slot == 2).all()
    predicted.wait()
    assert (predicted.slot == 1).all()
    engine.close()


def test_a_cancelled_prediction_leaves_the_link_at_once():
    n_bytes = 16 * 4096
    engine = ThrottledEngine(torch.device("cpu"), n_bytes, n_bytes / 0.64)
    wrong, right = copy_of(n_bytes, 1, 3), copy_of(n_bytes, 2, 4)
    engine.start(wrong)
    engine.start(right)
    time.sleep(0.1)
    engine.cancel(wrong)
    right.wait()
    assert wrong.is_over and wrong.state == ABANDONED and not wrong.slot.any()
    assert right.began_s - wrong.asked_s < 0.4  # not the 0.64 s that the wrong one would have taken
    engine.close()


def test_predictions_go_in_the_order_of_their_layers():
    device, n_bytes = torch.device("cpu"), 4096
    engine = ThrottledEngine(device, n_bytes, n_bytes / 0.02)
    copies = {
        due: Copy([(0, torch.ones(n_bytes, dtype=torch.uint8))], torch.zeros(n_bytes, dtype=torch.uint8), due)
        for due in (1, 4, 3, 2)
    }
    for copy in copies.values():
        engine.start(copy)
    for copy in copies.values():
        copy.wait()
    ended = sorted(copies, key=lambda due: copies[due].ended_s)
    assert ended == [1, 2, 3, 4]
    engine.close()


def test_folded_routers_say_what_the_routers_say(offloaded):
    model = offloaded(cache_size=2)
    layers = model.offload.layers
    hidden = torch.randn(7, model.config.hidden_size) * 3
    naive, folded = next_router(hidden, layers[1:5]), FoldedRouters()(hidden, layers[1:5])
    assert naive.shape == folded.shape == (4, 7, 8)
    assert torch.allclose(naive, folded, atol=1e-4)


def test_recall_is_above_chance(offloaded, prompts):
    """Two of eight experts at random would include one needed expert in four."""
    model = offloaded(cache_size=2, prefetch=2)
    with record(model) as recording:
        answers(model, prompts)
    trace = recording.trace
    decode = (trace.passes[1:] != trace.passes[:-1]).nonzero()[0]
    assert len(decode) > 30
    stats = model.offload.stats
    assert stats.prefetched / stats.misses > 0.35


@pytest.mark.parametrize(
    "options", [{"prefetch": -1}, {"look_ahead": 0}, {"policy": "fifo"}, {"prefetch": "2"}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(OptionError):
        from_pretrained(**options)
