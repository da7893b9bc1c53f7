"""Processes that attend shards of sequences, beside one that has all of them; run by torchrun.

Every named pattern, heads and layout of shards, in float64: output, log-sum-exp and all gradients
must equal those of `band_attention` over the whole sequence.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from spattention import BandPattern, band_attention
from spattention.parallel import (
    Shards,
    gathered_attention,
    plan_exchange,
    sharded_attention,
    ulysses_attention,
)

HEADS, HEAD_DIM, TOLERANCE = 4, 8, 1e-12
LENGTHS = (61, 37)


def patterns(span: int) -> dict[str, BandPattern]:
    return {
        "dense": BandPattern.dense(HEADS, span),
        "sliding_window": BandPattern.sliding_window(HEADS, span, 7),
        "exclusive": BandPattern.exclusive(HEADS, span),
        "exclusive_geometric": BandPattern.exclusive(HEADS, span, widths="geometric", first=3),
        "shared_local": BandPattern.shared_local(HEADS, span),
        "shared_local_geometric": BandPattern.shared_local(
            HEADS, span, widths="geometric", first=2, local=5
        ),
        "shared_local_groups": BandPattern.shared_local(HEADS, span, local=3, kv_heads=2),
        "prefix": BandPattern.exclusive(HEADS, span, prefix=3),
        "prefix, groups": BandPattern.shared_local(HEADS, span, local=3, kv_heads=2, prefix=17),
        "gapped": BandPattern.gapped(HEADS, span),
        "local_only": BandPattern.local_only(HEADS, span),
        "a head without keys": BandPattern((((0, 4), (9, 30)), (), ((2, 3),), ((5, 40),)), span),
        "no keys but a prefix": BandPattern((((0, 4),), (), ((2, 3),), ((5, 9),)), span, prefix=9),
    }


def layouts(length: int, ranks: int) -> dict[str, Shards]:
    uneven = [length // 2] + [0] * (ranks - 2) + [length - length // 2]
    if ranks == 1:
        uneven = [length]
    return {
        "contiguous": Shards.contiguous(length, ranks),
        "balanced": Shards.balanced(length, ranks),
        "uneven, some empty": Shards.contiguous(length, ranks, sizes=uneven),
    }


PACKED = {
    "one document": None,
    "packed": ((0, 5, 6, 30), (0, 11)),
    "packed alike": ((0, 17, 33), (0, 17, 33)),
}


def key_start(documents, length: int) -> torch.Tensor | None:
    if documents is None:
        return None
    rows = []
    for starts in documents:
        starts = torch.tensor(starts)
        rows.append(starts[torch.searchsorted(starts, torch.arange(length), right=True) - 1])
    return torch.stack(rows).to(torch.int32)


def tensors(length: int, key_heads: int, with_sinks: bool) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(length + key_heads)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    q, d_out = draw(2, HEADS, length, HEAD_DIM), draw(2, HEADS, length, HEAD_DIM)
    k, v = draw(2, key_heads, length, HEAD_DIM), draw(2, key_heads, length, HEAD_DIM)
    return [q, k, v, draw(HEADS) if with_sinks else None, d_out, draw(2, HEADS, length)]


def results(attend, q, k, v, sinks, d_out, d_lse) -> dict[str, torch.Tensor]:
    inputs = {"query": q, "key": k, "value": v, "sinks": sinks}
    inputs = {name: t.clone().requires_grad_() for name, t in inputs.items() if t is not None}
    q, k, v = (inputs[name] for name in ("query", "key", "value"))
    out, lse = attend(q, k, v, sinks=inputs.get("sinks"), return_lse=True)
    seen = lse.isfinite()
    ((out * d_out).sum() + (lse.masked_fill(~seen, 0.0) * d_lse).sum()).backward()
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {f"d_{name}": t.grad for name, t in inputs.items()}


def check(attend, pattern, shards, key_heads, documents, with_sinks, impl, name) -> None:
    rank, length = dist.get_rank(), shards.length
    given = tensors(length, key_heads, with_sinks)
    starts = key_start(documents, length)

    def whole(q, k, v, **keywords):
        return band_attention(q, k, v, pattern, key_start=starts, **keywords)

    expected = results(whole, *given)
    plan = plan_exchange(pattern, shards, key_heads, documents=documents)

    def part(q, k, v, **keywords):
        return attend(q, k, v, plan, impl=impl, **keywords)

    mine = [t if t is None or t.dim() == 1 else shards.split(t, rank, dim=2) for t in given]
    found = results(part, *mine)
    for key, value in found.items():
        if key == "d_sinks":
            dist.all_reduce(value)
            wanted = expected[key]
        else:
            wanted = shards.split(expected[key], rank, dim=2)
        both = value.isfinite() | wanted.isfinite()
        error = (value - wanted)[both].abs().max().item() if both.any() else 0.0
        assert error <= TOLERANCE, f"{name}: {key} is off by {error} on rank {rank}"


def cases(ranks: int):
    """Everything for the first length; for the second, grouped heads on balanced shards."""
    for length, key_heads in itertools.product(LENGTHS, (4, 2)):
        for chosen in itertools.product(
            patterns(LENGTHS[0]).items(), layouts(length, ranks).items(), PACKED.items()
        ):
            if length == LENGTHS[0] or (key_heads == 2 and chosen[1][0] == "balanced"):
                yield key_heads, chosen


def main() -> None:
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    count = 0
    for key_heads, ((pattern_name, pattern), (layout, shards), (packing, documents)) in cases(
        ranks
    ):
        count += 1
        if ranks == 1 and count % 5:
            continue
        impl = "reference" if count % 5 == 0 else None
        attends = [sharded_attention]
        if count % 4 == 0:
            attends += [ulysses_attention, gathered_attention]
        for attend in attends:
            name = (
                f"{attend.__name__}, {pattern_name}, {layout}, {key_heads} key heads, {packing}, "
                f"{shards.length} tokens, {impl}"
            )
            with_sinks = count % 2 == 0
            check(attend, pattern, shards, key_heads, documents, with_sinks, impl, name)
    if dist.get_rank() == 0:
        print(f"{count} cases equal on {ranks} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
