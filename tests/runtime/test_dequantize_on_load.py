"""Everything on the device and dequantized once: the same numbers, without the work of dequantizing."""

import pytest
import torch

from mixtral_offload import memory_use, record
from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.weights.hqq import QuantizedLinear
from mixtral_offload.weights.source import DEMO
from tests.twin import limit, relative_error

IDS = torch.arange(3, 43).view(1, 40)


@pytest.mark.both_products
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_dequantized_logits_are_those_of_packed_experts(offloaded, n_tokens):
    packed, dequantized = offloaded(cache_size=2), offloaded(dequantize_on_load=True)
    with torch.inference_mode():
        assert relative_error(
            packed(IDS[:, :n_tokens]).logits, dequantized(IDS[:, :n_tokens]).logits
        ) <= limit(0)


@pytest.mark.both_products
def test_16_bits_become_the_dtype_of_the_products_once(offloaded):
    stored, dequantized = (
        offloaded(DEMO.parent / "fp16", cache_size=8, **of) for of in ({}, {"dequantize_on_load": True})
    )
    with torch.inference_mode():
        assert relative_error(stored(IDS).logits, dequantized(IDS).logits) <= limit(0)
    assert (
        next(iter(dequantized.offload.cache.resident_slots()))[1].numel() == 2 * stored.offload.layout.n_bytes
    )


def test_nothing_packed_is_left(offloaded, published, expected):
    model = offloaded(published, dequantize_on_load=True)
    assert not [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    with torch.inference_mode():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_the_plan_says_so_and_counts_it(offloaded):
    plan = offloaded(dequantize_on_load=True).offload.plan
    n_weights = 3 * 192 * 256
    assert plan.store is None and plan.device_bytes == 48 * 4 * n_weights
    assert "dequantized once: an expert of 79 kB takes 590 kB" in str(plan)
    packed, dequantized = (
        memory_use(cache_size=8, device="cpu"),
        memory_use(dequantize_on_load=True, device="cpu"),
    )
    assert dequantized.device["resident experts"] == plan.device_bytes
    more = 4 * 6 * (2 * 192 * 192 + 2 * 64 * 192)  # attention in fp32
    assert dequantized.device["dense part"] >= packed.device["dense part"] + more - 6 * 1e5


def test_traces_are_recorded_as_always(offloaded):
    model = offloaded(dequantize_on_load=True)
    with record(model) as run, torch.inference_mode():
        model(IDS)
        model(IDS[:, :1])
    assert run.trace.n_tokens == 41 and model.offload.stats.hit_rate == 1.0


@pytest.mark.parametrize("options", [{"cache_size": 3}, {"vram": 20_000_000}], ids=["cache", "memory"])
def test_what_does_not_fit_is_refused(offloaded, options):
    with pytest.raises(CapacityError, match=r"every expert on the device|too little memory"):
        offloaded(dequantize_on_load=True, **options)


@pytest.mark.parametrize(
    "options",
    [{"dequantize_on_load": "yes"}, {"dequantize_on_load": True, "compile": True}],
    ids=["word", "compile"],
)
def test_what_means_nothing_is_refused(offloaded, options):
    with pytest.raises(OptionError, match="dequantize_on_load"):
        offloaded(**options)
