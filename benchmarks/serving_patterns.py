"""The model shape and the patterns of the serving benchmarks."""

from __future__ import annotations

import spattention as spa

from .serving_memory import LONGEST

HEADS, KV_HEADS, HEAD_DIM, LOCAL = 32, 8, 128, 2048
PATTERNS = {
    "dense": spa.BandPattern.dense(HEADS, LONGEST),
    "geometric": spa.BandPattern.shared_local(
        HEADS, LONGEST, widths="geometric", kv_heads=KV_HEADS, local=LOCAL
    ),
    "uniform": spa.BandPattern.shared_local(HEADS, LONGEST, kv_heads=KV_HEADS, local=LOCAL),
}
