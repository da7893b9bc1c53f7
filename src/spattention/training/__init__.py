"""Setting up an existing engine, Transformers' Trainer, and what is watched while it runs."""
