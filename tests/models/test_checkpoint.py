"""Bad input: one error that names file, key, what was expected and found, and the next step."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from mixtral_offload import convert_checkpoint, from_pretrained
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import CapacityError, CheckpointError, OffloadError, OptionError
from mixtral_offload.models.checkpoint import INDEX, open_checkpoint
from mixtral_offload.models.config_check import stated_experts
from mixtral_offload.runtime.options import dense_bytes, parse_options
from mixtral_offload.weights import safetensors_io as headers
from mixtral_offload.weights.hqq import PAPER, Quantization
from mixtral_offload.weights.safetensors_io import read_header
from mixtral_offload.weights.source import DEMO

EXPERT = "model-00002-of-00025.safetensors"  # layer 0, expert 1
DENSE = "model-00025-of-00025.safetensors"


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / "checkpoint")


def change(path, edit):
    """Rewrite a safetensors file with its tensors edited."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def change_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def error_of(folder, **options) -> str:
    with pytest.raises(OffloadError) as caught:
        from_pretrained(folder, device="cpu", **options)
    return str(caught.value)


def one_of_each(message, path, key):
    """It is one message with one of each line, not one inside another."""
    what, *lines = message.split("\n")
    names = [line.partition(":")[0].strip() for line in lines]
    assert names[:4] == ["file", "key", "expected", "found"] and len({*names}) == len(names), message
    assert ": " not in what and lines[0].endswith(path) and lines[1] == f"  key: {key}", message


def has(message, *parts):
    assert all(part in message for part in parts), message


def test_missing_shard(folder):
    (folder / EXPERT).unlink()
    has(error_of(folder), "1 of 25 files are missing", EXPERT, "next step: download")


@pytest.mark.parametrize("n_left", [0, 5, 1000, -1])
def test_truncated_shard(folder, n_left):
    data = (folder / EXPERT).read_bytes()
    (folder / EXPERT).write_bytes(data[:n_left])
    has(error_of(folder), EXPERT, "found:", "next step: delete this file and download it again")


def test_wrong_dtype_of_an_expert(folder):
    change(folder / EXPERT, lambda tensors: tensors.update({"w1.W_q": tensors["w1.W_q"].to(torch.int8)}))
    has(
        error_of(folder),
        "expert 1 of layer 0 has another layout",
        EXPERT,
        "gate.W_q",
        "torch.uint8",
        "torch.int8",
    )


def test_wrong_shape_of_an_expert(folder):
    change(
        folder / EXPERT, lambda tensors: tensors.update({"w1.W_q": tensors["w1.W_q"][:, :-1].contiguous()})
    )
    has(error_of(folder), "expert 1 of layer 0 has another layout", EXPERT, "gate.W_q", "32768", "32764")


def test_an_expert_of_another_layout(folder, tmp_path):
    other = convert_checkpoint(folder, tmp_path / "other", PAPER[4])
    prefix = "model.layers.0.block_sparse_moe.experts.1."
    tensors = {key.removeprefix(prefix): value for key, value in load_file(other / EXPERT).items()}
    save_file(tensors, folder / EXPERT)
    has(error_of(folder), EXPERT, "W_q", "expected:", "found:", "next step: all experts must share bits")


def test_first_expert_that_fits_no_format(folder):
    change(
        folder / EXPERT.replace("00002", "00001"),
        lambda tensors: tensors.update({"w2.W_q": tensors["w2.W_q"][:, :8].contiguous()}),
    )
    message = error_of(folder)
    has(message, "expert 0 of layer 0", "W_q fits no bit width", "256x512")
    one_of_each(message, EXPERT.replace("00002", "00001"), "expert 0 of layer 0: down.W_q")


@pytest.mark.parametrize(
    "lost, key",
    [
        ("W_q", "W_q and meta.*"),
        ("meta.zero_q", "W_q and meta.*"),
        ("meta.meta_zero.scale", "meta.meta_zero.scale"),
    ],
)
def test_packed_matrices_that_fit_no_format_are_one_message(folder, lost, key):
    name = "model.layers.1.self_attn.o_proj"
    change(folder / DENSE, lambda tensors: tensors.pop(f"{name}.{lost}"))
    change_index(folder, lambda weights: weights.pop(f"{name}.{lost}"))
    one_of_each(error_of(folder), DENSE, f"{name}.{key}")


def test_plain_experts_of_the_wrong_size_are_one_message(tmp_path):
    folder = shutil.copytree(DEMO.parent / "fp16", tmp_path / "plain")
    key = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    change(
        folder / "model.safetensors", lambda tensors: tensors.update({key: tensors[key][:, :8].contiguous()})
    )
    one_of_each(error_of(folder), "model.safetensors", "expert 0 of layer 0: down.weight")


@pytest.mark.parametrize("bound", [{"MOST_TENSORS": 300}, {"MOST_HEADERS_BYTES": 20_000}], ids=str)
def test_headers_that_are_too_large_together(folder, monkeypatch, bound):
    """Only each file's was bounded: many files filled the memory."""
    for name, value in bound.items():
        monkeypatch.setattr(headers, name, value, raising=False)
    has(
        error_of(folder),
        "headers of this checkpoint's files are too large together",
        str(folder),
        "expected: at most",
        "found: ",
        "next step:",
    )


def test_the_bounds_of_headers_admit_every_known_checkpoint():
    """Kimi-K2 at 3 bits: 60 layers, 384 experts, three matrices, up to 8 fields, keys of 90 characters."""
    n_tensors = 60 * 384 * 3 * 8
    assert n_tensors * 4 < headers.MOST_TENSORS and n_tensors * 200 * 4 < headers.MOST_HEADERS_BYTES


def test_missing_index_entry_of_an_expert(folder):
    change_index(folder, lambda weights: weights.pop("model.layers.1.block_sparse_moe.experts.3.w2.W_q"))
    has(error_of(folder), "expert 3 of layer 1", "down.W_q", "no such tensor")


def test_a_whole_expert_missing_from_the_index(folder):
    def drop(weights):
        for key in [key for key in weights if ".1.block_sparse_moe.experts.3." in key]:
            weights.pop(key)

    change_index(folder, drop)
    has(
        error_of(folder),
        INDEX,
        "layer 1, expert 3",
        "8 experts in each layer",
        "next step: download the index again",
    )


def test_a_whole_layer_missing_from_the_index(folder):
    def drop(weights):
        for key in [key for key in weights if ".2.block_sparse_moe.experts." in key]:
            weights.pop(key)

    change_index(folder, drop)
    has(error_of(folder), "expert layers are not the model's", "[0, 1, 2]", "[0, 1]")


def test_missing_index_entry_of_the_dense_part(folder):
    change_index(folder, lambda weights: weights.pop("model.norm.weight"))
    has(error_of(folder), "1 parameters have no value", "model.norm.weight")


def test_an_index_that_names_what_the_file_does_not_hold(folder):
    change(folder / EXPERT, lambda tensors: tensors.pop("w3.meta.zero_q"))
    has(error_of(folder), EXPERT, "experts.1.w3.meta.zero_q", "next step:")
    change(folder / DENSE, lambda tensors: tensors.pop("lm_head.weight"))
    has(error_of(folder), "next step:")


def test_wrong_shape_in_the_dense_part(folder):
    change(folder / DENSE, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7).half()}))
    has(error_of(folder), DENSE, "model.norm.weight", "(256,)", "(7,)")


def test_wrong_attention_in_the_dense_part(folder):
    name = "model.layers.0.self_attn.q_proj.W_q"
    change(folder / DENSE, lambda tensors: tensors.update({name: tensors[name][:1].contiguous()}))
    has(error_of(folder), DENSE, "self_attn.q_proj", "W_q")


def test_a_tensor_that_the_model_has_no_place_for(folder):
    change(folder / DENSE, lambda tensors: tensors.update({"model.extra.weight": torch.ones(7).half()}))
    change_index(folder, lambda weights: weights.update({"model.extra.weight": DENSE}))
    has(error_of(folder), "MixtralForCausalLM has no place", "model.extra.weight", DENSE)


def test_no_folder_no_config_no_weights(tmp_path, folder):
    has(error_of(tmp_path / "nowhere"), "nowhere")
    (tmp_path / "empty").mkdir()
    has(error_of(tmp_path / "empty"), "not a checkpoint folder", "config.json")
    (folder / INDEX).unlink()
    has(error_of(folder), "no weights found", INDEX, "model.safetensors")


def test_broken_config_and_index(folder):
    (folder / INDEX).write_text("{")
    has(error_of(folder), "cannot read the index", INDEX)
    (folder / "config.json").write_text('{"model_type": "nothing-known"}')
    has(error_of(folder), "cannot read the configuration", "config.json")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        "[" * 100_000,
        '{"weight_map": {"a": "../b"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
    ],
)
def test_an_index_of_another_kind(folder, text):
    (folder / INDEX).write_text(text)
    has(error_of(folder), "index", INDEX, "expected:", "found:")


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "[" * 100_000, '{"model_type": "mixtral", "hidden_size": "wide"}', '{"model_type": 3}'],
)
def test_a_configuration_of_another_kind(folder, text):
    (folder / "config.json").write_text(text)
    has(error_of(folder), "cannot read the configuration", "config.json", "next step:")


def test_a_recommendation_of_another_kind_is_none(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"offload": ["cache_size"]}))
    assert open_checkpoint(folder).recommended_cache_size == "auto"


def test_one_file_for_two_experts(folder):
    """Files of the published format do not say whose they are."""

    def twice(weights):
        for key in [key for key in weights if ".0.block_sparse_moe.experts.2." in key]:
            weights[key] = EXPERT

    change_index(folder, twice)
    has(error_of(folder), "to another expert too", EXPERT, "expert 2 of layer 0", "expert 1 of layer 0")


def rewrite_header(path, edit):
    """Change a safetensors file's header, and nothing of its data."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header = edit(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h["w1.W_q"].update(data_offsets=h["w2.W_q"]["data_offsets"]),
        lambda h: h["w1.W_q"].update(data_offsets=[-8, h["w1.W_q"]["data_offsets"][1]]),
        lambda h: h["w1.W_q"].update(data_offsets=[0]),
        lambda h: h["w1.W_q"].update(shape=[1, 2, 3]),
        lambda h: h["w1.W_q"].pop("dtype"),
        lambda h: h.update({"w1.W_q": 3}),
        lambda h: [h],
    ],
    ids=["overlap", "negative", "half", "shape", "no dtype", "number", "list"],
)
def test_a_damaged_header(folder, edit):
    rewrite_header(folder / EXPERT, edit)
    has(error_of(folder), "not a whole safetensors file", EXPERT, "expected:", "found:", "next step: delete")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_must_not_be_read(folder):
    (folder / EXPERT).chmod(0)
    has(error_of(folder), "cannot read the file", EXPERT)


def test_experts_inside_a_nested_model(folder):
    text = json.loads((folder / "config.json").read_text())
    nested = {
        "model_type": "qwen3_vl_moe",
        "text_config": {"model_type": "qwen3_vl_moe_text", "num_experts": 8},
    }
    (folder / "config.json").write_text(json.dumps(nested | {"torch_dtype": text.get("torch_dtype")}))
    has(error_of(folder), "qwen3_vl_moe", "not supported yet")


def test_dense_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 256}))
    has(error_of(folder), "llama is a dense model", "next step: load it with transformers")


@pytest.mark.parametrize(
    "config, name, number",
    [
        (
            {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}},
            "ffn_config.moe_num_experts",
            16,
        ),
        ({"model_type": "aria_text", "moe_num_experts": 8}, "moe_num_experts", 8),
        (
            {"model_type": "aria", "text_config": {"model_type": "aria_text"}},
            "text_config.moe_num_experts",
            8,
        ),
    ],
    ids=["dbrx", "aria_text", "aria"],
)
def test_a_mixture_of_a_family_that_is_not_supported_is_not_called_dense(
    folder, capsys, config, name, number
):
    (folder / "config.json").write_text(json.dumps(config))
    has(
        error_of(folder),
        f"{config['model_type']} is a mixture of experts of a family that is not supported",
        f"key: {name}",
        f"found: {number}",
        "next step: ",
    )
    assert main(["info", "--model", str(folder)]) == 1
    assert "dense" not in capsys.readouterr().err


def test_settings_that_make_no_mixture():
    for settings in (
        {"num_experts": 1},
        {"num_experts": 0},
        {"num_experts_per_tok": 8},
        {"n_shared_experts": 2},
        {"n_experts": None},
        {"moe_num_shared_experts": 2},
        {"num_experts": True},
    ):
        assert stated_experts(settings) is None, settings
    for name in ("num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts", "n_experts"):
        assert stated_experts({"inner": {name: 4}}) == (f"inner.{name}", 4)


def test_family_whose_experts_are_of_another_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]})
    )
    has(error_of(folder), "gpt_oss", "not supported yet")


def test_cache_and_memory_limits(folder):
    has(error_of(folder, cache_size=1), "impossible cache_size", "2 (each token uses 2 experts", "found: 1")
    checkpoint = open_checkpoint(folder)
    rest = dense_bytes(checkpoint, parse_options({"device": "cpu"}))
    slots = len(checkpoint.layers) * checkpoint.layout.n_bytes  # one in each layer
    error = error_of(folder, cache_size=4, store="disk", vram=rest + int(3.5 * slots))
    has(error, "largest cache_size that fits is 3", "next step")
    from_pretrained(folder, device="cpu", cache_size=3, store="disk", vram=rest + int(3.5 * slots))
    with pytest.raises(CapacityError, match="no cache fits"):
        from_pretrained(folder, device="cpu", vram=rest + int(1.5 * slots))


def test_unknown_options(folder):
    has(error_of(folder, cache_sizes=4), "unknown option", "cache_sizes", "did you mean cache_size?")
    has(error_of(folder, dtype="float8"), "unknown dtype")
    with pytest.raises(OptionError, match="unknown device"):
        from_pretrained(folder, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="no such device"):
            from_pretrained(folder, device="cuda:3")


def test_convert_leaves_nothing_half_made(folder, published, tmp_path):
    target = tmp_path / "target"
    (folder / DENSE).write_bytes((folder / DENSE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        convert_checkpoint(folder, target)
    with pytest.raises(OptionError, match="does not divide"):
        convert_checkpoint(published, target, Quantization(4, 48))
    assert not list(tmp_path.glob("target*"))
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        convert_checkpoint(published, folder / "config.json" / "below")
    mine = tmp_path / "target.converting"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="in the way"):
        convert_checkpoint(published, target)
    assert (mine / "notes").read_text() == "mine", "somebody else's folder is left alone"
    target.mkdir()
    with pytest.raises(CheckpointError, match="target exists"):
        convert_checkpoint(published, target)


def test_weights_that_are_not_finite(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    path = tmp_path / "plain" / "model.safetensors"
    for key, bits in (
        ("model.layers.0.block_sparse_moe.experts.1.w2.weight", {"experts": PAPER[8]}),
        ("model.layers.0.self_attn.q_proj.weight", {"attention": PAPER[8]}),
    ):
        good = load_file(path)
        for value in (torch.nan, torch.inf):
            change(path, lambda tensors, key=key, value=value: tensors[key][0].fill_(value))
            with pytest.raises(CheckpointError, match="not finite.*\n.*\n  key: " + key):
                convert_checkpoint(tmp_path / "plain", tmp_path / "target", **bits)
            assert not list(tmp_path.glob("target*"))
        save_file(good, path, metadata={"format": "pt"})


def test_the_dense_part_is_kept_as_stored(published, tmp_path):
    rewritten = convert_checkpoint(published, tmp_path / "ours", PAPER[8])
    before, after = open_checkpoint(published).dense, open_checkpoint(rewritten).dense
    assert before.keys() == after.keys()
    for key, stored in before.items():
        assert stored.dtype == after[key].dtype and torch.equal(stored.read(), after[key].read()), key


def test_headers_are_read_without_the_data(published):
    header = read_header(published / DENSE)
    for key, value in load_file(published / DENSE).items():
        assert torch.equal(header[key].read(), value)
    checkpoint = open_checkpoint(published)
    assert checkpoint.layers == (0, 1, 2) and checkpoint.n_experts == 8 and checkpoint.top_k == 2
