"""The internals of transformers and ipywidgets that the package uses: these tests name what a version breaks.

Run on the oldest versions that are supported, as they stand on Colab, by notebooks/check_colab.sh.
"""

import inspect
import warnings

import ipywidgets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    TextIteratorStreamer,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixtral_offload import load_tokenizer
from mixtral_offload.models.registry import family_of
from mixtral_offload.runtime.forward import offloaded_experts

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}  # fmt: skip
QWEN = {"num_experts": 4, "moe_intermediate_size": 32}
FAMILIES = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=32),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **QWEN, head_dim=16),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=4),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[request.param]()).eval()


def test_the_experts_interface_hands_over_what_it_did(model):
    assert ALL_EXPERTS_FUNCTIONS["offloaded"] is offloaded_experts
    seen = []

    def function(module, hidden_states, top_k_index, top_k_weights):
        seen.append((module, hidden_states.shape, top_k_index.shape, top_k_weights.shape, top_k_index.dtype))
        return torch.zeros_like(hidden_states)

    ALL_EXPERTS_FUNCTIONS.register("a_test_of_drift", function)
    model.set_experts_implementation("a_test_of_drift")
    model(torch.arange(6).view(1, 6))
    top_k = model.config.num_experts_per_tok
    expected = (6, 32), (6, top_k), (6, top_k), torch.int64
    assert [part[1:] for part in seen] == [expected] * 2
    assert [part[0] for part in seen] == [
        model.get_submodule(layer.name) for layer in family_of(model.config).layers(model)
    ]


def test_experts_say_of_what_kind_they_are(model):
    for layer in family_of(model.config).layers(model):
        assert layer.name.endswith(".mlp.experts")
        module = model.get_submodule(layer.name)
        flags = module.has_gate, module.is_concatenated, module.has_bias, module.is_transposed
        assert flags == (True, True, False, False)
        assert set(module._parameters) == {"gate_up_proj", "down_proj"}
        x = torch.randn(3, 2 * module.down_proj.shape[2])
        gate, up = x.chunk(2, dim=-1)
        torch.testing.assert_close(module._apply_gate(x), torch.nn.functional.silu(gate) * up)


def test_routers_and_norms_are_where_predictions_need_them(model):
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.shape == (4, 32)
        assert layer.post_attention_layernorm.variance_epsilon > 0
        assert layer.post_attention_layernorm.weight.shape == (32,)
    assert model.get_input_embeddings() is model.model.embed_tokens


def test_buffers_without_a_checkpoint_can_be_computed(model):
    rotary = model.model.rotary_emb
    good = rotary.inv_freq.clone()
    rotary._buffers["inv_freq"] = torch.empty_like(good)
    model._init_weights(rotary)
    torch.testing.assert_close(rotary.inv_freq, good)


def test_the_kv_cache_can_be_cut_back(model):
    past = DynamicCache(config=model.config)
    ids = torch.arange(8).view(1, 8)
    whole = model(ids, past_key_values=past).logits
    past.crop(-3)
    assert past.get_seq_length() == 5
    torch.testing.assert_close(
        model(ids[:, 5:], past_key_values=past).logits, whole[:, 5:], atol=1e-5, rtol=1e-4
    )


def test_the_streamer_can_be_ended_from_outside():
    streamer = TextIteratorStreamer(load_tokenizer())
    streamer.text_queue.put("text")
    streamer.text_queue.put(streamer.stop_signal)
    assert list(streamer) == ["text"]


def test_chat_templates_give_a_dict_of_ids():
    tokenizer = load_tokenizer()
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
    )
    assert isinstance(found["input_ids"][0], int)


def test_a_text_field_says_when_enter_was_pressed():
    field, heard = ipywidgets.Text(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        field.on_submit(heard.append)
    field._handle_string_msg(field, {"event": "submit"}, [])
    assert heard == [field]
    assert "title" in inspect.signature(ipywidgets.Accordion.set_title).parameters
