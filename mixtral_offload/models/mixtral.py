"""Mixtral. transformers itself renames `block_sparse_moe` in stored keys."""

from __future__ import annotations

from typing import Any

from mixtral_offload.models.family import Family

#: repositories with its tokenizer: the first one is gated, the second is an open copy
MIXTRAL_8X7B = ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Xenova/mistral-tokenizer-v1")


class Mixtral(Family):
    """The family of the published Mixtral-8x7B checkpoint, which has no tokenizer."""

    def tokenizers(self, config: Any) -> tuple[str, ...]:
        """Return the repositories if the vocabulary is that of the published checkpoint."""
        return MIXTRAL_8X7B if config.vocab_size == 32000 else ()


FAMILY = Mixtral(("mixtral",), expert_counts=("num_local_experts",), top_ks=("num_experts_per_tok",))
