"""Keys of checkpoints: experts by their module's name, extra tensors ignored or refused, foreign formats."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from mixtral_offload import convert_checkpoint, from_pretrained
from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.runtime.options import device_needs, parse_options
from mixtral_offload.weights.hqq import Quantization, QuantizedLinear
from mixtral_offload.weights.safetensors_io import StoredTensor
from tests.models.tiny import COMMON
from tests.twin import limit, relative_error

SIZES = {"moe_intermediate_size": 32, "intermediate_size": 48}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=4),
    "tied": lambda: MixtralConfig(
        **COMMON, intermediate_size=32, num_local_experts=4, tie_word_embeddings=True
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, **SIZES, num_experts=4, head_dim=16),
    "qwen3_next": lambda: Qwen3NextConfig(
        **COMMON,
        **SIZES,
        num_experts=4,
        head_dim=16,
        shared_expert_intermediate_size=48,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        **SIZES,
        n_routed_experts=4,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **COMMON, **SIZES, moe_num_experts=4, moe_k=2, moe_layer_start_index=1
    ),
}
IDS = torch.randint(3, 96, (1, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def save(tmp_path):
    """Save a tiny random model of a family, in 16 bits; returns its folder."""

    @torch.no_grad()
    def build(name: str, dtype: torch.dtype = torch.float16):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)
        for key, value in model.state_dict().items():
            if "bias" in key:
                value.normal_(0, 0.3)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


def change(folder, edit, **config):
    """Rewrite a checkpoint of one file with its tensors edited, and its configuration with other values."""
    tensors = load_file(folder / "model.safetensors")
    tensors = edit(tensors) or tensors
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@torch.no_grad()
def check_same_answers(folder, offloaded, n_ignored: int | None) -> None:
    """The checkpoint and its conversion give transformers' logits; n_ignored: tensors in the notice."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = model(IDS).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = offloaded(folder, cache_size=2)
    texts = [str(of.message) for of in caught if "are ignored" in str(of.message)]
    assert len(texts) == (n_ignored is not None), texts
    if n_ignored is not None:
        assert texts[0].startswith(f"{n_ignored} tensors in {folder}") and len(texts[0]) < 600
        assert len(ours.offload.checkpoint.ignored) == n_ignored
    assert relative_error(ours(IDS).logits, wanted) < limit(1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = convert_checkpoint(folder, folder.parent / "converted")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that was ignored was written
        converted = offloaded(target, cache_size=2)
    assert relative_error(converted(IDS).logits, wanted) < limit(1e-4)


def error_of(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder, device="cpu")
    return str(caught.value)


def other_experts(prefix):
    """Experts under another prefix, which hold other values than layer 2's."""
    return lambda tensors: (
        tensors
        | {
            key.replace("model.layers.2.", prefix): torch.full_like(value, 0.01)
            for key, value in tensors.items()
            if ".layers.2.mlp.experts" in key
        }
    )


@pytest.mark.both_products
@pytest.mark.parametrize(
    "prefix",
    [
        "mtp.layers.0.",
        "mtp.model.layers.0.",
        "draft.model.layers.0.",
        "model_copy.layers.0.",
        "mtp.layers.2.",
    ],
)
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_moe"])
def test_experts_of_another_module_are_not_this_model_s(name, prefix, save, offloaded):
    folder = save(name)
    change(folder, other_experts(prefix))
    check_same_answers(folder, offloaded, 12)


@pytest.mark.both_products
@pytest.mark.parametrize("how", ["by its tensors", "by the configuration", "by transformers"])
def test_layers_that_predict_further_tokens(how, save, offloaded):
    """DeepSeek's and GLM's hubs hold them as layers after the last."""
    number = 61 if how == "by transformers" else 3
    folder = save("deepseek_v3")

    def add(tensors):
        extra = {
            key.replace(".layers.2.", f".layers.{number}."): value * 0.5
            for key, value in tensors.items()
            if ".layers.2." in key
        }
        if how == "by its tensors":
            extra |= {
                "model.layers.3.eh_proj.weight": torch.zeros(64, 128),
                "model.layers.3.enorm.weight": torch.ones(64),
            }
        return tensors | extra

    n_before = len(load_file(folder / "model.safetensors"))
    change(folder, add, **({"num_nextn_predict_layers": 1} if how == "by the configuration" else {}))
    check_same_answers(folder, offloaded, len(load_file(folder / "model.safetensors")) - n_before)


def test_a_configuration_with_too_few_layers_is_refused(save):
    """Its decoder layers would be left out: that is no layer to predict further tokens with."""
    folder = save("qwen3_moe")
    change(folder, lambda tensors: None, num_hidden_layers=2)
    message = error_of(folder)
    assert "has no place" in message and "model.layers.2." in message and "config.json" in message


@pytest.mark.both_products
def test_heads_and_buffers_of_other_tasks_are_ignored(save, offloaded):
    for name in ("mixtral", "tied"):
        folder = save(name)
        change(
            folder,
            lambda tensors: (
                tensors
                | {
                    "score.weight": torch.ones(3, 64),
                    "v_head.summary.weight": torch.ones(1, 64),
                    "v_head.summary.bias": torch.ones(1),
                    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
                    "model.rotary_emb.inv_freq": torch.ones(8),
                }
            ),
        )
        check_same_answers(folder, offloaded, 5)
        shutil.rmtree(folder.parent / "converted")


@pytest.mark.parametrize(
    "key",
    [
        "model.extra.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "lm_head.bias",
        "model.layers.1.mlp.experts.4.gate_proj.weight",
        "model.layers.00.mlp.experts.1.gate_proj.weight",
        "model.layers.0.mlp.shared_experts.gate_proj.weight",
    ],
)
def test_tensors_inside_the_model_that_have_no_place_are_refused(key, save):
    """The model without them would compute something else."""
    folder = save("qwen3_moe")
    change(folder, lambda tensors: tensors | {key: torch.ones(32, 64)})
    message = error_of(folder)
    assert "has no place" in message and key in message and "next step" in message


def test_what_is_missing_is_an_error_before_any_weight_is_read(save, monkeypatch):
    monkeypatch.setattr(StoredTensor, "read_into", lambda *_: pytest.fail("weights were read"))
    for name, gone in (
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),
        ("mixtral", "lm_head.weight"),
        ("tied", "model.embed_tokens.weight"),
    ):
        folder = save(name)
        change(folder, lambda tensors, gone=gone: {key: of for key, of in tensors.items() if key != gone})
        assert all(text in error_of(folder) for text in ("1 parameters have no value", gone))
        with pytest.raises(CheckpointError, match="no value"):
            convert_checkpoint(folder, folder.parent / "converted")
    folder = save("qwen3_moe")  # nearly everything is under another name, so that it would be ignored
    change(folder, lambda tensors: {f"student.{key}": of for key, of in tensors.items()})
    assert "no expert weights found" in error_of(folder)


@pytest.mark.parametrize(
    "key, shape",
    [
        ("model.layers.1.mlp.experts.2.gate_proj.weight", (64, 32)),
        ("model.norm.weight", (1, 64)),
        ("model.layers.1.mlp.gate.weight", (64, 4)),
    ],
)
def test_a_wrong_shape_of_as_many_elements(key, shape, save):
    folder = save("qwen3_moe")
    change(folder, lambda tensors: tensors | {key: tensors[key].reshape(shape)})
    assert "does not fit the model" in error_of(folder) and str(shape) in error_of(folder)


def test_two_tensors_for_one_place(save):
    w1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    twice = {
        "model.layers.0.mlp.gate.weight": "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.experts.1.w1.weight": w1,
        "model.layers.0.mlp.experts.1.gate_proj.weight": w1,
        "model.layers.0.self_attn.q_proj.W_q": "model.layers.0.self_attn.q_proj.weight",
    }
    for other, key in twice.items():
        folder = save("mixtral")
        change(folder, lambda tensors, other=other, key=key: tensors | {other: tensors[key] * 2})
        message = error_of(folder)
        assert "two tensors are for one place" in message and key in message


def test_a_checkpoint_of_the_base_model_fits_a_tied_one(save, offloaded):
    """Saved without a head: its keys lack the prefix."""
    folder = save("tied")
    wanted = offloaded(folder, cache_size=2)(IDS).logits
    change(folder, lambda tensors: {key.removeprefix("model."): value for key, value in tensors.items()})
    assert torch.equal(offloaded(folder, cache_size=2)(IDS).logits, wanted)


FORMATS = {
    "fp8": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
    "gptq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
    "awq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "compressed-tensors": {
        "weight_packed": torch.int32,
        "weight_scale": torch.bfloat16,
        "weight_shape": torch.int64,
    },
    "bitsandbytes": {"weight": torch.uint8, "weight.absmax": torch.uint8, "weight.quant_map": torch.float32},
    "hqq": {"W_q": torch.uint8, "scale": torch.float16, "zero": torch.float16},
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_quantized_formats_are_refused_by_their_name(name, save, monkeypatch):
    monkeypatch.setattr(StoredTensor, "read_into", lambda *_: pytest.fail("weights were read"))
    folder = save("qwen3_moe")

    def quantize(tensors):
        return {
            new: value
            for key, of in tensors.items()
            for new, value in (
                {
                    key.removesuffix("weight") + field: torch.zeros(4, 4, dtype=dtype)
                    for field, dtype in FORMATS[name].items()
                }
                if ".experts." in key
                else {key: of}
            ).items()
        }

    change(folder, quantize, quantization_config={"quant_method": name, "bits": 4})
    message = error_of(folder)
    assert f"another format ({name})" in message and "unquantized" in message and len(message) < 600
    if name == "hqq":  # nothing but its own configuration says so
        return
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config")
    path.write_text(json.dumps(config))
    said = {"fp8": "F8_E4M3", "awq": "awq or gptq"}.get(name, name)
    assert f"another format ({said})" in error_of(folder)


def test_mxfp4_and_an_unknown_format(save):
    folder = save("mixtral")
    change(folder, lambda tensors: None, quantization_config={"quant_method": "mxfp4"})
    assert "another format (mxfp4)" in error_of(folder)
    change(folder, lambda tensors: None, quantization_config={"bits": 4})
    assert "another format (unknown)" in error_of(folder)
    change(
        folder,
        lambda tensors: tensors | {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(4)},
        quantization_config=None,
    )
    assert "another format (mxfp4)" in error_of(folder)


@pytest.mark.both_products
def test_our_own_and_the_published_form_are_no_other_format(published, tmp_path, expected, offloaded):
    published_as_hqq = shutil.copytree(published, tmp_path / "hqq")
    path = published_as_hqq / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "hqq"}})
    )
    ours = convert_checkpoint(published, tmp_path / "ours")
    assert "mixtral_offload" in (ours / "config.json").read_text()
    for folder in (published_as_hqq, ours):
        logits = offloaded(folder, cache_size=3)(expected["input_ids"]).logits
        assert (logits - expected["logits"]).abs().max() < limit(1e-4, 2e-2)


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_transformers_keeps_in_fp32_stays_so(name, dtype, save, offloaded):
    folder = save(name, torch.float32)
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    ours = offloaded(folder, dtype=dtype, cache_size=4)
    state = ours.state_dict()
    kept = {key for key, value in state.items() if value.dtype == torch.float32}
    assert kept == {key for key, value in model.state_dict().items() if value.dtype == torch.float32}
    assert kept and kept < state.keys()
    for key in state:
        assert torch.equal(state[key], model.state_dict()[key]), key
    options = parse_options({"device": "cpu", "dtype": dtype})
    n_bytes = {value.data_ptr(): value.nbytes for value in state.values()}  # tied ones are one
    assert device_needs(open_checkpoint(folder), options)["dense part"] == sum(n_bytes.values())


def test_a_quantized_layer_that_cannot_keep_everything_is_refused():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked, scaled, parametrized = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    hooked.register_forward_hook(lambda *_: None)
    scaled.register_buffer("scale", torch.ones(16))
    parametrized.temperature = 2.0
    for linear in (Scaled(16, 16), hooked, scaled, parametrized):
        with pytest.raises(CheckpointError, match="more than its quantized form can keep"):
            QuantizedLinear.replacing(linear, Quantization(8, 16))
    plain = torch.nn.Linear(16, 16).eval()
    layer = QuantizedLinear.replacing(plain, Quantization(8, 16))
    assert layer.bias is plain.bias and layer.training is False
    assert QuantizedLinear.replacing(torch.nn.Linear(16, 16, bias=False), Quantization(8, 16)).bias is None
