"""What a model is: its family, configuration, stored tensors, sizes and KV cache."""
