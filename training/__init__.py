"""How the bundled demonstration model is made: corpus, tokenizer, training, export, evaluation."""
