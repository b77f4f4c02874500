"""The shapes of synthetic models, Mixtral-8x7B's and Qwen3-30B-A3B's, and the names of their tensors."""

from __future__ import annotations

from dataclasses import dataclass

#: what `fullsize.py` offers: layers, hidden, intermediate size of an expert, vocabulary
SIZES = {"mixtral": (32, 4096, 14336, 32000), "qwen3_moe": (48, 2048, 768, 151936)}


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


def qwen3_config(layers=48, hidden=2048, intermediate=768, n_experts=128, vocab=151936) -> dict:
    """Qwen3-30B-A3B's configuration, or a smaller one of the same shape."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "float16",
        "hidden_size": hidden, "intermediate_size": 8 * intermediate, "moe_intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "head_dim": 128,
        "num_key_value_heads": max(1, hidden // 512), "num_experts": n_experts, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": vocab,
        "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1e6,
        "attention_bias": False, "sliding_window": None, "use_sliding_window": False,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


CONFIGS = {"mixtral": mixtral_config, "qwen3_moe": qwen3_config}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and names of its tensors, whatever its configuration calls them.

    Attributes:
        queries, keys: Rows of the attention's projections of queries, and of keys or values.
        block: Name of a layer's experts and router.
        matrices: An expert's matrices in its checkpoint: gate, up, down.
        has_head_norms: Queries and keys have a norm of their own, of head_dim numbers.
    """

    layers: int
    hidden: int
    intermediate: int
    n_experts: int
    top_k: int
    vocab: int
    head_dim: int
    queries: int
    keys: int
    block: str
    matrices: tuple[str, str, str]
    has_head_norms: bool

    @classmethod
    def of(cls, config: dict) -> Shape:
        is_mixtral = config["model_type"] == "mixtral"
        n_heads = config["num_attention_heads"]
        head_dim = config.get("head_dim", config["hidden_size"] // n_heads)
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size" if is_mixtral else "moe_intermediate_size"],
            n_experts=config["num_local_experts" if is_mixtral else "num_experts"],
            top_k=config["num_experts_per_tok"],
            vocab=config["vocab_size"],
            head_dim=head_dim,
            queries=n_heads * head_dim,
            keys=config["num_key_value_heads"] * head_dim,
            block="block_sparse_moe" if is_mixtral else "mlp",
            matrices=("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj"),
            has_head_norms=not is_mixtral,
        )

    def expert(self) -> dict[str, tuple[int, int]]:
        """The shapes of an expert's matrices by their names in its checkpoint."""
        shape = self.intermediate, self.hidden
        return dict(zip(self.matrices, (shape, shape, shape[::-1])))

    def attention(self) -> dict[str, tuple[int, int]]:
        """The shapes of a layer's projections."""
        hidden = self.hidden
        return {
            "q_proj": (self.queries, hidden),
            "k_proj": (self.keys, hidden),
            "v_proj": (self.keys, hidden),
            "o_proj": (hidden, self.queries),
        }

    @property
    def n_parameters(self) -> int:
        """Of the whole model: 46.7 billion for Mixtral-8x7B, 30.5 for Qwen3-30B-A3B."""
        matrices = self.n_experts * 3 * self.intermediate * self.hidden
        attention = sum(rows * columns for rows, columns in self.attention().values())
        small = (self.n_experts + 2) * self.hidden + 2 * self.head_dim * self.has_head_norms
        return self.layers * (matrices + attention + small) + (2 * self.vocab + 1) * self.hidden
