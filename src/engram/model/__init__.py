"""One language model: loading it, text into tokens, asking it, what it writes."""
