"""Make a checkpoint of random packed weights, of any size; only packed weights are in memory.

    python benchmarks/synthetic.py FOLDER --layers 4 --hidden 2048 --intermediate 7168 --bits 4

Speed and memory depend on shapes and bytes, not on values: full-size models are measured without a download.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from shapes import CONFIGS, SIZES, Shape

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
    shape = Shape.of(config)
    n_experts, n_files, weight_map = shape.n_experts, shape.layers * shape.n_experts + 1, {}

    def save(number, tensors):
        name = f"model-{number:05d}-of-{n_files:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for number in range(n_files - 1):
        prefix = f"model.layers.{number // n_experts}.{shape.block}.experts.{number % n_experts}"
        fields = {name: random_fields(size, experts, generator) for name, size in shape.expert().items()}
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
    shape = Shape.of(config)
    hidden, vocab = shape.hidden, shape.vocab

    def plain(*dims):
        return torch.randn(dims, generator=generator).mul_(0.02).half()

    tensors = {"model.embed_tokens.weight": plain(vocab, hidden), "lm_head.weight": plain(vocab, hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden).half()
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.{shape.block}.gate.weight"] = plain(shape.n_experts, hidden)
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(hidden).half()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(hidden).half()
        for name in ("q_norm", "k_norm") if shape.has_head_norms else ():
            tensors[f"{prefix}.self_attn.{name}.weight"] = torch.ones(shape.head_dim).half()
        for name, size in shape.attention().items():
            fields = random_fields(size, attention, generator)
            tensors |= {f"{prefix}.self_attn.{name}.{field}": value for field, value in fields.items()}
    return tensors


def config_of(arguments: argparse.Namespace) -> dict:
    """The configuration that a command line asks for; sets the sizes that it leaves out."""
    for name, size in zip(("layers", "hidden", "intermediate", "vocab"), SIZES[arguments.family]):
        if getattr(arguments, name) is None:
            setattr(arguments, name, size)
    make, of = CONFIGS[arguments.family], arguments
    return make(of.layers, of.hidden, of.intermediate, vocab=of.vocab)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=SIZES, default="mixtral")
    for name in ("layers", "hidden", "intermediate", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="default: the family's")
    parser.add_argument("--bits", type=int, choices=PAPER, default=2, help="of the experts; attention has 4")
    arguments = parser.parse_args()
    config = config_of(arguments)
    n_bytes = write_checkpoint(arguments.folder, config, PAPER[arguments.bits], PAPER[4])
    print(f"{n_bytes / 1e9:.2f} GB written to {arguments.folder}")


if __name__ == "__main__":
    main()
