"""Impossible configurations, indexes and headers: one message each, before anything is built."""

import json
import shutil
import struct
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import CONFIG_MAPPING

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import CheckpointError, OffloadError, OptionError
from mixtral_offload.models.checkpoint import INDEX, open_checkpoint
from mixtral_offload.models.config_check import check_config, text_config
from mixtral_offload.units import parse_size
from mixtral_offload.weights.source import DEMO

CONFIG = json.loads((DEMO / "config.json").read_text())
DIGITS = int("9" * 400)
ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.fixture
def folder(tmp_path):
    """The shipped model, its large files linked."""
    for path in DEMO.iterdir():
        if path.suffix == ".safetensors":
            (tmp_path / path.name).symlink_to(path.resolve())
        else:
            shutil.copy(path, tmp_path)
    return tmp_path


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)
VALUES = (0, -1, 2**62, DIGITS, 1.5, float("nan"), float("inf"), "x", "", [], {}, True, [0], {"a": 1})


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_are_none(folder, key):
    for value in VALUES:
        if key == "head_dim" and value == 0 and type(value) is int:
            continue  # transformers reads it as: not given
        (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
        began_s = time.perf_counter()
        with pytest.raises(CheckpointError) as caught:
            from_pretrained(folder, device="cpu")
        assert str(folder) in str(caught.value) and len(str(caught.value)) < 1500, (key, value)
        assert time.perf_counter() - began_s < 5


OTHERS = [
    ("num_experts_per_tok", 9),
    ("num_attention_heads", 5),
    ("num_key_value_heads", 4),
    ("num_hidden_layers", 100_000),
    ("rms_norm_eps", -1),
    ("rms_norm_eps", "x"),
    ("rms_norm_eps", 7.0),
    ("hidden_act", "x"),
    ("hidden_act", 3),
    ("rope_parameters", {**ROPE, "rope_theta": "x"}),
    ("rope_parameters", {**ROPE, "rope_theta": 0}),
    ("rope_parameters", {**ROPE, "rope_theta": -1e4}),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": -2}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": "two"}),
    ("rope_parameters", {"rope_type": "no such"}),
    ("rope_parameters", 3),
    ("rope_parameters", "x"),
    ("sliding_window", -1),
    ("sliding_window", "x"),
    ("vocab_size", 7),
    ("vocab_size", 10**6),
    ("hidden_size", 384),
    ("num_hidden_layers", 7),
    ("num_hidden_layers", 5),
    ("num_local_experts", 9),
    ("model_type", "x"),
    ("model_type", None),
    ("model_type", []),
    ("model_type", ""),
    ("dtype", "x"),
    ("tie_word_embeddings", "x"),
    ("head_dim", 64),
    ("layer_types", ["x"] * 6),
    ("transformers_version", DIGITS),
    ("anything", DIGITS),
    ("pad_token_id", 10**9),
]


@pytest.mark.parametrize("key, value", OTHERS, ids=[f"{key}-{str(value)[:20]}" for key, value in OTHERS])
def test_values_that_do_not_go_together(folder, key, value):
    """Refused, or of no effect: never another error, on any command."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    try:
        from_pretrained(folder, device="cpu").offload.cache.close()
    except OffloadError as error:
        assert len(str(error)) < 2000
    else:
        assert key in ("head_dim", "num_key_value_heads", "anything", "layer_types", "pad_token_id", "dtype")
    device = ["--vram", "1GB", "--ram", "1GB", "--link", "12GB"]
    for command in (["info", "--model", str(folder), "--device", "cpu"], ["plan", str(folder), *device]):
        assert main(command) in (0, 1)


@pytest.mark.parametrize(
    "text", ['{"hidden_size": ' + "9" * 5000 + "}", "\ufeff{}", "[" * 10**5, '{"a": ' * 10**5]
)
def test_files_that_are_hardly_json(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("key", [*SIZES, "rms_norm_eps", "rope_parameters", "model_type"])
def test_values_that_are_missing(folder, key):
    config = {name: value for name, value in CONFIG.items() if name != key}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        from_pretrained(folder, device="cpu").offload.cache.close()
    except OffloadError as error:
        assert str(folder) in str(error)


def test_no_family_s_own_values_are_refused():
    """The default configuration of every family with experts in this version of transformers."""
    n_checked = 0
    for name in sorted(set(CONFIG_MAPPING.keys())):
        try:
            config = CONFIG_MAPPING[name]()
            values = vars(text_config(config))
        except Exception:  # it needs values, or another package
            continue
        if values.get("num_attention_heads") and any(
            values.get(n) for n in ("num_local_experts", "num_experts", "n_routed_experts")
        ):
            check_config(config, Path(name))
            n_checked += 1
    assert n_checked > 20


@pytest.mark.parametrize("name", ["musicgen", "lxmert", "clip", "t5", "bert", "whisper"])
def test_models_of_other_kinds_are_one_message(folder, name, capsys):
    try:
        CONFIG_MAPPING[name]().save_pretrained(folder)
    except Exception:  # it needs values
        config = {
            "model_type": name,
            "text_encoder": {"model_type": "t5"},
            "audio_encoder": {"model_type": "encodec"},
            "decoder": {"model_type": "musicgen_decoder"},
        }
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    assert main(["plan", str(folder), "--vram", "1GB", "--ram", "1GB", "--link", "12GB"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


# Indexes


@pytest.mark.parametrize(
    "change",
    [
        {"lm_head.weight": "x" * 300},
        {"lm_head.weight": "ä" * 200},
        {"lm_head.weight": ""},
        {"lm_head.weight": "a\0b"},
        {"lm_head.weight": None},
        {"lm_head.weight": ["x"]},
        {"x" * 5000: "model-00001-of-00049.safetensors"},
        {f"model.layers.{'9' * 6000}.block_sparse_moe.experts.0.w1.W_q": "model-00001-of-00049.safetensors"},
        {f"model.layers.0.block_sparse_moe.experts.{'9' * 900}.w1.W_q": "model-00001-of-00049.safetensors"},
    ],
    ids=range(9),
)
def test_entries_of_an_index_that_no_checkpoint_has(folder, change):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(change)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 3000


def test_an_index_that_is_not_utf_8(folder):
    (folder / INDEX).write_bytes((folder / INDEX).read_bytes().replace(b"lm_head", b"lm_\xff\xfe"))
    with pytest.raises(CheckpointError, match="cannot read the index"):
        open_checkpoint(folder)


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    """Also for a user whom no permission stops."""
    (folder / "loop").symlink_to(folder / "loop")
    for path in (folder / "loop" / "x", folder / ("x" * 300)):
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    monkeypatch.setattr(
        "pathlib.Path.is_dir",
        lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(self))),
    )
    with pytest.raises(CheckpointError, match=r"(?s)cannot read the checkpoint.*Permission denied"):
        open_checkpoint(folder)


def bounded(read, most_s=10.0, most_bytes=700 << 20):
    """What `read` raises; fails where it took too long or too much."""
    before, began_s = psutil.Process().memory_info().rss, time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read()
    assert time.perf_counter() - began_s < most_s and psutil.Process().memory_info().rss - before < most_bytes
    return str(caught.value)


def test_an_index_of_more_than_a_million_keys(folder):
    with (folder / INDEX).open("w") as file:
        file.write('{"weight_map": {')
        for number in range(1_100_000):
            file.write(f'"k{number}": "a",')
        file.write('"z": "a"}}')
    assert "at most 1,000,000 keys" in bounded(lambda: open_checkpoint(folder))


def test_files_far_larger_than_they_can_be(folder):
    """Sparse: nothing of them is read."""
    for name in (INDEX, "config.json", "tokenizer.json"):
        shutil.copy(DEMO / name, folder / "kept")
        with (folder / name).open("r+b") as file:
            file.truncate(1 << 40)
        read = load_tokenizer if name == "tokenizer.json" else open_checkpoint
        assert "too large" in bounded(lambda read=read: read(folder), 2.0, 50 << 20)
        shutil.copy(folder / "kept", folder / name)


def test_a_header_of_a_million_keys(folder):
    name = "model-00049-of-00049.safetensors"
    (folder / name).unlink()
    entry = '"k%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % number for number in range(1_000_000)) + "}").encode()
    (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "the header is too large" in bounded(lambda: open_checkpoint(folder), 5.0, 200 << 20)


# Tokenizers and sizes


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_makes_texts_explode(folder, part):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    tokenizer[part] = {"type": "Sequence", f"{part}s": [step] * 40}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "replacements make any text too long" in bounded(lambda: load_tokenizer(folder), 5.0, 100 << 20)
    tokenizer[part][f"{part}s"] = [step] * 2
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    load_tokenizer(folder)


@pytest.mark.parametrize(
    "size", [float("nan"), float("inf"), 10**400, "9" * 400, "9" * 400 + "GB", "1e5", "nan", "", None, [1]]
)
def test_sizes_that_no_memory_has(size):
    with pytest.raises(OptionError, match="cannot read a size"):
        parse_size(size)
    if size is not None:
        with pytest.raises(OptionError):
            from_pretrained(device="cpu", vram=size)


def test_a_default_device_of_the_caller_changes_nothing():
    with torch.device("meta"):
        model = from_pretrained(device="cpu", cache_size=2)
    ids = torch.arange(5, 25).view(1, -1)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, from_pretrained(device="cpu", cache_size=2)(ids).logits)


@pytest.mark.parametrize("options", [{"prefetch": 9}, {"prefetch": 2, "look_ahead": 6}], ids=str)
def test_more_predictions_than_a_model_can_need_are_refused(options):
    with pytest.raises(OptionError, match="impossible predictions"):
        from_pretrained(device="cpu", cache_size=2, **options)
    from_pretrained(device="cpu", cache_size=2, prefetch=8, look_ahead=5)
