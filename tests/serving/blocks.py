"""Requests in the blocks of a paged cache, whose every other place holds NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import spattention as spa


@dataclass
class Paged:
    """Requests and their cache.

    Attributes:
        query: `[B, H, Q, D]`.
        texts: key and value of each request, `[1, Hkv, tokens, D]`.
        key, value: `[blocks, block_size, Hkv, D]`, views of one cache.
        block_table: int32 `[B, columns]`; entries of freed blocks name a block of NaN.
        seq_lens: int32 `[B]`.
    """

    query: Tensor
    texts: list[tuple[Tensor, Tensor]]
    key: Tensor
    value: Tensor
    block_table: Tensor
    seq_lens: Tensor

    @property
    def given(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.block_table, self.seq_lens

    def expected(self, pattern: spa.BandPattern, **options: Any) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of each request's tokens side by side, in float64."""
        outs, lses = [], []
        queries = self.query.shape[2]
        for query, (key, value) in zip(self.query.double().split(1), self.texts):
            text = torch.cat([key.double(), value.double()])
            # A query at a negative position sees nothing: keys before the first key.
            text = torch.nn.functional.pad(text, (0, 0, queries, 0))
            key, value = text.split(1)
            out, lse = spa.band_attention(
                query,
                key,
                value,
                pattern,
                key_start=torch.tensor([queries], dtype=torch.int32, device=key.device),
                return_lse=True,
                impl="reference",
                **options,
            )
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)


def paged(
    pattern: spa.BandPattern,
    lengths: list[int],
    block_size: int,
    *,
    key_heads: int,
    queries: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    outer_first: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Paged:
    """Requests of these lengths in random blocks of a cache `[2, blocks, ...]`, or of
    `[blocks, 2, ...]`. Blocks that no head of `pattern` reaches are freed.
    """
    generator, shuffle = torch.Generator().manual_seed(seed), random.Random(seed)
    columns = -(-max([*lengths, 1]) // block_size) + 2
    numbers = list(range(1, 1 + len(lengths) * columns))
    shuffle.shuffle(numbers)
    shape = [2, len(numbers) + 1, block_size, key_heads, head_dim]
    if not outer_first:
        shape[:2] = shape[1::-1]
    cache = torch.full(shape, torch.nan, dtype=dtype)
    key, value = cache.unbind(0 if outer_first else 1)
    table = torch.zeros(len(lengths), columns, dtype=torch.int32)
    texts = []
    for row, length in zip(table, lengths):
        text = torch.randn(2, key_heads, length, head_dim, generator=generator).to(dtype)
        texts.append((text[:1], text[1:]))
        # [queries, length] positions of the keys that some head sees
        padded = pattern.mask(queries, length + queries, query_start=length).any(dim=(0, 1))
        seen = padded[queries:].clone()
        if any(pattern.intervals):
            seen[: pattern.prefix] = True
        for column in range(-(-length // block_size)):
            part = slice(column * block_size, (column + 1) * block_size)
            if bool(seen[part].any()):
                block = row[column] = numbers.pop()
                size = len(seen[part])
                key[block, :size] = text[0, :, part].transpose(0, 1)
                value[block, :size] = text[1, :, part].transpose(0, 1)
    query = torch.randn(len(lengths), queries, pattern.num_heads, head_dim, generator=generator)
    query = query.to(dtype).transpose(1, 2)  # as engines have it
    key, value = cache.to(device).unbind(0 if outer_first else 1)
    texts = [(k.to(device), v.to(device)) for k, v in texts]
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Paged(query.to(device), texts, key, value, table.to(device), seq_lens)
