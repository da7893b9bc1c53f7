"""Random calls of the operators, each against float64, and again with poison in some tokens.

The suite runs the first few. Any number of others:

    python tests/random_cases.py 3000 --first 1000 --impl blockwise

A seed gives the same case on every machine. Poison is NaN, an infinity or the largest number of the
dtype, in tokens of query, key and value and in the gradients of output and log-sum-exp. Every row
and every token that no poisoned one is seen by, or sees, must be as exact as without.
"""

from __future__ import annotations

import argparse
import math
import random
import traceback
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spattention import BandPattern
from spattention.testing import Case, Tensors, check_case, check_error, exact, noise, plain, run
from spattention.testing.oracle import operands

DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
P = BandPattern


def draw(seed: int) -> Case:
    """One call: shapes, pattern, positions, scale, sinks, memory order and dtype."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    key_heads, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3))
    heads, dim = key_heads * group, rng.choice((1, 3, 8, 16, 33))
    value_dim = dim if rng.random() < 0.7 else rng.choice((1, 5, 16))
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        shape_q, shape_k, documents = _documents(rng)
        options |= documents
        orders = [(0, 1, 2), (1, 0, 2), (2, 1, 0)]
    else:
        batch, longest = rng.choice((1, 1, 2, 3)), rng.choice((4, 40, 150))
        keys = rng.randint(1, longest)
        queries = rng.randint(1, keys)
        if rng.random() < 0.4:
            queries, options["query_start"] = _query_start(rng, batch, keys)
        if rng.random() < 0.5:
            options["key_start"] = _key_start(rng, batch, queries, keys)
        shape_q, shape_k = (batch, heads, queries), (batch, key_heads, keys)
        orders = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (0, 3, 2, 1)]
    packed = "cu_seqlens_q" in options
    if packed:
        shape_q, shape_k = (shape_q[0], heads), (shape_k[0], key_heads)
    dtype = rng.choice(DTYPES)
    order = rng.choice(orders)

    def tensor(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(dtype)
        return (
            values.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])
        )

    query, key = tensor(*shape_q, dim), tensor(*shape_k, dim)
    value = tensor(*shape_k, value_dim)
    if rng.random() < 0.4:
        logits = torch.randn(heads, generator=generator)
        options["sinks"] = logits.to(dtype) if rng.random() < 0.7 else logits
    if rng.random() < 0.5:
        options["scale"] = rng.choice((0.25, -0.7, 1.3, 3.7, 0.0))
    pattern = random_pattern(rng, heads)
    if rng.random() < 0.4:
        prefix = rng.choice((1, 4, rng.randint(0, pattern.span), pattern.span))
        pattern = replace(pattern, prefix=min(prefix, pattern.span))
    return Case(query, key, value, pattern, options)


def _documents(rng: random.Random) -> tuple[tuple[int], tuple[int], dict[str, Any]]:
    each = [rng.choice((0, 1, 2, 7, rng.randint(1, 90))) for _ in range(rng.randint(1, 5))]
    more = [n + rng.choice((0, 0, 1, 30)) for n in each]
    ends = [
        torch.tensor([sum(n[:i]) for i in range(len(n) + 1)], dtype=torch.int32)
        for n in (each, more)
    ]
    longest = {"max_seqlen_q": max(each), "max_seqlen_k": max(more)}
    offsets = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    return (sum(each),), (sum(more),), offsets | longest


def _query_start(rng: random.Random, batch: int, keys: int) -> tuple[int, Any]:
    queries, starts = rng.randint(1, keys + 3), [rng.randint(0, keys + 2) for _ in range(batch)]
    kind = rng.choice(("int", "one", "each"))
    if kind == "int":
        return queries, starts[0]
    index = torch.tensor(starts, dtype=torch.int32)
    return queries, index[0] if kind == "one" else index


def _key_start(rng: random.Random, batch: int, queries: int, keys: int) -> Tensor:
    if rng.random() < 0.4:
        return torch.tensor([rng.randint(-2, keys + 2) for _ in range(batch)], dtype=torch.int32)
    rows = []
    for _ in range(batch):
        cuts = sorted(rng.randint(0, keys) for _ in range(3))
        at = sorted(rng.randint(0, queries) for _ in range(3))
        rows.append(
            [max([c for c, a in zip(cuts, at) if a <= i], default=0) for i in range(queries)]
        )
    return torch.tensor(rows, dtype=torch.int32)


def random_pattern(rng: random.Random, heads: int) -> BandPattern:
    """Any pattern without a prefix, named or of random intervals."""
    span = rng.choice((1, 3, rng.randint(1, 60), rng.randint(20, 200)))
    kind = rng.randrange(7)
    widths = rng.choice(("uniform", "geometric", "equal_work"))
    if kind == 0:
        return P.dense(heads, span)
    if kind == 1:
        return P.sliding_window(heads, span, rng.randint(1, span))
    if kind == 2:
        return P.exclusive(heads, span, widths=widths)
    if kind == 3:
        return P.shared_local(heads, span, widths=widths, local=rng.randint(0, span))
    if kind == 4:
        return rng.choice((P.gapped, P.local_only))(heads, span)
    intervals = []
    for _ in range(heads):
        edges = sorted(rng.sample(range(span + 1), min(span + 1, rng.choice((0, 2, 4)))))
        intervals.append(tuple(zip(edges[::2], edges[1::2])))
    return P(tuple(intervals), span)


class Poison(NamedTuple):
    """A case with poison in it, and what may show it."""

    case: Case
    grads: tuple[Tensor, Tensor]
    rows: Tensor  # bool [B, H, Q]: poisoned, or sees a poisoned token
    rows_backward: Tensor  # the same, with what goes backward
    tokens: Tensor  # bool [B, Hkv, K]: some such row sees the token
    value: float | None  # None for the largest number


def poison(case: Case, grads: tuple[Tensor, Tensor], seed: int) -> Poison:
    """The case and its gradients with poison in a few tokens, or in all that no query sees."""
    rng = random.Random(seed)
    q, _, _, mask, _, _, group, _, d_lse = operands(case, grads)
    assert d_lse is not None
    mask = mask.expand(*q.shape[:3], mask.shape[3])
    keys = torch.zeros_like(mask.any(dim=2)[:, ::group])
    rows, back = torch.zeros_like(mask.any(dim=-1)), torch.zeros_like(mask.any(dim=-1))
    seen = mask.any(dim=2).unflatten(1, (-1, group)).any(dim=2)
    if rng.random() < 0.3:
        keys |= ~seen
    for place in (keys, rows, back):
        for _ in range(rng.choice((0, 1, 2)) if place.numel() else 0):
            place[tuple(rng.randrange(n) for n in place.shape)] = True
    value = rng.choice((float("nan"), float("inf"), -float("inf"), None))

    def spoiled(tensor: Tensor, places: Tensor) -> Tensor:
        if case.packed:
            places = places[0].T if tensor.dim() == 3 else places[0]
        places = places[..., None] if tensor.dim() == places.dim() + 1 else places
        if rng.random() < 0.3 and tensor.dim() == places.dim():  # one channel alone
            places = places & (torch.arange(tensor.shape[-1]) == 0)
        return tensor.masked_fill(places, torch.finfo(tensor.dtype).max if value is None else value)

    parts = rng.choice(((True, True), (True, False), (False, True)))
    key, tensor = case.key, case.value
    key = spoiled(key, keys) if parts[0] else key
    tensor = spoiled(tensor, keys) if parts[1] else tensor
    spoilt = Case(spoiled(case.query, rows), key, tensor, case.pattern, case.options)
    gradients = (spoiled(grads[0], back), spoiled(grads[1], back))
    rows = rows | (mask & keys.repeat_interleave(group, 1)[:, :, None]).any(dim=-1)
    back = back | rows
    tokens = (mask & back[..., None]).any(dim=2).unflatten(1, (-1, group)).any(dim=2)
    return Poison(spoilt, gradients, rows, back, tokens, value)


def gradients(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (*case.query.shape[:-1], case.value.shape[-1])
    rows = shape[:2][::-1] if case.packed else shape[:3]
    d_out, d_lse = (torch.randn(size, generator=generator) for size in (shape, rows))
    return d_out.to(case.query.dtype), d_lse


def check(seed: int, impl: str) -> None:
    """Raise AssertionError unless the case of this seed is right."""
    case = draw(seed)
    check_case(case, impl=impl, seed=seed)
    spoilt, found = check_poisoned(case, seed, impl)
    if spoilt.value is None or math.isnan(spoilt.value):
        return  # one order of summing overflows and another does not; or `check_poisoned` has seen
    same = run(spoilt.case, spoilt.grads, impl="reference")
    for name in ("out", "lse"):
        assert torch.equal(_kind(found[name]), _kind(same[name])), f"{name}: other infinities"


def check_poisoned(case: Case, seed: int, impl: str) -> tuple[Poison, Tensors]:
    """Raise AssertionError unless poison stays where it is seen, and NaN is seen there."""
    grads = gradients(case, seed)
    spoilt = poison(case, grads, seed)
    truth, rough, deviations = exact(case, grads), plain(case, grads), noise(case, grads)
    found = run(spoilt.case, spoilt.grads, impl=impl)
    places = {"out": spoilt.rows, "lse": spoilt.rows, "d_query": spoilt.rows_backward}
    for name in found:
        if name == "d_sinks":
            clean = ~spoilt.rows_backward.any(dim=2).any(dim=0)
        else:
            clean = ~places.get(name, spoilt.tokens)
            if case.packed:
                clean = clean[0] if name == "lse" else clean[0].T
        compared = (each[name][clean] for each in (found, rough, truth))
        check_error(f"poisoned {name}", *compared, deviations[name])
    if spoilt.value is not None and math.isnan(spoilt.value):
        rows = spoilt.rows & operands(case, None).mask.any(dim=-1)
        rows = rows[0].T if case.packed else rows
        assert not found["out"][rows].isfinite().all(dim=-1).any(), "NaN is lost"
    return spoilt, found


def _kind(tensor: Tensor) -> Tensor:
    """0 for a number, else which infinity, or NaN."""
    return tensor.isnan() * 3 + tensor.isposinf() * 2 + tensor.isneginf() * 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case; default 0")
    parser.add_argument("--impl", default="blockwise", help="default blockwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = []
    for seed in range(options.first, options.first + options.count):
        try:
            check(seed, options.impl)
        except Exception:
            failed.append(seed)
            print(f"seed {seed}:")
            traceback.print_exc()
    print(f"{len(failed)} of {options.count} cases failed: {failed}")
    return len(failed) > 0


if __name__ == "__main__":
    raise SystemExit(main())
