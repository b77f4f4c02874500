"""Other families on transformers' experts interface: tiny random models against transformers' own experts."""

import copy
import json
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Glm4MoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from mixtral_offload import GenerationRequest, convert_checkpoint, generate_batch
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.runtime import dense
from mixtral_offload.runtime.options import device_needs, parse_options
from mixtral_offload.weights.hqq import Quantization, QuantizedLinear, dequantize, quantize
from mixtral_offload.weights.safetensors_io import read_header
from tests.models.tiny import COMMON
from tests.twin import limit, relative_error

FAMILIES = {
    "mixtral": MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=6),
    "mixtral-tied": MixtralConfig(
        **COMMON, intermediate_size=32, num_local_experts=6, tie_word_embeddings=True
    ),
    "mixtral-window": MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=6, sliding_window=6),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON,
        moe_intermediate_size=32,
        num_experts=6,
        intermediate_size=48,
        shared_expert_intermediate_size=48,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=32, num_experts=6, intermediate_size=48, head_dim=16
    ),
    "qwen3_moe-some-dense": Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=32,
        num_experts=6,
        intermediate_size=48,
        head_dim=16,
        mlp_only_layers=[0],
    ),
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=32, num_experts=6),
    "glm4_moe": Glm4MoeConfig(
        **COMMON,
        moe_intermediate_size=32,
        n_routed_experts=6,
        intermediate_size=48,
        head_dim=16,
        first_k_dense_replace=1,
        attention_bias=True,
        use_qk_norm=True,
        routed_scaling_factor=2.5,
    ),
    "deepseek_v3": DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=6,
        intermediate_size=48,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}


@torch.no_grad()
def randomized(config) -> torch.nn.Module:
    """A random model in which every bias, norm and correction has an effect: new ones are 0 or 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config)
    ).float()  # saving a model changes its configuration
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("e_score_correction_bias"):
            value.normal_(0, 0.3)
        elif name.endswith("bias"):
            value.normal_()
        elif "norm" in name:
            value.add_(torch.randn(value.shape) * 0.2)
    assert all(value.abs().min() > 0 for name, value in state.items() if "bias" in name or "norm" in name)
    return model


@pytest.fixture(params=FAMILIES)
def plain(request, tmp_path):
    """A random model, saved in 16 bits as transformers saves it, and read back by transformers."""
    folder = tmp_path / "plain"
    randomized(FAMILIES[request.param]).half().save_pretrained(folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.both_products
@torch.no_grad()
def test_16_bit_experts_give_transformers_own_logits(plain, offloaded):
    folder, model = plain
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    wanted = model(ids).logits
    for source in (folder, convert_checkpoint(folder, folder.parent / "ours")):
        ours = offloaded(source, cache_size=2)
        assert relative_error(ours(ids).logits, wanted) < limit(1e-4)
        greedy = ours.generate(ids[:1], max_new_tokens=16, do_sample=False)
        assert torch.equal(greedy, model.generate(ids[:1], max_new_tokens=16, do_sample=False))


@torch.no_grad()
def test_a_batch_and_unpacked_experts_give_the_same(plain, offloaded):
    folder, model = plain
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 96, (n,), generator=draw).tolist() for n in (9, 3, 17, 5, 11)]
    requests = [GenerationRequest(prompt, limit) for prompt, limit in zip(prompts, (8, 14, 2, 20, 6))]
    wanted = [
        model.generate(torch.tensor([of.ids]), max_new_tokens=of.max_new_tokens, do_sample=False)[
            0, len(of.ids) :
        ]
        for of in requests
    ]
    for options in ({"cache_size": 2}, {"dequantize_on_load": True}):
        ours = offloaded(folder, batch_size=3, **options)
        found = {answer.number: answer.ids for answer in generate_batch(ours, requests, batch_size=3)}
        assert [found[number] for number in range(5)] == [of.tolist() for of in wanted]


@torch.no_grad()
def test_8_bit_experts_and_attention_stay_near(plain, offloaded):
    folder, model = plain
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    wanted = model(ids).logits
    ours = offloaded(
        convert_checkpoint(folder, folder.parent / "ours", Quantization(8, 32), Quantization(8, 32)),
        cache_size=3,
    )
    assert 1e-6 < (ours(ids).logits - wanted).abs().mean() / wanted.abs().mean() < 0.1
    written = json.loads((folder.parent / "ours" / "model.safetensors.index.json").read_text())["weight_map"]
    is_latent = (
        model.config.model_type == "deepseek_v3"
    )  # whose attention has other projections, left in 16 bits
    assert is_latent or any(key.endswith("q_proj.W_q") for key in written)
    assert any(".experts.5." in key for key in written)


@pytest.mark.both_products
@torch.no_grad()
@pytest.mark.parametrize("product", [None, "dequantize_on_load"])
def test_quantized_attention_keeps_all_but_the_weight(product, tmp_path, offloaded):
    """Everything else is bit for bit the source's, and the answers are those of the dequantized weights."""
    for name in ("qwen2_moe", "glm4_moe"):
        randomized(FAMILIES[name]).half().save_pretrained(tmp_path / name / "plain")
        folder = convert_checkpoint(
            tmp_path / name / "plain", tmp_path / name / "ours", None, Quantization(4, 32)
        )
        twin = AutoModelForCausalLM.from_pretrained(tmp_path / name / "plain", dtype=torch.float32).eval()
        ours = offloaded(folder, cache_size="auto", dequantize_on_load=product == "unpack")
        n_biases = 0
        for place, module in ours.named_modules():
            if isinstance(module, QuantizedLinear):
                n_biases += module.bias is not None
                if place.endswith("o_proj"):
                    assert module.bias is None
                else:
                    assert torch.equal(module.bias, twin.get_parameter(f"{place}.bias"))
                fields = {field: getattr(module, buffer) for field, buffer in module._names.items()}
                shape = (module.out_features, module.in_features)
                twin.get_parameter(f"{place}.weight").copy_(dequantize(fields, shape, module.quantization))
        if product == "dequantize_on_load":
            for place, parameter in ours.named_parameters():
                if place.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
                    twin.get_parameter(place).copy_(parameter)
        else:
            assert n_biases == 9, "q, k and v of three layers"
        for place, value in ours.state_dict().items():
            if place in twin.state_dict():
                assert torch.equal(value, twin.state_dict()[place]), place
        ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
        wanted = twin(ids).logits
        assert relative_error(ours(ids).logits, wanted) < limit(1e-4)


@pytest.mark.parametrize("order", ["as stored", "reversed", "shuffled"])
def test_a_load_does_not_depend_on_which_tensor_is_read_first(order, tmp_path, offloaded, monkeypatch):
    """Reading threads end in any order: here they work one by one, in three orders."""
    randomized(FAMILIES["qwen2_moe"]).half().save_pretrained(tmp_path / "plain")
    folder = convert_checkpoint(tmp_path / "plain", tmp_path / "ours", None, Quantization(8, 32))
    wanted = offloaded(folder, cache_size=3).state_dict()

    def one_by_one(tasks):
        tasks = list(tasks)
        numbers = list(range(len(tasks)))
        if order == "reversed":
            numbers.reverse()
        elif order == "shuffled":
            random.Random(3).shuffle(numbers)
        results = {number: tasks[number][0](*tasks[number][1:]) for number in numbers}
        return (results[number] for number in range(len(tasks)))

    monkeypatch.setattr(dense, "in_threads", one_by_one)
    found = offloaded(folder, cache_size=3).state_dict()
    assert found.keys() == wanted.keys() and "model.layers.0.self_attn.q_proj.bias" in found
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.both_products
@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-some-dense", "deepseek_v3"])
def test_32_bit_checkpoints_load_and_convert_exactly(name, tmp_path, offloaded):
    randomized(FAMILIES[name]).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    wanted = model(ids).logits
    kept = convert_checkpoint(tmp_path / "plain", tmp_path / "kept")
    halved = convert_checkpoint(tmp_path / "plain", tmp_path / "halved", Quantization(16))
    errors = {}
    for source in (tmp_path / "plain", kept, halved):
        for store in ("ram", "disk"):
            ours = offloaded(source, cache_size=2, store=store, dtype="float32")
            errors[source.name] = float((ours(ids).logits - wanted).abs().max() / wanted.abs().max())
        weights = {field.dtype for field in ours.offload.layout.fields}
        assert weights == {torch.float16 if source == halved else torch.float32}
        assert ours.offload.layout.kinds == ("16-bit" if source == halved else "32-bit",)
    assert max(errors["plain"], errors["kept"]) < limit(1e-6, 1e-5) < errors["halved"] < 0.1
    packed = offloaded(
        convert_checkpoint(tmp_path / "plain", tmp_path / "packed", Quantization(8, 32)), cache_size=2
    )
    weight = model.get_submodule("model.layers.2.mlp.experts").down_proj[3]
    solved = quantize(weight, Quantization(8, 32))
    stored = packed.offload.checkpoint.experts[2, 3]
    assert all(torch.equal(stored["down", field].read(), value) for field, value in solved.items())


@pytest.mark.both_products
@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "glm4_moe"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_all_experts_in_one_tensor_load_and_convert(name, dtype, tmp_path, offloaded):
    """As transformers' own modules hold them: read by slice, written expert by expert, the same answers."""
    source = tmp_path / "fused"
    randomized(FAMILIES[name]).to(dtype).save_pretrained(source, save_original_format=False)
    stored = read_header(source / "model.safetensors")
    assert any(key.endswith("experts.gate_up_proj") for key in stored)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    wanted = model(ids).logits
    for folder in (source, convert_checkpoint(source, tmp_path / "ours")):
        for store in ("ram", "disk"):
            ours = offloaded(folder, cache_size=2, store=store)
            assert relative_error(ours(ids).logits, wanted) < limit(1e-4)
            assert ours.offload.stats.misses > 0
    checkpoint = ours.offload.checkpoint
    experts = model.get_submodule("model.layers.1.mlp.experts")
    gate, up = experts.gate_up_proj[4].chunk(2)
    for matrix, weight in (("gate", gate), ("up", up), ("down", experts.down_proj[4])):
        assert torch.equal(checkpoint.experts[1, 4][matrix, "weight"].read(torch.float32), weight)
    assert len({stored.path for stored in checkpoint.experts[1, 4].values()}) == 1, "a file for each expert"
    packed = convert_checkpoint(source, tmp_path / "packed", Quantization(8, 32), Quantization(8, 32))
    assert (offloaded(packed, cache_size=2)(ids).logits - wanted).abs().mean() < 0.1 * wanted.abs().mean()


@pytest.mark.parametrize("context", [3, 100])
def test_the_kv_cache_is_as_large_as_planned(plain, context):
    """Exactly: a formula of heads and head sizes said 28 times too much for DeepSeek-V3."""
    folder, model = plain
    options = parse_options({"device": "cpu", "context_length": context, "batch_size": 2})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(2, context, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    window = getattr(model.config, "sliding_window", None)
    if window and context > window:  # transformers keeps one token less than the window
        held = held * window // (window - 1)
    assert device_needs(open_checkpoint(folder), options)["KV cache"] == held
