"""What a family of models calls things is known in `mixtral_offload/models` alone."""

import ast
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mixtral_offload
from mixtral_offload.errors import OptionError
from mixtral_offload.models.experts import find_experts
from mixtral_offload.models.family import GENERIC, ExpertPlace, check_routers
from mixtral_offload.models.registry import FAMILIES, family_of

PACKAGE = Path(mixtral_offload.__file__).parent
#: names of transformers' modules, parameters and settings, and of its experts interface
NAMES = re.compile(
    r"block_sparse_moe|self_attn|(input|post_attention)_layernorm|variance_epsilon|\bw[123]\b|gate_up"
    r"|_apply_gate|is_concatenated|has_gate|\b(gate|up|down|q|k|v|o)_proj\b|\.mlp\b|shared_expert"
    r"|num_local_experts|\bnum_experts\b|n_routed_experts|moe_num_experts|num_experts_per"
    r"|moe_topk|moe_k\b|top_k_experts|\bqwen\d?_|\bolmoe\b|gpt_oss|deepseek_v|glm4_moe|first_attribute"
)
#: a curve of measured hit rates has the name of the model that it was measured on
CURVE = {"analysis/synthetic.py", "analysis/planner.py"}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "mlp_only_layers": [0],
}


def outside() -> list[Path]:
    files = [path for path in PACKAGE.rglob("*.py") if "models" not in path.relative_to(PACKAGE).parts]
    assert len(files) > 60
    return files


def test_no_other_folder_has_names_of_a_family():
    """In code, strings, docstrings and comments."""
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in outside()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if NAMES.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_other_folder_decides_by_the_model_type():
    """No string outside equals a model type, and `model_type` is only read to be shown."""
    for path in outside():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside_text = {
            id(part) for of in ast.walk(tree) if isinstance(of, ast.JoinedStr) for part in ast.walk(of)
        }
        for node in ast.walk(tree):
            where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Constant) and node.value in FAMILIES:
                assert path.relative_to(PACKAGE).as_posix() in CURVE, where
            if isinstance(node, ast.Attribute) and node.attr == "model_type":
                assert id(node) in inside_text, where


def test_the_pattern_finds_the_names():
    for name in (
        "x.block_sparse_moe.y",
        'f"{k}.w1.weight"',
        "c.num_local_experts",
        "q_proj.weight",
        "gate_up_proj",
    ):
        assert NAMES.search(name), name
    assert not NAMES.search("experts of a layer, gate, up, down, n_experts, top_k, overw1")


def test_each_family_is_found_by_its_model_type():
    assert list(FAMILIES) == ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
    for name, family in FAMILIES.items():
        config = AutoConfig.for_model(name, **TINY)
        assert family_of(config) is family
        assert (family.n_experts(config), family.top_k(config)) == (GENERIC.n_experts(config), 2)
    assert family_of(AutoConfig.for_model("glm4_moe")) is family_of(object()) is GENERIC
    published = AutoConfig.for_model("mixtral", vocab_size=32000)
    assert family_of(published).tokenizers(published) and not GENERIC.tokenizers(published)


@pytest.mark.parametrize("stored, matrix", [("w1", "gate"), ("up_proj", "up"), ("w2", "down")])
def test_an_expert_s_key_says_what_it_is_of(stored, matrix):
    key = f"model.layers.3.moe.experts.17.{stored}.meta.scale_q"
    stem = key.removesuffix("meta.scale_q")
    wanted = ExpertPlace(
        "model.layers.3.moe.experts", 17, matrix, "meta.scale_q", stem, f"{stored}.meta.scale_q"
    )
    assert GENERIC.expert_place(key) == wanted
    for other in (
        "model.layers.3.mlp.up_proj.weight",
        "experts.3.w4.weight",
        "experts.x.w1.weight",
        "lm_head.weight",
    ):
        assert GENERIC.expert_place(other) is None


@torch.no_grad()
def test_layers_are_found_once_with_their_routers():
    """Dense layers leave gaps in the numbers, not in the indexes; routers agree with transformers' own."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **TINY, num_experts=4)).eval()
    layers = family_of(model.config).layers(model)
    assert [(layer.index, layer.number) for layer in layers] == [(0, 1), (1, 2)]
    assert [layer.name for layer in layers] == [f"model.layers.{n}.mlp.experts" for n in (1, 2)]
    assert all(layer.in_list == "model.layers" for layer in layers)
    seen = {}
    layer = layers[1]
    layer.router.norm.register_forward_pre_hook(lambda module, inputs: seen.update(hidden=inputs[0][0]))
    layer.router.module.register_forward_hook(lambda module, inputs, out: seen.update(logits=out[0]))
    model(torch.arange(5)[None])
    own = layer.router(seen["hidden"])
    assert torch.equal(own.argsort(), seen["logits"].argsort())
    assert layer.block() is model.model.layers[2] and layer.router.epsilon is not None
    check_routers(layers)


def test_a_family_whose_router_is_elsewhere_has_none():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **TINY, num_local_experts=4))
    for layer in model.model.layers:
        layer.mlp.register_module("other", layer.mlp._modules.pop("gate"))
    layers = GENERIC.layers(model)
    assert len(layers) == 3 and all(layer.router is None for layer in layers)
    with pytest.raises(OptionError, match=r"family's router(?s:.*)prefetch=0"):
        check_routers(layers)


def test_stacked_shared_experts_are_not_taken_for_experts():
    """They count only in a model that has no module on transformers' experts interface."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **TINY, num_local_experts=4))
    block = model.model.layers[1].mlp
    block.shared_experts = torch.nn.ParameterDict({"down_proj": torch.zeros(2, 8, 8)})
    names = [f"model.layers.{n}.mlp.experts" for n in range(3)]
    assert find_experts(model) == names
    for layer in model.model.layers:
        layer.mlp.experts = torch.nn.Identity()
    assert find_experts(model) == ["model.layers.1.mlp.shared_experts"]
