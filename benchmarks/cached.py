"""Time per generated token on the CPU over the length of the text before it.

    python -m benchmarks.cached --output benchmarks/results/cached_cpu_DATE.json

One query, batch 1, 16 heads, head_dim 64, span 4096, float32, one thread, medians: a store that
keeps what the bands reach, `band_attention` with a cache that keeps every key, and dense attention
over all keys. The first two must agree before they are timed. Give it the machine alone.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from spattention import BandPattern, BandStore, band_attention, band_attention_cached
from spattention.benchmarking.results import write_rows
from spattention.benchmarking.timing import wall_seconds

HEADS, HEAD_DIM, SPAN = 16, 64, 4096
LENGTHS = (1024, 4096, 16384, 65536)
PATTERNS = {
    "exclusive": BandPattern.exclusive(HEADS, SPAN),
    "shared_local": BandPattern.shared_local(HEADS, SPAN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        key, value = (torch.randn(1, HEADS, length + 1, HEAD_DIM) for _ in range(2))
        query = torch.randn(1, HEADS, 1, HEAD_DIM)
        dense = torch.nn.functional.scaled_dot_product_attention
        rows.append(
            {
                "attention": "dense, all keys",
                "length": length,
                "milliseconds": 1e3
                * wall_seconds(lambda: dense(query, key, value), options.repeats, warm_up=3),  # noqa: B023
            }
        )
        for name, pattern in PATTERNS.items():
            store = BandStore(pattern, batch_size=1, num_key_heads=HEADS, head_dim=HEAD_DIM)
            for at in range(0, length, 1024):
                part = slice(at, min(at + 1024, length))
                store.append(key[:, :, part], value[:, :, part])
            last = key[:, :, length:], value[:, :, length:]

            step = partial(band_attention_cached, query, store, pattern, *last)
            whole = partial(band_attention, query, key, value, pattern)
            torch.testing.assert_close(step(), whole(), rtol=1e-4, atol=1e-5)
            for kind, call in (("store", step), ("all keys", whole)):
                rows.append(
                    {
                        "attention": f"{name}, {kind}",
                        "length": length,
                        "milliseconds": 1e3 * wall_seconds(call, options.repeats, warm_up=3),
                    }
                )
    table = Table("attention", "tokens before", "ms")
    for row in rows:
        table.add_row(row["attention"], str(row["length"]), f"{row['milliseconds']:.2f}")
    Console().print(table)
    settings = {"heads": HEADS, "head_dim": HEAD_DIM, "span": SPAN, "repeats": options.repeats}
    write_rows(options.output, "one query on the CPU over the length of its text", settings, rows)


if __name__ == "__main__":
    main()
