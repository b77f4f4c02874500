"""Damage is found while a checkpoint is read: checksums and finite numbers; `verify` finds all of it."""

import copy
import json
import pickle
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_offload import convert_checkpoint, from_pretrained
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import CheckpointError
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.models.checkpoint import INDEX, open_checkpoint
from mixtral_offload.runtime.verify import hub_hashes, verify
from mixtral_offload.weights.checksums import Ledger, checksum_of, checksum_of_tensors, stated
from mixtral_offload.weights.hqq import PAPER
from mixtral_offload.weights.hub import Record
from mixtral_offload.weights.safetensors_io import NOT_FINITE, Watch, header_bytes, is_finite, read_header
from mixtral_offload.weights.source import DEMO

EXPERT, DENSE = "model-00002-of-00049.safetensors", "model-00049-of-00049.safetensors"  # layer 0, expert 1
PUBLISHED_EXPERT, PUBLISHED_TRUNK = "model-00002-of-00025.safetensors", "model-00025-of-00025.safetensors"
IDS = torch.arange(40, 72)[None]


@pytest.fixture
def demo(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "demo")


def flip(path, key):
    """Change one bit in the middle of a tensor."""
    stored, data = read_header(path)[key], bytearray(path.read_bytes())
    data[stored.offset + stored.n_bytes // 2] ^= 16
    path.write_bytes(data)


def use(folder, **options):
    """Load and run, so that experts on disk are read too."""
    model = from_pretrained(folder, device="cpu", **options)
    try:
        with torch.no_grad():
            return model(IDS).logits
    finally:
        model.offload.cache.close()


STORES = {
    "ram": {"store": "ram", "cache_size": 2},
    "disk": {"store": "disk", "cache_size": 2},
    "slow": {"store": "disk", "cache_size": 2, "throttle": 1e12},
    "resident": {"cache_size": 8},
    "unpacked": {"dequantize_on_load": True},
}


@pytest.mark.parametrize("options", STORES.values(), ids=STORES.keys())
@pytest.mark.parametrize("key", ["w1.W_q", "w2.meta.scale_q", "w3.meta.zero_q"])
def test_one_bit_of_an_expert(demo, options, key):
    use(demo, **options)
    flip(demo / EXPERT, f"model.layers.0.block_sparse_moe.experts.1.{key}")
    with pytest.raises(CheckpointError, match=f"(?s)damaged: its checksum.*{EXPERT}.*expected: .*found: "):
        use(demo, **options)


@pytest.mark.parametrize(
    "key", ["lm_head.weight", "model.norm.weight", "model.layers.3.self_attn.k_proj.W_q"]
)
def test_one_bit_of_the_dense_part(demo, key):
    flip(demo / DENSE, key)
    with pytest.raises(CheckpointError, match=f"damaged: its checksum(?s:.*){DENSE}"):
        from_pretrained(demo, device="cpu", store="disk")


def test_a_name_in_the_header_is_covered_too(demo):
    """A file with two experts' keys exchanged has the same bytes of data."""
    path = demo / DENSE
    data = path.read_bytes()
    names = b"model.layers.0.input_layernorm.weight", b"model.layers.1.input_layernorm.weight"
    first, second = (data.index(name) for name in names)
    swapped = bytearray(data)
    swapped[first : first + len(names[0])], swapped[second : second + len(names[1])] = names[1], names[0]
    path.write_bytes(swapped)
    with pytest.raises(CheckpointError, match="damaged: its checksum"):
        from_pretrained(demo, device="cpu")


def test_a_disk_store_finds_a_fault_each_time_and_good_experts_are_hashed_once(demo, monkeypatch):
    path = demo / EXPERT
    whole = path.read_bytes()
    flip(path, "model.layers.0.block_sparse_moe.experts.1.w1.W_q")
    model = from_pretrained(demo, device="cpu", store="disk", cache_size=2)
    for _ in range(3):
        with pytest.raises(CheckpointError, match="damaged"), torch.no_grad():
            model(IDS)
    model.offload.cache.close()
    path.write_bytes(whole)
    model, seen = from_pretrained(demo, device="cpu", store="disk", cache_size=2), []
    see = Watch.see
    monkeypatch.setattr(
        Watch, "see", lambda watch, start, data: seen.append(len(data)) or see(watch, start, data)
    )
    with torch.no_grad():
        first = model(IDS).logits
        n_seen = sum(seen)
        assert torch.equal(model(IDS).logits, first)
    assert model.offload.stats.misses > len(model.offload.checkpoint.experts)  # so some were read twice
    assert 0 < n_seen == sum(seen) <= sum(of.stat().st_size for of in demo.glob("*.safetensors"))
    model.offload.cache.close()


def test_the_checksum_follows_from_tensors_in_any_order(demo):
    path = demo / DENSE
    header, expected = read_header(path), checksum_of(path)
    assert stated(demo / INDEX)[DENSE] == expected == checksum_of_tensors(path, load_file(path))
    for seed in range(5):
        ledger, tensors = Ledger(path, expected, header.values()), list(header.values())
        random.Random(seed).shuffle(tensors)
        for tensor in tensors:
            assert not ledger.is_done
            data = tensor.read().reshape(-1).view(torch.uint8)
            watch = Watch(replace(tensor, check=ledger))
            for start in range(0, len(data), 100_000):
                watch.see(start, data[start : start + 100_000])
        assert ledger.is_done
    assert header_bytes(path) == path.read_bytes()[: len(header_bytes(path))]


def test_a_file_of_which_parts_are_used_is_read_completely(demo):
    checkpoint = open_checkpoint(demo)
    first = next(iter(checkpoint.dense.values()))
    first.read()
    assert not first.check.is_done
    first.check.finish()
    assert first.check.is_done
    flip(demo / DENSE, "lm_head.weight")
    ledger = next(iter(open_checkpoint(demo).dense.values())).check
    with pytest.raises(CheckpointError, match="damaged"):
        ledger.finish()
    for _ in range(2):  # and it stays wrong
        with pytest.raises(CheckpointError, match="damaged"):
            ledger.begin()


def test_a_checkpoint_can_be_copied(demo):
    checkpoint = open_checkpoint(demo)
    for other in (copy.deepcopy(checkpoint), pickle.loads(pickle.dumps(checkpoint))):
        assert other.dense["lm_head.weight"].check.expected == stated(demo / INDEX)[DENSE]


def test_an_index_with_checksums_of_some_files(demo):
    index = json.loads((demo / INDEX).read_text())
    index["metadata"]["checksums"]["files"].pop(EXPERT)
    (demo / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"no checksum for this file(?s:.*){EXPERT}"):
        open_checkpoint(demo)


@pytest.mark.parametrize(
    "value",
    [None, [], "x", {"algorithm": "md5", "files": {}}, {"algorithm": None}, 3, {"files": {}}],
    ids=repr,
)
def test_checksums_of_another_kind(demo, value):
    index = json.loads((demo / INDEX).read_text())
    index["metadata"]["checksums"] = value
    (demo / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="cannot read the index's checksums"):
        open_checkpoint(demo)


# finite numbers

PARTS = ("meta.meta_scale.scale", "meta.meta_scale.zero", "meta.meta_zero.scale", "meta.meta_zero.zero")
KINDS = {
    **{f"expert {part}": (PUBLISHED_EXPERT, f"w{2}.{part}") for part in PARTS},
    **{f"attention {part}": (PUBLISHED_TRUNK, f"model.layers.1.self_attn.o_proj.{part}") for part in PARTS},
    "norm": (PUBLISHED_TRUNK, "model.layers.2.post_attention_layernorm.weight"),
    "gate": (PUBLISHED_TRUNK, "model.layers.0.block_sparse_moe.gate.weight"),
    "embed_tokens": (PUBLISHED_TRUNK, "model.embed_tokens.weight"),
    "lm_head": (PUBLISHED_TRUNK, "lm_head.weight"),
}


def spoil(folder, name, key, value):
    tensors = load_file(folder / name)
    tensors[key].view(-1)[-1] = value
    save_file(tensors, folder / name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_number_that_is_not_finite(published, tmp_path, kind, value):
    """Regression: garbage answers. Refused by load, by convert and by verify, naming file and tensor."""
    folder = shutil.copytree(published, tmp_path / "spoiled")
    spoil(folder, *kind, value)
    name, key = kind
    for call in (
        lambda: use(folder, store="ram", cache_size=2),
        lambda: use(folder, store="disk", cache_size=2),
        lambda: convert_checkpoint(folder, tmp_path / "target"),
        lambda: convert_checkpoint(folder, tmp_path / "target", PAPER[4], PAPER[8]),
    ):
        with pytest.raises(CheckpointError, match=f"not finite(?s:.*){name}\n  key: {key}\n"):
            call()
    assert not list(tmp_path.glob("target*"))
    with pytest.raises(CheckpointError, match=f"1 faults(?s:.*){name}: {key} is not finite"):
        verify(folder)


@pytest.mark.parametrize("finite", [True, False])
def test_numbers_of_a_folder_with_checksums(demo, finite):
    """If `convert` has tested the numbers, the checksum proves them; else the reader tests them."""
    key = "model.layers.3.input_layernorm.weight"
    spoil(demo, DENSE, key, torch.nan)
    with pytest.raises(CheckpointError, match="damaged: its checksum"):
        from_pretrained(demo, device="cpu")
    index = json.loads((demo / INDEX).read_text())
    entry = index["metadata"]["checksums"]
    assert entry["finite"] is True
    entry["finite"], entry["files"][DENSE] = finite, checksum_of(demo / DENSE)
    (demo / INDEX).write_text(json.dumps(index))
    for read in (verify, *([] if finite else [lambda folder: from_pretrained(folder, device="cpu")])):
        with pytest.raises(CheckpointError, match=f"not finite(?s:.*){key}|{key} is not finite"):
            read(demo)


def test_plain_experts_that_are_not_finite(tmp_path):
    folder = shutil.copytree(DEMO.parent / "fp16", tmp_path / "plain")
    key = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    spoil(folder, "model.safetensors", key, torch.nan)
    for options in STORES.values():
        with pytest.raises(CheckpointError, match=f"not finite(?s:.*){key}"):
            use(folder, **options)


@pytest.mark.parametrize("dtype", [*NOT_FINITE, torch.float64], ids=str)
def test_what_counts_as_finite(dtype):
    most = torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, most, -most, torch.finfo(dtype).tiny, 1.5], dtype=dtype).repeat(7)
    assert is_finite(values) and is_finite(values[:0])
    for wrong in (torch.nan, torch.inf, -torch.inf, -torch.nan):
        for place in (0, 20, len(values) - 1):
            bad = values.clone()
            bad[place] = wrong
            assert not is_finite(bad)


def test_weights_beyond_half_precision_say_which_dtype_holds_them(tmp_path):
    folder = shutil.copytree(DEMO.parent / "fp16", tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    from_pretrained(folder, device="cpu", dtype="float32")
    with pytest.raises(
        CheckpointError, match=r"beyond the range of float16(?s:.*)model.norm.weight(?s:.*)bfloat16"
    ):
        from_pretrained(folder, device="cpu", dtype="float16")


# verify


def test_verify_of_what_ships(capsys):
    assert main(["verify", "demo"]) == 0
    out = capsys.readouterr().out
    assert "49 weight files" in out and "checksums: 49 files" in out and "not proven" not in out
    assert "small files: 4 files are what was written here" in out


def test_verify_names_every_damaged_file(demo, capsys):
    flip(demo / EXPERT, "model.layers.0.block_sparse_moe.experts.1.w1.W_q")
    flip(demo / DENSE, "lm_head.weight")
    assert main(["verify", str(demo)]) == 1
    error = capsys.readouterr().err
    assert (
        "2 faults" in error and f"{EXPERT}: its checksum is" in error and f"{DENSE}: its checksum is" in error
    )


def test_verify_says_what_it_cannot_prove(published, capsys):
    assert main(["verify", str(published)]) == 0
    assert "not proven: 25 weight files" in capsys.readouterr().out


def test_verify_refuses_what_cannot_be_loaded(demo):
    config = json.loads((demo / "config.json").read_text())
    (demo / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="has no place for this tensor"):
        verify(demo)


SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["metadata"]["checksums"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", SMALL)
def test_verify_names_a_small_file_that_was_edited(demo, capsys, name):
    """Weights alone were proven. People edit these on purpose, so that they load."""
    content = json.loads((demo / name).read_text())
    if name != "tokenizer.json":  # which allows no unknown keys
        content |= {"temperature": 0.3} if name == "generation_config.json" else {"added": 1}
    (demo / name).write_text(json.dumps(content, indent=3))
    from_pretrained(demo, device="cpu", cache_size=2).offload.cache.close()
    load_tokenizer(demo)
    assert main(["verify", str(demo)]) == 1
    error = capsys.readouterr().err
    assert "1 faults" in error and f"{name}: was changed: its checksum is" in error
    assert "a small file that was changed on purpose may stay" in error


def test_verify_names_all_small_files_with_the_weights(demo):
    flip(demo / DENSE, "lm_head.weight")
    (demo / "tokenizer.json").unlink()
    (demo / "generation_config.json").unlink()
    (demo / "generation_config.json").mkdir()
    (demo / "tokenizer_config.json").write_bytes((demo / "tokenizer_config.json").read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="4 faults") as caught:
        verify(demo)
    for fault in (
        f"{DENSE}: its checksum is",
        "tokenizer.json: is missing",
        "generation_config.json: cannot be read: not a regular",
        "tokenizer_config.json: was changed",
    ):
        assert fault in str(caught.value)


def test_small_files_that_came_later_are_no_fault(demo):
    for name in ("chat_template.jinja", "notes.txt", "README.md"):
        (demo / name).write_text("new")
    result = verify(demo)
    assert result.small_by_checksum == SMALL and result.small_unproven == ("chat_template.jinja", "notes.txt")
    assert "not proven: 2 small files (chat_template.jinja, notes.txt)" in str(result)


def test_a_folder_of_an_earlier_version_has_no_checksums_of_small_files(demo):
    change_index(demo, lambda checksums: checksums.pop("small_files"))
    (demo / "tokenizer_config.json").write_bytes((demo / "tokenizer_config.json").read_bytes() + b" ")
    from_pretrained(demo, device="cpu", cache_size=2).offload.cache.close()
    result = verify(demo)
    assert len(result.by_checksum) == 49 and not result.unproven and result.small_unproven == SMALL
    assert "not proven: 4 small files (config.json, " in str(result)


@pytest.mark.parametrize("value", [None, [], "x", {"config.json": 3}, {"../config.json": "x"}], ids=repr)
def test_checksums_of_small_files_of_another_kind(demo, value):
    change_index(demo, lambda checksums: checksums.update(small_files=value))
    from_pretrained(demo, device="cpu", cache_size=2).offload.cache.close()
    with pytest.raises(CheckpointError, match=r"cannot read the index's checksums(?s:.*)small_files"):
        verify(demo)


def test_every_writer_of_a_folder_adds_checksums_of_its_small_files(published, tmp_path, offloaded):
    source = shutil.copytree(DEMO.parent / "fp16", tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("a card")
    target = convert_checkpoint(source, tmp_path / "target", PAPER[4])
    expected = (*sorted([*SMALL, "chat_template.jinja"]),)
    assert verify(target).small_by_checksum == expected
    offloaded(target, cache_size=2).save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved").small_by_checksum == expected
    checksums = json.loads((target / INDEX).read_text())["metadata"]["checksums"]
    assert checksums["algorithm"] == "xxh3-128 of header and tensors, 1"  # what earlier versions read
    assert len(checksums["files"]) == 49


@pytest.fixture
def downloaded(published, tmp_path):
    """The published format as a download into a folder leaves it, with the record of the hub's hashes."""
    from mixtral_offload.weights.hub import hash_of

    folder = shutil.copytree(published, tmp_path / "local")
    record = Record("someone/model", "main", folder)
    record.commit = "c" * 40
    for path in folder.iterdir():
        like = "0" * (64 if path.suffix == ".safetensors" else 40)
        record.files[path.name] = [path.stat().st_size, hash_of(path, like)]
    record.save()
    return folder


def test_verify_against_the_hubs_hashes(downloaded):
    result = verify(downloaded)
    assert len(result.by_hub) == len(list(downloaded.glob("*.*"))) - 1 and not result.unproven  # .cache
    flip(downloaded / PUBLISHED_EXPERT, "w1.W_q")
    with pytest.raises(CheckpointError, match=f"1 faults(?s:.*){PUBLISHED_EXPERT}: its hash is"):
        verify(downloaded)


def test_verify_in_the_hubs_cache(downloaded, tmp_path):
    """Other programs leave no record of ours, but the links lead to blobs that are named by their hash."""
    hashes = hub_hashes(downloaded)
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / ("c" * 40),
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, digest in hashes.items():
        shutil.copy(downloaded / name, blobs / digest)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    assert hub_hashes(snapshot) == hashes
    assert not verify(snapshot).unproven
    flip(blobs / hashes[PUBLISHED_TRUNK], "lm_head.weight")
    with pytest.raises(CheckpointError, match=f"1 faults(?s:.*){PUBLISHED_TRUNK}: its hash is"):
        verify(snapshot)


@pytest.mark.parametrize(
    "text", ["", "[]", "[1, 2, 3]", '["c", {"a": 3}, {}]', '["c", {"a": [1, "../x"]}, {}]', "[" * 10**5]
)
def test_a_damaged_record_is_ignored(downloaded, text):
    next((downloaded / ".cache" / "mixtral_offload").glob("*.json")).write_text(text)
    assert hub_hashes(downloaded) == {}
    assert len(verify(downloaded).unproven) == 25
