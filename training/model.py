"""The shape of the demonstration model, and a faster forward of its experts for training."""

import torch
from transformers import MixtralConfig

from training import tokenizer

LONG = 1024


def make_config(tok) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=tokenizer.VOCABULARY, hidden_size=192, intermediate_size=256, num_hidden_layers=6, num_local_experts=8,
        num_experts_per_tok=2, num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, sliding_window=None, tie_word_embeddings=False,
        router_aux_loss_coef=0.01, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip


def experts_forward(self, hidden, index, weight):
    """The experts' sum as transformers computes it; unbinding the weights spares a zero-filled gradient per expert."""
    order = index.flatten().argsort()
    counts = index.flatten().bincount(minlength=self.num_experts).tolist()
    token = order // index.shape[1]
    parts = []
    for states, gate_up, down in zip(
        hidden[token].split(counts), self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
    ):
        gate, up = torch.nn.functional.linear(states, gate_up).chunk(2, dim=-1)
        parts.append(torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down))
    summed = torch.cat(parts) * weight.flatten()[order, None]
    return torch.zeros_like(hidden).index_add(0, token, summed.to(hidden.dtype))
