"""Make a Mixtral-shaped checkpoint of random packed weights, of any size; only packed weights are in memory.

    python benchmarks/synthetic.py FOLDER --layers 4 --hidden 2048 --intermediate 7168 --bits 4

Speed and memory depend on shapes and bytes, not on values: full-size models are measured without a download.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mixtral_offload.weights.hqq import PAPER, Quantization, field_specs


def random_fields(shape: tuple[int, int], quantization: Quantization, generator: torch.Generator) -> dict:
    """Fields of a random matrix [N, K] whose weights have a standard deviation near 0.02."""
    levels = 2**quantization.bits - 1
    step = 0.02 / (levels / 3.5)  # a uniform q has a standard deviation of about levels / 3.5
    fields = {}
    for name, (dtype, dims) in field_specs(shape, quantization).items():
        if name == "weight":
            fields[name] = torch.randn(dims, generator=generator).mul_(0.02).to(dtype)
        elif name == "meta.zero_q":
            fields[name] = torch.full(dims, 128, dtype=dtype)
        elif dtype in (torch.uint8, torch.int32):
            high = 256 if dtype == torch.uint8 else 2**30
            fields[name] = torch.randint(0, high, dims, dtype=dtype, generator=generator)
        else:
            value = {"meta.scale": step, "meta.zero": levels / 2, "meta.meta_scale.scale": step / 128}
            value |= {
                "meta.meta_scale.zero": 0.0,
                "meta.meta_zero.scale": levels / 256,
                "meta.meta_zero.zero": 0.0,
            }
            fields[name] = torch.full(dims, value[name], dtype=dtype)
    return fields


def write_checkpoint(
    folder: Path, config: dict, experts: Quantization, attention: Quantization, seed: int = 0
) -> int:
    """Write one file per expert and a dense part; returns the bytes written."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    layers, n_experts = config["num_hidden_layers"], config["num_local_experts"]
    n_files, weight_map = layers * n_experts + 1, {}

    def save(number, tensors):
        name = f"model-{number:05d}-of-{n_files:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for number in range(n_files - 1):
        prefix = f"model.layers.{number // n_experts}.block_sparse_moe.experts.{number % n_experts}"
        shapes = {"w1": (intermediate, hidden), "w2": (hidden, intermediate), "w3": (intermediate, hidden)}
        fields = {matrix: random_fields(shape, experts, generator) for matrix, shape in shapes.items()}
        save(
            number + 1,
            {f"{prefix}.{m}.{name}": value for m, of in fields.items() for name, value in of.items()},
        )
    save(n_files, dense_tensors(config, attention, generator))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return sum(path.stat().st_size for path in folder.iterdir())


def dense_tensors(config: dict, attention: Quantization, generator: torch.Generator) -> dict:
    """Embeddings, head, norms and routers in fp16; attention quantized."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]

    def plain(*dims):
        return torch.randn(dims, generator=generator).mul_(0.02).half()

    tensors = {"model.embed_tokens.weight": plain(vocab, hidden), "lm_head.weight": plain(vocab, hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden).half()
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = plain(config["num_local_experts"], hidden)
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(hidden).half()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(hidden).half()
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            fields = random_fields((rows, hidden), attention, generator)
            tensors |= {f"{prefix}.self_attn.{name}_proj.{field}": value for field, value in fields.items()}
    return tensors


def mixtral_config(layers=32, hidden=4096, intermediate=14336, n_experts=8, vocab=32000) -> dict:
    """Mixtral-8x7B's configuration, or a smaller one of the same shape."""
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "torch_dtype": "float16",
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128, "num_key_value_heads": max(1, hidden // 512),
        "num_local_experts": n_experts, "num_experts_per_tok": 2, "vocab_size": vocab, "hidden_act": "silu",
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1e6, "sliding_window": None,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in (("layers", 32), ("hidden", 4096), ("intermediate", 14336), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bits", type=int, choices=PAPER, default=2, help="of the experts; attention has 4")
    arguments = parser.parse_args()
    config = mixtral_config(arguments.layers, arguments.hidden, arguments.intermediate, vocab=arguments.vocab)
    n_bytes = write_checkpoint(arguments.folder, config, PAPER[arguments.bits], PAPER[4])
    print(f"{n_bytes / 1e9:.2f} GB written to {arguments.folder}")


if __name__ == "__main__":
    main()
