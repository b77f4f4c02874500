"""Qwen2-MoE, with experts that all tokens share, and Qwen3-MoE. Some of their layers may be dense."""

from mixtral_offload.models.family import Family

FAMILY = Family(("qwen2_moe", "qwen3_moe"), expert_counts=("num_experts",), top_ks=("num_experts_per_tok",))
