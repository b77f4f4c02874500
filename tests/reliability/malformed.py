"""Kinds of damaged checkpoints: each is refused with an error that names the file, or changes no answer."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mixtral_offload.errors import OffloadError
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.models.checkpoint import INDEX
from mixtral_offload.runtime.build import from_pretrained
from mixtral_offload.weights.source import DEMO

from .result import Result

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published-format"
PLAIN = DEMO.parent / "fp16"
IDS = torch.tensor([[1, 5, 9, 13, 17]])
Damage = Callable[[Path], None]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Kind:
    """One kind of damage.

    Attributes:
        name: What is damaged, and how.
        source: The checkpoint to damage a copy of.
        damage: Damages the copy.
    """

    name: str
    source: Path
    damage: Damage


def edit_json(file: str, **values) -> Damage:
    """Set entries of a JSON file; a value of ... removes the entry."""

    def damage(folder: Path) -> None:
        path = folder / file
        tree = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))

    return damage


def edit_index(change: Callable[[dict], dict]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / INDEX
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(tree | {"weight_map": change(tree["weight_map"])}))

    return damage


def write(file: str, data: bytes) -> Damage:
    return lambda folder: _rewrite(folder / file, data)


def _rewrite(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def edit_tensor(key_part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Change the first tensor whose key contains `key_part` (of several parts: all of them)."""
    parts = key_part.split("*")

    def damage(folder: Path) -> None:
        for path in sorted(folder.glob("model*.safetensors")):
            tensors = load_file(path)
            for key in sorted(tensors):
                full = key if "layers" in key or "." not in key else f"{path.stem} {key}"
                if all(part in full for part in parts):
                    tensors[key] = change(tensors[key]).contiguous()
                    path.unlink()
                    save_file(tensors, path, metadata={"format": "pt"})
                    return
        raise AssertionError(f"no tensor {key_part} in {folder}")

    return damage


def first_file(change: Callable[[bytes], bytes], number: int = 0) -> Damage:
    def damage(folder: Path) -> None:
        path = sorted(folder.glob("model*.safetensors"))[number]
        _rewrite(path, change(path.read_bytes()))

    return damage


def setting(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put a value in the middle of a tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


def flip(data: bytes, at: int) -> bytes:
    damaged = bytearray(data)
    damaged[at] ^= 0x10
    return bytes(damaged)


def _renamed(mapping: dict, old: str, new: str) -> dict:
    return {key.replace(old, new): name for key, name in mapping.items()}


def _swapped_files(mapping: dict) -> dict:
    names = sorted(set(mapping.values()))
    swap = {names[0]: names[1], names[1]: names[0]}
    return {key: swap.get(name, name) for key, name in mapping.items()}


def _without(folder: Path, file: str) -> None:
    (folder / file).unlink()


def _config_folder(folder: Path) -> None:
    _without(folder, "config.json")
    (folder / "config.json").mkdir()


def _foreign_experts(prefix: str) -> Damage:
    """Add experts of a layer that is not the model's, with other weights."""

    def damage(folder: Path) -> None:
        tensors = {}
        for path in sorted(folder.glob("model*.safetensors")):
            for key, value in load_file(path).items():
                if ".layers.0." in key and ".experts." in key:
                    tensors[key.replace("model.layers.0.", prefix)] = torch.full_like(value, 0.01)
        assert tensors
        save_file(tensors, folder / "extra.safetensors", metadata={"format": "pt"})
        if (folder / INDEX).is_file():
            edit_index(lambda mapping: mapping | dict.fromkeys(tensors, "extra.safetensors"))(folder)
        else:
            whole = load_file(folder / "model.safetensors") | tensors
            (folder / "extra.safetensors").unlink()
            (folder / "model.safetensors").unlink()
            save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


CONFIG_VALUES = {
    "head_dim 64": {"head_dim": 64}, "num_key_value_heads 4": {"num_key_value_heads": 4},
    "num_attention_heads 3": {"num_attention_heads": 3},
    "hidden_size 96": {"hidden_size": 96}, "hidden_size 0": {"hidden_size": 0},
    "hidden_size text": {"hidden_size": "wide"},
    "vocab_size half": {"vocab_size": 768}, "vocab_size 0": {"vocab_size": 0},
    "vocab_size huge": {"vocab_size": 2**40},
    "num_hidden_layers 5": {"num_hidden_layers": 5}, "num_hidden_layers 7": {"num_hidden_layers": 7},
    "num_hidden_layers -1": {"num_hidden_layers": -1},
    "num_local_experts 4": {"num_local_experts": 4}, "num_local_experts 9": {"num_local_experts": 9},
    "num_experts_per_tok 0": {"num_experts_per_tok": 0},
    "num_experts_per_tok 9": {"num_experts_per_tok": 9},
    "num_experts_per_tok text": {"num_experts_per_tok": "two"},
    "max_position_embeddings -1": {"max_position_embeddings": -1},
    "rms_norm_eps text": {"rms_norm_eps": "small"}, "hidden_act unknown": {"hidden_act": "smooth"},
    "model_type unknown": {"model_type": "mixtral9"},
    "model_type dense": {"model_type": "llama"}, "no model_type": {"model_type": ...},
    "model_type a list": {"model_type": ["mixtral"]},
    "rope_parameters text": {"rope_parameters": "x"},
    "offload.cache_size 99": {"offload": {"cache_size": 99}}, "offload a list": {"offload": [4]},
    "foreign quantization": {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    },
}  # fmt: skip
DAMAGED_JSON = {
    "empty": b"", "an array": b"[]", "half": b'{"model_type": "mix',
    "not UTF-8": b'{"model_type": "\xff\xfe"}', "nested too deep": b"[" * 100_000, "null": b"null",
}  # fmt: skip
INDEX_CHANGES = {
    "a file outside": lambda m: m | {next(iter(m)): "../x.safetensors"},
    "a number for a file": lambda m: m | {next(iter(m)): 3},
    "a name of 300 characters": lambda m: m | {next(iter(m)): "x" * 300},
    "a missing file": lambda m: m | {next(iter(m)): "model-99999-of-99999.safetensors"},
    "an expert missing": lambda m: {
        k: v for k, v in m.items() if ".layers.1." not in k or ".experts.3." not in k
    },
    "a layer missing": lambda m: {k: v for k, v in m.items() if ".layers.2." not in k},
    "a norm missing": lambda m: {k: v for k, v in m.items() if not k.endswith("model.norm.weight")},
    "a scale missing": lambda m: {
        k: v for k, v in m.items() if not k.endswith("layers.0.self_attn.q_proj.meta.scale_q")
    },
    "two files swapped": _swapped_files,
    "a layer number of 6,000 digits": lambda m: _renamed(m, ".layers.5.", f".layers.{'9' * 6000}."),
    "an expert too many": lambda m: m | {k.replace(".experts.7.", ".experts.8."): v for k, v in m.items()},
    "empty": lambda m: {},
}
FILE_CHANGES = {
    "empty": lambda data: b"", "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1], "one byte more": lambda data: data + b"\0",
    "a header of 2**63 bytes": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    "no header": lambda data: bytes(8) + data[8:],
    "one bit of the header": lambda data: flip(data, 40),
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}  # fmt: skip
TENSOR_CHANGES = {
    "norm of another size": ("model.norm.weight", lambda t: t[:-1]),
    "router transposed": ("layers.1*gate.weight", lambda t: t.T),
    "head of another type": ("lm_head.weight", lambda t: t.to(torch.int8)),
    "router in float64": ("gate.weight", lambda t: t.double()),
    "weights of one expert cut": ("experts.0*w1*W_q", lambda t: t[: len(t) // 2]),
    "weights of one expert as int32": ("experts.0*w1*W_q", lambda t: t.int()),
    "scales of one expert in float32": ("experts.0*w1*meta.meta_scale.scale", lambda t: t.float()),
}  # fmt: skip
PARTS = (
    "experts.0*meta.meta_scale.scale", "experts.0*meta.meta_scale.zero",
    "experts.0*meta.meta_zero.scale", "experts.0*meta.meta_zero.zero",
    "q_proj.meta.meta_scale.scale", "v_proj.meta.meta_zero.scale", "embed_tokens.weight",
    "lm_head.weight", "gate.weight", "input_layernorm.weight", "model.norm.weight",
)  # fmt: skip


def kinds() -> list[Kind]:
    """All kinds, each with a name of its own."""
    found: list[Kind] = []

    def add(name: str, source: Path, damage: Damage) -> None:
        label = {PUBLISHED: "published", DEMO: "4-bit", PLAIN: "16-bit"}[source]
        found.append(Kind(f"{label}: {name}", source, damage))

    config = "config.json"
    for source in (PUBLISHED, DEMO):
        size = json.loads((source / config).read_text())["intermediate_size"]
        for factor in (0.5, 2, 3):
            damage = edit_json(config, intermediate_size=int(size * factor))
            add(f"intermediate_size x {factor}", source, damage)
    for name, values in CONFIG_VALUES.items():
        add(f"config: {name}", DEMO, edit_json(config, **values))
    for name, data in DAMAGED_JSON.items():
        add(f"config.json {name}", DEMO, write(config, data))
        add(f"index {name}", DEMO, write(INDEX, data))
    for name, change in INDEX_CHANGES.items():
        add(f"index: {name}", DEMO, edit_index(change))
    add("index: two experts' files swapped", PUBLISHED, edit_index(_swapped_files))
    add("no config.json", DEMO, lambda folder: _without(folder, config))
    add("no index", DEMO, lambda folder: _without(folder, INDEX))
    add("config.json is a folder", DEMO, _config_folder)
    for name, change in FILE_CHANGES.items():
        add(f"an expert's file: {name}", DEMO, first_file(change))
        add(f"the last file: {name}", DEMO, first_file(change, -1))
    add("one bit of an expert's weights", DEMO, first_file(lambda data: flip(data, len(data) - 100)))
    add("one bit of the dense part", DEMO, first_file(lambda data: flip(data, len(data) - 100), -1))
    for value in (NAN, INF, -INF):
        for part in PARTS:
            add(f"{value} in {part}", DEMO, edit_tensor(part, setting(value)))
        add(f"{value} in an expert's weight", PLAIN, edit_tensor("experts.1.w2", setting(value)))
    for part, change in TENSOR_CHANGES.items():
        add(part, DEMO, edit_tensor(*change))
    for prefix in ("mtp.layers.0.", "model.layers.6.", "vision.layers.0.", "model.mtp.layers.0."):
        add(f"more experts below {prefix}", PLAIN, _foreign_experts(prefix))
    for name, data in {
        "damaged": b'{"eos_token_id": ',
        "an array": b"[1]",
        "an absurd end token": b'{"eos_token_id": "x"}',
        "not UTF-8": b"\xff",
    }.items():
        add(f"generation_config.json {name}", DEMO, write("generation_config.json", data))
    return found


def check_malformed(of: list[Kind] | None = None, log=lambda text: None) -> Result:
    """Try each kind; wrong are foreign exceptions, errors that name no file, and answers that differ."""
    of, wrong, refused, harmless = of or kinds(), [], 0, 0
    expected = {source: _logits(source) for source in (PUBLISHED, DEMO, PLAIN)}
    for kind in of:
        with tempfile.TemporaryDirectory() as parent, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = Path(parent) / "checkpoint"
            shutil.copytree(kind.source, folder)
            kind.damage(folder)
            try:
                same = torch.equal(_logits(folder), expected[kind.source])
                outcome = "" if same else "another answer"
                harmless += same
            except OffloadError as error:
                is_good = str(folder) in str(error) and len(str(error)) < 4000
                outcome = "" if is_good else f"an error without the file: {error}"
                refused += not outcome
            except Exception as error:
                outcome = f"{type(error).__name__}: {str(error)[:200]}"
        if outcome:
            wrong.append(f"{kind.name}: {outcome}")
        log(f"{kind.name}: {outcome or 'ok'}")
    return Result(
        "kinds of damaged checkpoints, each refused by name or harmless",
        len(wrong),
        len(of),
        "kinds",
        details={"refused": refused, "harmless": harmless, "wrong": wrong},
    )


@torch.no_grad()
def _logits(folder: Path) -> torch.Tensor:
    """Logits with experts on disk and in RAM; reads the tokenizer too, as every command does."""
    if (folder / "tokenizer.json").is_file():
        load_tokenizer(folder)
    both = []
    for store in ("ram", "disk"):
        model = from_pretrained(folder, device="cpu", cache_size=2, store=store)
        both.append(model(IDS).logits)
        model.offload.cache.close()
    assert torch.equal(*both)
    return both[0]


if __name__ == "__main__":
    print(check_malformed(log=lambda text: print(text, flush=True)))
