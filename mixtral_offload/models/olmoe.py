"""OLMoE."""

from mixtral_offload.models.family import Family

FAMILY = Family(("olmoe",), expert_counts=("num_experts",), top_ks=("num_experts_per_tok",))
