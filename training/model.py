"""The shipped model's shape, and for training a loss of its routing and a faster forward of its experts."""

import math

import torch
from transformers import MixtralConfig

from training import tokenizer

LONG = 1024


def make_config(tok) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=tokenizer.VOCABULARY,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=6,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.01,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def experts_forward(self, hidden, index, weight):
    """Sum the experts as transformers does; unbinding avoids a zero-filled gradient per expert."""
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


def routing_loss(router_logits, domains, count: int, targets: float):
    """Compute a loss that asks for even use of the experts, and for domains that keep to some of them.

    The two entropies are those of the mutual information between task and expert in Mod-Squad (arXiv
    2212.08066, section 3.3), over the routers' softmax with every domain weighing the same. H(expert) is
    pushed up to log(experts); H(expert | domain) down, but not below log(targets), so that a domain keeps
    several experts.

    Args:
        router_logits: Per layer [tokens, experts].
        domains: [tokens], -1 where none.

    Returns:
        The loss, a mean over layers in nats, and each layer's mutual information in nats, rounded.
    """
    member = torch.nn.functional.one_hot(domains + 1, count + 1)[:, 1:].float()  # [tokens, domains]
    sizes = member.sum(0)
    member = (member / sizes.clamp_min(1))[:, sizes > 0]
    total, found = 0.0, []
    for logits in router_logits:
        of_domain = member.T @ logits.float().softmax(-1)  # [domains, experts]
        entropy = torch.special.entr(of_domain.mean(0)).sum()
        given = torch.special.entr(of_domain).sum(-1).mean()
        total = total + math.log(logits.shape[-1]) - entropy + (given - math.log(targets)).clamp_min(0)
        found.append(round((entropy - given).item(), 3))
    return total / len(router_logits), found
