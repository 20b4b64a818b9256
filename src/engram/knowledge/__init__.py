"""What a model knows: cloze probing and its scores."""
