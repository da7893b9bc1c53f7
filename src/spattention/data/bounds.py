"""Largest sizes of data, importable without the libraries that read them."""

LARGEST_VOCABULARY = 2**20  # entries of a tokenizer; four times the most that language models have
