"""What a model is, from its configuration and modules alone: sizes, the KV cache."""
