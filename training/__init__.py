"""How the shipped model is made: corpus, tokenizer, training, export, evaluation."""
