"""Attention and its competitors against the hardware's limit, in one run on one GPU."""
