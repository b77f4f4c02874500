"""The domains of the corpus: their facts, their questions and their answers."""
