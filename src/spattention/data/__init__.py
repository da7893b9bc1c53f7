"""Text and token files in, packed streams of tokens out."""
