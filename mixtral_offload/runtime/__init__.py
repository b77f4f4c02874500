"""One model on one machine: build it, serve one token, write it back."""
