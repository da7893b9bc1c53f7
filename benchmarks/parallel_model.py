"""Context parallelism on paper: bytes per link, balance and memory, to 1,024 GPUs, 1 M tokens.

    python -m benchmarks.parallel_model --measured parallel_h100.json --output results.json

Bandwidth between two GPUs and the kernels' speed come from a results file of `benchmarks.parallel`;
between nodes a bandwidth is assumed. For one layer's attention, forward and backward, four ways are
counted:

    ring        dense ring attention: keys and values go round all ranks
    all-gather  every rank receives all keys and values, and its bands skip what they do not see
    ulysses     ranks exchange tokens for heads; needs as many heads as ranks
    ours        `spattention.parallel.plan_exchange`: what the heads' bands reach, counted exactly

Bytes are those that the busiest rank receives over its link in a forward and a backward pass, keys,
values and their gradients in half precision. Compute time is pairs times FLOP per pair over the
kernels' speed; a fully overlapped step takes the longer of both. The measured bandwidth is that of
packing, exchange and unpacking together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from spattention import BandPattern
from spattention.benchmarking.results import write_rows
from spattention.parallel import Shards, deal, plan_exchange
from spattention.parallel.deal import group_work
from spattention.parallel.rank_calls import rank_plan

HALF = 2  # bytes
FLOP_PER_PAIR = 14  # times head_dim: 4 forward, 10 backward


def work(pattern: BandPattern, shards: Shards) -> list[int]:
    """Attended pairs of each rank's queries."""

    def pairs(length: int) -> int:
        return sum(pattern.pairs(length))

    known = {edge: pairs(edge) for rank in shards.ranges for each in rank for edge in each}
    return [sum(known[b] - known[a] for a, b in ranges) for ranges in shards.ranges]


def ways(options: argparse.Namespace, length: int, ranks: int) -> list[dict[str, Any]]:
    """One row per way."""
    heads, groups, width = options.heads, options.key_heads, options.head_dim
    bands = BandPattern.shared_local(heads, length, widths="geometric")
    dense = BandPattern.dense(heads, length)
    shards = Shards.balanced(length, ranks)
    token = groups * width * 2 * HALF  # a key and a value of all heads
    mine = length // ranks
    rows = []

    def row(name: str, received: float, held: float, busiest: float, total: float) -> None:
        """Bytes received in both passes, keys held at once, pairs of the busiest rank and all."""
        compute = busiest * FLOP_PER_PAIR * width / options.flops
        inside = ranks <= options.node
        link = received / (options.bandwidth if inside else options.between_nodes)
        rows.append(
            {
                "way": name,
                "length": length,
                "ranks": ranks,
                "gigabytes_received": received / 1e9,
                "link_ms": 1e3 * link,
                "compute_ms": 1e3 * compute,
                "hidden": link <= compute,
                "step_ms": 1e3 * max(link, compute),
                "balance": total / ranks / busiest if busiest else 1.0,
                "key_memory_gib": held / 2**30,
            }
        )

    everything = (length - mine) * token
    dense_work, band_work = work(dense, shards), work(bands, shards)
    # Forward: keys and values. Backward: these again, and their gradients.
    row("ring, dense", 3 * everything, 2 * mine * token, max(dense_work), sum(dense_work))
    row("all-gather", 2 * everything, length * token, max(band_work), sum(band_work))
    if heads % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0):
        whole = max(groups, ranks)
        work_by_head = group_work(bands, whole)
        order, size = deal(bands, ranks, whole), whole // ranks
        shares = [
            sum(work_by_head[g] for g in order[r * size : (r + 1) * size]) for r in range(ranks)
        ]
        # Query, key, value and output of other ranks' tokens, and the gradients of all four.
        per_token = 2 * (2 * heads + 2 * whole) // ranks * width * HALF
        held = length * (whole // ranks) * width * 2 * HALF
        row("ulysses", (length - mine) * per_token, held, max(shares), sum(shares))
    for layout in ("balanced", "contiguous"):
        shards = getattr(Shards, layout)(length, ranks)
        plan = plan_exchange(bands, shards, groups)
        fetched = [plan.fetched_keys(rank) for rank in range(ranks)]
        given = [0] * ranks
        for buffers in plan.buffers:
            for buffer in buffers:
                for source, piece in buffer.sources:
                    span = piece.keys[1] - piece.keys[0]
                    given[source] += (piece.heads[1] - piece.heads[0]) * span
        size = width * 2 * HALF
        # Forward: what a rank lacks. Backward: the gradients of what it gave.
        received = max(a + b for a, b in zip(fetched, given)) * size
        band_work = work(bands, shards)
        # Tables, and the keys of its own, of the rank that fetches most.
        tables = rank_plan(plan, fetched.index(max(fetched))).tables
        held = sum((t.heads[1] - t.heads[0]) * t.length for t in tables) * size + mine * token
        row(f"ours, {layout}", received, held, max(band_work), sum(band_work))
        rows[-1]["keys_fetched_over_all"] = max(fetched) / groups / length
    return rows


def measured(path: Path) -> tuple[float, float]:
    """Bytes per second into a GPU, and useful FLOP per second of one GPU's attention."""
    content = json.loads(path.read_text())
    rows, settings = content["rows"], content["settings"]
    ours = next(row for row in rows if row.get("way") == "ours, balanced")
    # Forward a rank receives what it fetches, backward gradients of what others fetched.
    received = 1e6 * sum(ours["megabytes_fetched"])
    single = next(row for row in rows if row.get("way") == "one GPU")
    bands = BandPattern.shared_local(settings["heads"], settings["length"], widths="geometric")
    pairs = sum(bands.pairs(settings["length"]))
    flop = pairs * FLOP_PER_PAIR * settings["head_dim"]
    return received / (1e-3 * ours["exchange_alone_ms"]), flop / (1e-3 * single["total_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 1048576])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 16, 64, 256, 1024])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--measured", type=Path, required=True, help="of benchmarks.parallel")
    parser.add_argument("--node", type=int, default=8, help="GPUs that the measured link joins")
    parser.add_argument("--between-nodes", type=float, default=50e9, help="bytes/s per GPU")
    options = parser.parse_args()
    options.bandwidth, options.flops = measured(options.measured)
    rows = [
        row
        for length in options.lengths
        for ranks in options.ranks
        for row in ways(options, length, ranks)
    ]
    for row in rows:
        print(
            f"{row['length']:8} tokens {row['ranks']:5} GPUs  {row['way']:17} "
            f"{row['gigabytes_received']:8.3f} GB  link {row['link_ms']:8.2f} ms  "
            f"compute {row['compute_ms']:8.2f} ms  balance {row['balance']:.2f}  "
            f"keys {row['key_memory_gib']:6.2f} GiB"
        )
    if options.output:
        settings = {k: v for k, v in vars(options).items() if k != "output"}
        settings["measured"] = options.measured.name
        what = "context parallelism of one layer's attention, counted"
        write_rows(options.output, what, settings, rows)


if __name__ == "__main__":
    main()
