"""Several GPUs: heads dealt to ranks, and attention over sequences that are spread over ranks.

Nothing here knows a model; `spattention.hf.context_parallel` puts it into one.
"""

from __future__ import annotations

from .deal import deal, deal_heads, deal_pattern, undeal_heads
from .gathered import gathered_attention
from .plan import Plan, plan_exchange
from .sharded import sharded_attention
from .shards import Shards
from .ulysses import ulysses_attention

__all__ = [
    "Plan",
    "Shards",
    "deal",
    "deal_heads",
    "deal_pattern",
    "gathered_attention",
    "plan_exchange",
    "sharded_attention",
    "ulysses_attention",
    "undeal_heads",
]
