"""A folder of our format states how its matrices are stored; readers compare, transformers refuses it."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM
from transformers.utils import logging

from mixtral_offload import convert_checkpoint, from_pretrained
from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import INDEX, open_checkpoint
from mixtral_offload.weights.hqq import PAPER, Quantization
from mixtral_offload.weights.manifest import REFUSAL, Matrix, by_pattern, pattern_of, read_manifest
from mixtral_offload.weights.safetensors_io import read_header
from mixtral_offload.weights.source import DEMO

SILENT = ("quantization_config", "transformers_weights")  # what a folder that says nothing lacks


def change_config(folder, without=(), **change):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in without}))


def error_of(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder, device="cpu")
    return str(caught.value)


@pytest.fixture
def demo(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "demo")


CHANGES = [
    ({"intermediate_size": 512}, "gate", "256x192, 4-bit, group 64", "512x192"),
    ({"intermediate_size": 128}, "gate", "256x192, 4-bit, group 64", "128x192"),
    ({"head_dim": 64}, "self_attn.k_proj", "64x192, 4-bit, group 64", "128x192"),
    ({"head_dim": 16}, "self_attn.k_proj", "64x192, 4-bit, group 64", "32x192"),
    ({"num_key_value_heads": 1}, "self_attn.k_proj", "64x192, 4-bit, group 64", "32x192"),
    ({"num_attention_heads": 12}, "self_attn.o_proj", "192x192, 4-bit, group 64", "192x384"),
]


@pytest.mark.parametrize("change, key, stated, found", CHANGES, ids=[str(of[0]) for of in CHANGES])
def test_another_size_in_config_is_refused_with_both_values(demo, change, key, stated, found):
    """All of these answered garbage: half the width of a group looks like twice the bits."""
    change_config(demo, **change)
    message = error_of(demo)
    assert "config.json contradicts itself" in message and "config.json" in message
    for part in (key, f"expected: {stated}", f"found: {found}", "next step: restore"):
        assert part in message, message


@pytest.mark.parametrize("change", [of[0] for of in CHANGES], ids=str)
def test_the_same_in_a_folder_that_says_nothing(demo, change):
    change_config(demo, SILENT)
    assert open_checkpoint(demo).manifest is None
    from_pretrained(demo, device="cpu")  # known by what is published
    change_config(demo, **change)
    message = error_of(demo)
    assert "no published kind" in message and "intermediate_size" in message


@pytest.mark.parametrize("intermediate", [64, 128, 256, 1024, 2048, 4096])
def test_the_same_in_the_published_format(published, tmp_path, intermediate):
    folder = shutil.copytree(published, tmp_path / "published")
    change_config(folder, intermediate_size=intermediate)
    assert "expert 0 of layer 0" in error_of(folder)


def test_transposed_plain_matrices_are_refused(tmp_path):
    """The same number of elements, in another shape."""
    folder = shutil.copytree(DEMO.parent / "fp16", tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.2.block_sparse_moe.experts.3.w1.weight"
    tensors[key] = tensors[key].T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = error_of(folder)
    assert "gate of expert 3 of layer 2" in message and "(256, 192)" in message and key in message


def test_weights_of_another_width_under_the_same_config(tmp_path):
    """The statement is of 4 bits, the files are of 8: of another conversion."""
    four, eight = (
        convert_checkpoint(DEMO.parent / "fp16", tmp_path / str(bits), Quantization(bits, 64))
        for bits in (4, 8)
    )
    shutil.copy(four / "config.json", eight / "config.json")
    message = error_of(eight)
    assert "stored in another way than config.json states" in message
    assert "expected: 4-bit" in message and "found: 8-bit" in message


def test_attention_that_config_says_nothing_of_or_too_much(tmp_path):
    plain, packed = (
        convert_checkpoint(DEMO.parent / "fp16", tmp_path / name, PAPER[8], attention)
        for name, attention in (("plain", None), ("packed", PAPER[8]))
    )
    texts = [(folder / "config.json").read_text() for folder in (plain, packed)]
    (packed / "config.json").write_text(texts[0])
    assert "of which config.json says nothing" in error_of(packed)
    (plain / "config.json").write_text(texts[1])
    assert "do not hold packed" in error_of(plain)


BAD = {
    "format 2": {"format": 2},
    "no experts": {"experts": {}},
    "a list": {"experts": []},
    "a number": {"modules": 3},
    "bits in words": {"experts": {"gate": {"shape": [1, 2], "bits": "four"}}},
    "three sizes": {"experts": {"gate": {"shape": [1, 2, 3]}}},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_a_statement_of_another_kind(demo, change):
    stated = json.loads((demo / "config.json").read_text())["quantization_config"]
    change_config(demo, quantization_config=stated | change)
    message = error_of(demo)
    assert "config.json" in message and "quantization_config" in message and "next step" in message


def test_unusual_groups_are_read_back_because_they_are_stated(tmp_path, offloaded):
    wanted = Quantization(4, 32)
    folder = convert_checkpoint(DEMO.parent / "fp16", tmp_path / "own", wanted, Quantization(2, 128))
    model = offloaded(folder)
    assert model.offload.layout.quantization["down"] == wanted
    assert model.model.layers[3].self_attn.v_proj.quantization == Quantization(2, 128)
    again = open_checkpoint(convert_checkpoint(folder, tmp_path / "again", attention=Quantization(8, 32)))
    assert again.manifest.experts["up"].quantization == wanted
    assert again.manifest.of_module("model.layers.1.self_attn.q_proj").quantization == Quantization(8, 32)
    change_config(folder, SILENT)
    assert "of unusual groups must be converted again" in error_of(folder)


def test_patterns_and_exceptions():
    assert pattern_of("model.layers.12.self_attn.q_proj") == "model.layers.*.self_attn.q_proj"
    assert pattern_of("h2o.3.w1") == "h2o.*.w1"
    a, b = Matrix((8, 8), PAPER[8]), Matrix((8, 8), PAPER[4])
    assert by_pattern({"l.0.q": a, "l.1.q": a, "l.0.k": a, "l.1.k": b}) == {
        "l.*.q": a,
        "l.0.k": a,
        "l.1.k": b,
    }


def test_the_same_manifest_through_json(demo):
    manifest = open_checkpoint(demo).manifest
    config = AutoConfig.from_pretrained(demo)
    assert config.quantization_config == manifest.as_config()["quantization_config"]
    assert read_manifest(config, demo / "config.json") == manifest


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, MixtralForCausalLM])
def test_transformers_refuses_the_folder_and_says_who_reads_it(tmp_path, kind):
    """An unknown quant_method alone is a warning, and random weights."""
    folders = [
        DEMO,
        convert_checkpoint(DEMO.parent / "fp16", tmp_path / "experts", PAPER[8]),
        convert_checkpoint(DEMO.parent / "fp16", tmp_path / "attention", None, PAPER[8]),
    ]
    for folder in folders:
        with pytest.raises(ValueError, match=r"mixtral_offload\.from_pretrained"):
            kind.from_pretrained(folder)
    assert REFUSAL in json.loads((DEMO / "config.json").read_text())["transformers_weights"]


def test_a_folder_of_plain_weights_is_left_to_transformers(tmp_path):
    for source, name in ((DEMO.parent / "fp16", "same"), (DEMO, "unpacked")):
        folder = convert_checkpoint(source, tmp_path / name, Quantization(16), Quantization(16))
        config = json.loads((folder / "config.json").read_text())
        assert not config.keys() & set(SILENT)
        model = MixtralForCausalLM.from_pretrained(folder)
        weights = open_checkpoint(folder).experts[2, 3]["up", "weight"].read()
        found = model.model.layers[2].mlp.experts.gate_up_proj[3, weights.shape[0] :]
        assert torch.equal(found, weights)


def test_our_own_loading_says_nothing_and_leaves_a_plain_config(caplog):
    logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = from_pretrained(DEMO, device="cpu")
    finally:
        logging.disable_propagation()
    assert not caplog.records
    assert not any(hasattr(model.config, name) for name in SILENT)
    assert hasattr(model.offload.checkpoint.config, "quantization_config")


def test_a_foreign_quantization_config_is_none_of_ours(demo):
    config = AutoConfig.from_pretrained(demo)
    for other in (None, {}, {"quant_method": "gptq"}, "text"):
        config.quantization_config = other
        assert read_manifest(config, demo) is None


def test_convert_states_what_the_headers_show(tmp_path):
    folder = convert_checkpoint(DEMO.parent / "fp16", tmp_path / "own", PAPER[3], PAPER[2])
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    key = "model.layers.0.self_attn.q_proj.W_q"
    q = open_checkpoint(folder).manifest.of_module("model.layers.0.self_attn.q_proj")
    assert q == Matrix((192, 192), PAPER[2])
    assert read_header(folder / index[key])[key].n_elements == 192 * 192 // 4
