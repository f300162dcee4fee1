"""Fine-tunes: from a model and a file of examples to an adapter that its engines serve."""
