"""Other families on transformers' experts interface: tiny random models against transformers' own eager experts."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from mixtral_offload import Request, convert_checkpoint, generate_batch
from mixtral_offload.quantization import Quantization

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "num_experts_per_tok": 2, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "mixtral": MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=6),
    "mixtral-tied": MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=6, tie_word_embeddings=True),
    "mixtral-window": MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=6, sliding_window=6),
    "qwen2_moe": Qwen2MoeConfig(**COMMON, moe_intermediate_size=32, num_experts=6, intermediate_size=48, shared_expert_intermediate_size=48),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, moe_intermediate_size=32, num_experts=6, intermediate_size=48, head_dim=16),
    "qwen3_moe-some-dense": Qwen3MoeConfig(**COMMON, moe_intermediate_size=32, num_experts=6, intermediate_size=48, head_dim=16, mlp_only_layers=[0]),
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=32, num_experts=6),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def plain(request, tmp_path):
    """A random model, saved in 16 bits as transformers saves it, and read back by transformers."""
    torch.manual_seed(0)
    folder = tmp_path / "plain"
    AutoModelForCausalLM.from_config(FAMILIES[request.param]).half().save_pretrained(folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_16_bit_experts_give_transformers_own_logits(plain, offloaded):
    folder, model = plain
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    wanted = model(ids).logits
    for source in (folder, convert_checkpoint(folder, folder.parent / "ours")):
        ours = offloaded(source, cache_size=2)
        assert (ours(ids).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
        greedy = ours.generate(ids[:1], max_new_tokens=16, do_sample=False)
        assert torch.equal(greedy, model.generate(ids[:1], max_new_tokens=16, do_sample=False))


@torch.no_grad()
def test_a_batch_and_unpacked_experts_give_the_same(plain, offloaded):
    folder, model = plain
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 96, (n,), generator=draw).tolist() for n in (9, 3, 17, 5, 11)]
    requests = [Request(prompt, limit) for prompt, limit in zip(prompts, (8, 14, 2, 20, 6))]
    wanted = [
        model.generate(torch.tensor([of.ids]), max_new_tokens=of.max_new_tokens, do_sample=False)[
            0, len(of.ids) :
        ]
        for of in requests
    ]
    for options in ({"cache_size": 2}, {"unpack": True}):
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
    assert any(key.endswith("q_proj.W_q") for key in written) and any(".experts.5." in key for key in written)
