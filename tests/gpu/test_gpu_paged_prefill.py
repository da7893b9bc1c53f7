"""New tokens of prompts over a paged cache on a GPU, against float64."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest import mock

import pytest
import torch

import spattention as spa
from spattention.impl.triton.hopper import planning
from spattention.serving.paged import (
    Decodes,
    PagedPrefills,
    Step,
    attend,
    page_kernels,
    prefills_of,
)
from spattention.testing import Case, check_error, exact, plain

from .cases import BRAIN, HALF, SINGLE

P = spa.BandPattern
SPAN = 700
GEOMETRIC = P.shared_local(8, SPAN, widths="geometric", local=90, kv_heads=4)
UNIFORM = P.shared_local(8, SPAN, kv_heads=2)
BY_HAND = P((((0, 1), (90, 300)), ((100, 101),), ((4, 9),), (), (), (), ((0, 600),), ()), SPAN)
# dtype, head_dim, key heads, pattern, block size
VARIANTS: dict[str, tuple[torch.dtype, int, int, P, int]] = {
    "blocks of 16": (BRAIN, 128, 4, GEOMETRIC, 16),
    "blocks of 32": (BRAIN, 128, 2, UNIFORM, 32),
    "blocks of 64": (HALF, 128, 4, GEOMETRIC, 64),
    "blocks of 48": (BRAIN, 128, 8, BY_HAND, 48),
    "blocks of 256, prefix": (BRAIN, 128, 4, replace(GEOMETRIC, prefix=4), 256),
    "blocks of 16, prefix": (BRAIN, 128, 2, replace(UNIFORM, prefix=16), 16),
    "long prefix": (BRAIN, 128, 8, replace(BY_HAND, prefix=70), 16),
    "head_dim 64": (BRAIN, 64, 4, GEOMETRIC, 16),
    "head_dim 64, prefix": (HALF, 64, 8, replace(BY_HAND, prefix=3), 32),
    "head_dim 16": (BRAIN, 16, 4, replace(GEOMETRIC, prefix=4), 16),
    "single precision": (SINGLE, 128, 4, replace(GEOMETRIC, prefix=4), 16),
    "an odd head_dim": (BRAIN, 80, 8, BY_HAND, 48),
}


def _compare(name: str, seed: int, sinks: bool) -> None:
    """A step of requests with any past. Blocks and places out of reach hold NaN."""
    dtype, head_dim, key_heads, pattern, block_size = VARIANTS[name]
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    new = [rng.choice((1, 2, 17, 64, rng.randint(1, 900))) for _ in range(rng.choice((1, 4)))]
    past = [rng.choice((0, 16, rng.randint(0, 2 * SPAN))) for _ in new]
    decoded = rng.choice((0, 1))  # requests that come before
    window = max(head[-1][1] for head in pattern.intervals if head)
    columns = -(-max(p + n for p, n in zip(past, new)) // block_size) + 1
    cache = torch.full((len(new) * columns + 1, key_heads, block_size, 2 * head_dim), torch.nan)
    numbers = list(range(1, cache.shape[0]))
    rng.shuffle(numbers)
    table = torch.zeros(len(new), columns, dtype=torch.int32)
    texts = []
    for row, before, count in zip(table, past, new):
        text = torch.randn(key_heads, before + count, 2 * head_dim, generator=generator)
        texts.append(text)
        for column in range(-(-(before + count) // block_size)):
            first, end = column * block_size, (column + 1) * block_size
            if end <= before + 1 - window and first >= pattern.prefix:
                continue  # freed
            row[column] = numbers.pop()
            part = text[:, first:end]
            cache[row[column], :, : part.shape[1]] = part
    total = decoded + sum(new)
    query = torch.randn(total, pattern.num_heads, head_dim, generator=generator).to(dtype).cuda()
    cache, texts = cache.to(dtype).cuda(), [text.to(dtype).cuda() for text in texts]
    offsets = torch.tensor([0, *new]).cumsum(0).int().cuda()
    seq_lens = torch.tensor([p + n for p, n in zip(past, new)]).int().cuda()
    decodes = Decodes(table[:decoded].cuda(), seq_lens[:decoded]) if decoded else None
    longest = int(seq_lens.max())
    prefills = PagedPrefills(decoded, total, offsets, table.cuda(), seq_lens, longest)
    given = torch.linspace(-1, 1, pattern.num_heads, device="cuda") if sinks else None
    out = torch.full_like(query, torch.nan)
    attend(query, cache, Step(decodes, prefills), pattern, out, scale=0.1, sinks=given)
    start = decoded
    for text, count in zip(texts, new):
        rows = slice(start, start + count)
        start += count
        key, value = text[None].split(head_dim, dim=-1)
        found, queries = (each[rows].transpose(0, 1)[None] for each in (out, query))
        case = Case(queries, key, value, pattern, {"sinks": given, "scale": 0.1})
        label = f"{name}, seed {seed}, new {new}, past {past}"
        check_error(label, found, plain(case)["out"], exact(case)["out"])


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_in_place_equals_float64(name: str) -> None:
    """Chunks with a past, of one request or several, behind a request that is decoded."""
    for seed in range(6):
        _compare(name, seed, sinks=seed % 2 == 1)


@pytest.mark.parametrize("name", ["blocks of 16", "blocks of 16, prefix", "head_dim 64"])
def test_portable_kernels_read_blocks_in_place(name: str) -> None:
    """What other GPUs than Hopper run."""
    with mock.patch.object(planning, "TRITON_VERSIONS", ()):
        for seed in range(3):
            _compare(name, seed, sinks=seed % 2 == 1)


def test_prefill_in_place_has_the_same_bits_again() -> None:
    """Beside a busy stream; those of gathered keys within a rounding."""
    torch.manual_seed(0)
    cache = torch.randn(200, 4, 16, 256, device="cuda").to(BRAIN)
    table = torch.randperm(200, device="cuda").int()[None]
    query = torch.randn(1500, 8, 128, device="cuda").to(BRAIN)
    starts, seq_lens = (torch.tensor(each).int().cuda() for each in ([0, 1500], [3100]))
    step = Step(None, PagedPrefills(0, 1500, starts, table, seq_lens, 3100))
    busy, stream = torch.randn(4096, 4096, device="cuda").to(BRAIN), torch.cuda.Stream()
    outs = []
    for _ in range(30):
        with torch.cuda.stream(stream):
            busy @ busy
        out = torch.full_like(query, torch.nan)
        attend(query, cache, step, GEOMETRIC, out, scale=0.1)
        outs.append(out)
    torch.cuda.synchronize()
    assert all(torch.equal(out, outs[0]) for out in outs)
    gathered = Step(None, prefills_of([0, 1500], [3100], table, 16, SPAN))
    out = torch.full_like(query, torch.nan)
    attend(query, cache, gathered, GEOMETRIC, out, scale=0.1)
    torch.testing.assert_close(out, outs[0], rtol=2e-2, atol=2e-3)


def test_small_blocks_are_gathered_for_hopper() -> None:
    """The kernels for Hopper copy 16 tokens at once; other GPUs read any block in place, for few
    queries."""
    query = torch.empty(1, 128, device="cuda", dtype=BRAIN)
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    assert (page_kernels(query, query, 16, 8192) is not None) == is_hopper
    assert (page_kernels(query, query, 1, 8) is None) == is_hopper
    assert page_kernels(query.float(), query.float(), 1, 8) is not None
