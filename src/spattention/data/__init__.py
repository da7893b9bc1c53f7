"""Text and token files in, streams of tokens out."""
