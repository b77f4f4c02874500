"""llama.cpp on random weights of the same shape.

Beside 2-bit experts: Q2_K experts, Q4_K attention, embeddings and head in fp16. Beside 4-bit ones: its
Q4_K_M, which has 6 bits for the head, and in half of the layers for values and the experts' last matrix. Its
routing cannot be forced and is random, as random weights route; that matters little if all is in memory.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import numpy as np
from contestants import MemoryPeak, Task, log, speeds
from shapes import Shape

#: quantization type -> bytes of a block of 256 weights, and offset in it -> fp16 d and dmin (ggml-common.h).
#: A weight is d * scale * q - dmin * min, with 4-bit (Q4_K: 6-bit) scales and mins, deviating by 0.02
BLOCKS = {
    "Q2_K": (84, {80: 0.0020, 82: 0.0030}),
    "Q4_K": (144, {0: 0.0001, 2: 0.00075}),
    "Q6_K": (210, {208: 0.000015}),  # d * scale * (q - 32), with 8-bit scales
}
RANDOM_BYTES = 32 << 20


def missing(bits: int) -> str | None:
    """Say what this needs: packages that are not installed, or another width; None if nothing is missing."""
    if bits not in (2, 4):
        return f"no type of llama.cpp is compared with {bits} bits"
    absent = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def file_bytes(config: dict) -> int:
    """Compute the file's size, without its header."""
    return sum(_n_bytes(shape, kind) for shape, kind in tensor_shapes(config).values())


def tensor_shapes(config: dict) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name -> (shape, outermost first; type) of every tensor, in llama.cpp's names."""
    of, is_medium = Shape.of(config), config["bits"] == 4  # Q4_K_M
    shapes = {"token_embd.weight": ((of.vocab, of.hidden), "Q4_K" if is_medium else "F16")}
    shapes["output.weight"] = ((of.vocab, of.hidden), "Q6_K" if is_medium else "F16")
    shapes["output_norm.weight"] = ((of.hidden,), "F32")
    for layer in range(of.layers):
        block, more = f"blk.{layer}", "Q6_K" if is_medium and _has_more_bits(layer, of.layers) else "Q4_K"
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"{block}.{name}.weight"] = ((of.hidden,), "F32")
        for name in ("attn_q_norm", "attn_k_norm") if of.has_head_norms else ():
            shapes[f"{block}.{name}.weight"] = ((of.head_dim,), "F32")
        for name, (size, kind) in zip(
            ("attn_q", "attn_k", "attn_v", "attn_output"),
            zip(of.attention().values(), ("Q4_K", "Q4_K", more, "Q4_K")),
        ):
            shapes[f"{block}.{name}.weight"] = (size, kind)
        shapes[f"{block}.ffn_gate_inp.weight"] = ((of.n_experts, of.hidden), "F32")
        kinds = ("Q4_K", "Q4_K", more) if is_medium else ("Q2_K",) * 3
        names = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
        for name, size, kind in zip(names, of.expert().values(), kinds):
            shapes[f"{block}.{name}.weight"] = ((of.n_experts, *size), kind)
    return shapes


def _has_more_bits(layer: int, layers: int) -> bool:
    """Which layers' matrices have 6 bits in Q4_K_M (llama.cpp, src/llama-quant.cpp, use_more_bits)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2


def random_block(kind: str, random: np.random.Generator, n_bytes: int = RANDOM_BYTES) -> np.ndarray:
    """Make whole blocks of random weights of standard deviation near 0.02: uint8, at most n_bytes."""
    if kind in BLOCKS:
        size, factors = BLOCKS[kind]
        blocks = random.integers(0, 256, (max(n_bytes // size, 1), size), np.uint8)
        for at, value in factors.items():
            blocks[:, at : at + 2] = np.array([value], np.float16).view(np.uint8)
        return blocks.reshape(-1)
    dtype = {"F16": np.float16, "F32": np.float32}[kind]
    values = random.standard_normal(n_bytes // np.dtype(dtype).itemsize, np.float32) * 0.02
    return values.astype(dtype).view(np.uint8)


def write_gguf(path: Path, config: dict, seed: int = 0) -> int:
    """Write a GGUF file of this shape and return its bytes; random bytes repeat every 32 MB."""
    import gguf

    of, random = Shape.of(config), np.random.default_rng(seed)
    writer = gguf.GGUFWriter(None, {"mixtral": "llama", "qwen3_moe": "qwen3moe"}[config["model_type"]])
    writer.add_block_count(of.layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(of.head_dim)
    writer.add_key_length(of.head_dim)
    writer.add_value_length(of.head_dim)
    writer.add_expert_count(of.n_experts)
    writer.add_expert_used_count(of.top_k)
    writer.add_expert_feed_forward_length(of.intermediate)
    writer.add_vocab_size(of.vocab)
    writer.add_tokenizer_model("none")  # token numbers go in and come out: no text is needed
    sizes = {}
    for name, (shape, kind) in tensor_shapes(config).items():
        sizes[name] = _n_bytes(shape, kind), kind
        writer.add_tensor_info(
            name, shape, np.dtype(np.int8), sizes[name][0], raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random_bytes = {kind: random_block(kind, random) for kind in ("F16", "F32", *BLOCKS)}
    ones = np.ones(of.hidden, np.float32).view(np.uint8)
    file = writer.fout[0]
    for name, (n_bytes, kind) in sizes.items():
        writer.write_padding(file, file.tell())
        source = ones if name.endswith("norm.weight") else random_bytes[kind]
        for start in range(0, n_bytes, len(source)):
            file.write(source[: n_bytes - start].data)
        writer.write_padding(file, n_bytes)
    writer.close()
    return path.stat().st_size


def _n_bytes(shape: tuple[int, ...], kind: str) -> int:
    n = int(np.prod(shape))
    if kind not in BLOCKS:
        return n * {"F16": 2, "F32": 4}[kind]
    if shape[-1] % 256:
        raise ValueError(f"llama.cpp's {kind} needs rows of a multiple of 256 weights, not {shape[-1]}")
    return n // 256 * BLOCKS[kind][0]


def run_llama_cpp(task: Task) -> dict:
    """Evaluate a prompt of random tokens, then one token at a time.

    On CUDA, all layers go to the GPU if the binding was built for it. The file is memory-mapped, llama.cpp's
    default: its pages do not count as anonymous memory, but are needed (see peak_rss_bytes).
    """
    import llama_cpp

    with MemoryPeak() as memory:
        on_gpu = not task.device.startswith("cpu") and llama_cpp.llama_supports_gpu_offload()
        began = time.perf_counter()
        model = llama_cpp.Llama(
            task.files,
            n_ctx=task.prompt + task.tokens + 8,
            n_threads=task.threads,
            n_threads_batch=task.threads,
            n_gpu_layers=-1 if on_gpu else 0,
            verbose=False,
        )
        built_s = time.perf_counter() - began
        ids = np.random.default_rng(0).integers(3, model.n_vocab(), task.prompt + task.tokens).tolist()
        model.eval(ids[:1])  # warm up
        model.reset()
        seconds = []
        for begin, end in [(0, task.prompt), *((n, n + 1) for n in range(task.prompt, len(ids)))]:
            began = time.perf_counter()
            model.eval(ids[begin:end])
            llama_cpp.llama_synchronize(model.ctx)
            seconds.append(time.perf_counter() - began)
            log(f"pass {len(seconds)}: {seconds[-1]:.3f} s")
    result = speeds(seconds, task.prompt) | memory.result() | {"build_s": built_s, "on_gpu": on_gpu}
    model.close()
    return result | {"llama_cpp": llama_cpp.__version__, "bytes": Path(task.files).stat().st_size}
