"""Sizes from a configuration alone are those of the models, and of checkpoints in the published format."""

import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from mixtral_offload.analysis.planner import PlanRequest
from mixtral_offload.errors import OptionError
from mixtral_offload.models.checkpoint import load_config, open_checkpoint
from mixtral_offload.models.sizes import fitting, matrix_bytes, model_sizes
from mixtral_offload.runtime.options import device_needs, parse_options
from mixtral_offload.weights.hqq import PAPER, quantize
from mixtral_offload.weights.source import DEMO

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from shapes import mixtral_config

QWEN3_30B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}


def sizes_of(model_type, **numbers):
    return model_sizes(AutoConfig.for_model(model_type, **numbers))


@pytest.fixture(scope="module")
def mixtral():
    config = mixtral_config()
    return sizes_of(config.pop("model_type"), **config)


def test_mixtral_8x7b(mixtral):
    assert mixtral.n_parameters == 46_702_792_704  # as its makers and transformers count
    assert mixtral.active_parameters / 1e9 == pytest.approx(12.9, abs=0.05)
    assert (len(mixtral.layers), mixtral.n_experts, mixtral.top_k) == (32, 8, 2)
    assert mixtral.expert_bytes / 1e6 == pytest.approx(66.4, abs=0.05)  # the published checkpoint's files
    assert mixtral.at(16).expert_bytes == 2 * 3 * 4096 * 14336
    assert mixtral.kv_bytes(1) == 2 * 32 * 8 * 128 * 2
    # 262 MB each for embedding and head; 4-bit attention of 1.34 billion weights
    assert mixtral.dense_bytes == pytest.approx(2 * 262.1e6 + 32 * 41.9e6 * 4.25 / 8, rel=0.01)
    assert mixtral.notes == ()


def test_qwen3_30b_a3b():
    sizes = sizes_of("qwen3_moe", **QWEN3_30B)
    assert sizes.n_parameters / 1e9 == pytest.approx(30.5, abs=0.05)
    assert sizes.active_parameters / 1e9 == pytest.approx(3.3, abs=0.06)
    assert (sizes.n_experts, sizes.top_k, sizes.expert_matrices[0]) == (128, 8, (768, 2048))


@pytest.mark.parametrize("which", ["demo", "published"])
def test_a_checkpoint_s_own_sizes(which, published):
    """The plan of a configuration is that of the checkpoint, byte for byte."""
    checkpoint = open_checkpoint(DEMO if which == "demo" else published)
    bits = {kind.bits for kind in checkpoint.layout.quantization.values()}.pop()
    sizes = model_sizes(checkpoint.config)
    assert sizes.at(bits).for_plan.total == len(checkpoint.experts)
    assert sizes.layers == checkpoint.layers
    if fitting(checkpoint.layout.shapes["gate"], bits) == checkpoint.layout.quantization["gate"]:
        assert sizes.at(bits).expert_bytes == checkpoint.layout.n_bytes
    else:
        assert which == "demo"  # its groups are others than the paper's
    assert sum(map(prod, checkpoint.layout.shapes.values())) == sizes.expert_parameters
    attention = [key for key in checkpoint.dense if key.endswith("q_proj.W_q")]
    options = parse_options({"device": "cpu", "dtype": "float16", "context_length": 100, "compile": True})
    needs = device_needs(checkpoint, options)
    ours = PlanRequest(sizes.at(bits, 4 if attention else 16), 10**9, 10**9, 10**9, context_length=100).needs
    assert ours["KV cache"] == needs["KV cache"]
    if which == "published":  # in the paper's groups
        assert (ours["dense part"], ours["scratch"]) == (needs["dense part"], needs["scratch"])


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def test_every_parameter_is_counted_once_in_every_family():
    """The parts add up to transformers' own count. One part is the rest, so the others are tested too."""
    families = {
        "qwen2_moe": {
            "num_experts": 6,
            "moe_intermediate_size": 32,
            "intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
        },
        "olmoe": {"num_experts": 6, "intermediate_size": 32},
        "gpt_oss": {"num_local_experts": 6, "intermediate_size": 32, "head_dim": 16},
        "deepseek_v3": {
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "intermediate_size": 48,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
        "glm4_moe": {
            "n_routed_experts": 6,
            "moe_intermediate_size": 32,
            "intermediate_size": 48,
            "first_k_dense_replace": 1,
        },
    }
    for family, numbers in families.items():
        sizes = sizes_of(family, **{**SMALL, **numbers})
        n_experts = (
            numbers.get("num_experts") or numbers.get("n_routed_experts") or numbers["num_local_experts"]
        )
        dense = numbers.get("first_k_dense_replace", 0)
        assert sizes.n_experts == n_experts and sizes.layers == tuple(range(dense, 4)), family
        assert sizes.expert_parameters == 3 * 64 * 32 + (64 + 64 if family == "gpt_oss" else 0), family
        assert sizes.embedding == 96 * 64
        assert sum(sizes.attention.values()) == 4 * (5 if family == "deepseek_v3" else 4), family
        shared = {"qwen2_moe": 12, "deepseek_v3": 12, "glm4_moe": 12}.get(family, 0)
        assert sum(sizes.linear.values()) == shared, (
            family
        )  # 3 for the dense layer, 3 for each other's shared experts
        assert 0 < sizes.rest < 0.2 * sizes.n_parameters, family


def test_families_that_from_pretrained_refuses_are_planned_with_a_word():
    assert "a plan only" in sizes_of("gpt_oss", num_hidden_layers=2).notes[0]
    assert "not been tried" in sizes_of("glm4_moe", num_hidden_layers=2).notes[0]
    assert sizes_of("olmoe", num_hidden_layers=2).notes == ()


@pytest.mark.parametrize(
    "family, numbers, compressed",
    [
        ("mixtral", {"sliding_window": 8, "intermediate_size": 32, "num_local_experts": 4}, False),
        (
            "gpt_oss",
            {"sliding_window": 8, "intermediate_size": 32, "num_local_experts": 4, "head_dim": 16},
            False,
        ),
        (
            "deepseek_v3",
            {
                "n_routed_experts": 8,
                "n_group": 2,
                "topk_group": 1,
                "moe_intermediate_size": 32,
                "intermediate_size": 48,
                "first_k_dense_replace": 1,
                "num_key_value_heads": 4,
            },
            True,
        ),
    ],
)
def test_the_kv_cache_is_as_large_as_transformers_makes_it(family, numbers, compressed):
    """A tiny model reads 21 tokens; what its cache then holds is what was said."""
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        **{**SMALL, **numbers},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.ones(1, 21, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    window = numbers.get("sliding_window")
    said = replace(model_sizes(config), item=1).kv_bytes(21)
    # transformers keeps one token less than the window
    n_sliding = sum(of is not None for _, of in model_sizes(config).kv)
    assert (n_sliding > 0) == (window is not None)
    assert said - held == n_sliding * 2 * 2 * 16


def test_bytes_of_a_matrix_are_those_of_its_tensors():
    weight = torch.randn(96, 160)  # neither 128 nor 256 scales make a group
    for bits in PAPER:
        fields = quantize(weight, fitting(weight.shape, bits)).values() if bits < 16 else [weight.half()]
        assert matrix_bytes(tuple(weight.shape), bits) == sum(f.numel() * f.element_size() for f in fields)
    assert fitting((4096, 14336), 2) == PAPER[2]
    assert matrix_bytes((96, 160), 2, 64) % 64 == 0


def test_hundreds_of_layers_take_no_time():
    began = time.process_time()
    sizes = sizes_of("qwen3_moe", **{**QWEN3_30B, "num_hidden_layers": 300})
    assert len(sizes.layers) == 300 and sizes.n_parameters > 180e9
    assert time.process_time() - began < 10


def test_the_attention_of_an_image_encoder_has_no_kv_cache():
    """Outside the layers (aria's projector), or in separate layers."""
    text = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_num_experts": 4,
    }
    vision = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 16}
    inside = sizes_of("aria", text_config={"model_type": "aria_text", **text}, vision_config=vision)
    assert inside.kv == sizes_of("aria_text", **text).kv == ((64, None), (64, None))


def test_a_mixture_of_another_kind_is_not_called_dense():
    with pytest.raises(
        OptionError, match=r"dbrx is a mixture of experts of a family(?s:.*)moe_num_experts(?s:.*)16"
    ):
        sizes_of(
            "dbrx",
            d_model=128,
            n_heads=4,
            n_layers=2,
            vocab_size=300,
            ffn_config={"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 64},
            attn_config={"rope_theta": 5e5, "kv_n_heads": 2, "clip_qkv": 8},
        )


def test_refusals(tmp_path):
    with pytest.raises(OptionError, match="llama is a dense model"):
        sizes_of("llama", num_hidden_layers=2)
    with pytest.raises(OptionError, match="cannot build a gpt2"):
        sizes_of("gpt2", n_embd=7)
    with pytest.raises(OptionError, match="how many experts a token uses"):
        sizes_of("mixtral", num_hidden_layers=2, num_experts_per_tok=9)
    with pytest.raises(OptionError, match="unknown bit width"):
        sizes_of("mixtral", num_hidden_layers=1).at(5)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load_config(tmp_path / "config.json")
