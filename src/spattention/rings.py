"""Former name of `spattention.cache_layout`."""

from __future__ import annotations

from .cache_layout import MAX_ROLLBACK, ring_lengths

SLACK = MAX_ROLLBACK

__all__ = ["SLACK", "ring_lengths"]
