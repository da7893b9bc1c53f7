"""Former names of `spattention.data.token_file`."""

from __future__ import annotations

from .token_file import SUFFIX, described_end_of_text
from .token_file import read_token_file as read_packed
from .token_file import write_token_file as write_packed

__all__ = ["SUFFIX", "described_end_of_text", "read_packed", "write_packed"]
