"""Random lives of a `BandStore`, each call against `band_attention` over the whole text in float64.

Chunks of any size with padding and documents in any place, queries with their keys and after them,
then tokens taken back, sequences moved, another rollback, or another text. The suite runs the first
few. Any number of others:

    python tests/random_stores.py 3000 --first 1000
"""

from __future__ import annotations

import argparse
import random
import traceback
from dataclasses import replace
from typing import Any

import torch
from random_cases import random_pattern
from torch import Tensor

import spattention as spa


class RingKernels:
    """What `impl.triton` computes for a store, in PyTorch: the rings and the prefixes."""

    MAX_QUERIES = 16

    @staticmethod
    def attend_rings(
        query: Tensor, keys: Tensor, values: Tensor, pattern: spa.BandPattern, **given: Any
    ) -> tuple[Tensor, Tensor]:
        offsets, lengths = given["offsets"].tolist(), given["lengths"].tolist()
        prefixes, held = given["prefixes"].tolist(), given["documents"][:, -1].tolist()
        group = pattern.num_heads // len(offsets)
        out = query.new_zeros(*query.shape[:3], values.shape[-1])
        lse = query.new_full(query.shape[:3], -torch.inf)
        for b, h, i in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
            at = int(given["position"][b]) - query.shape[2] + i
            first = given["key_start"]
            first = 0 if first is None else int(first[b] if first.dim() == 1 else first[b, i])
            offset, length = offsets[h // group], lengths[h // group]
            seen = (at - d for near, far in pattern.intervals[h] for d in range(near, far))
            slots = [offset + j % length for j in seen if j >= first + pattern.prefix]
            if pattern.intervals[h]:
                places = range(min(pattern.prefix, at - first + 1))
                is_held, start = first == held[b], prefixes[h // group]
                slots += [start + n if is_held else offset + (first + n) % length for n in places]
            if slots:
                scores = keys[b, slots] @ query[b, h, i] * given["scale"]
                out[b, h, i] = scores.softmax(0) @ values[b, slots]
                lse[b, h, i] = scores.logsumexp(0)
        return spa.merge([(out, lse)], sinks=given["sinks"])

    @staticmethod
    def write_rings(key: Tensor, value: Tensor, **given: Any) -> None:
        heads = zip(given["offsets"].tolist(), given["lengths"].tolist())
        for h, (offset, length) in enumerate(heads):
            for b in range(key.shape[0]):
                for i in range(max(0, key.shape[2] - length), key.shape[2]):
                    slot = offset + (int(given["position"][b]) + i) % length
                    given["keys"][b, slot], given["values"][b, slot] = key[b, h, i], value[b, h, i]


class Life:
    """One store and all that it was given.

    Attributes:
        dtype: of the store; float64 is compared exactly, any other as kernels round.
        texts: per sequence a list of tokens `(query, key, value, key_start)`.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rng = self.rng
        key_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2))
        heads, batch = key_heads * group, rng.choice((1, 2, 3))
        pattern = random_pattern(rng, heads)
        prefix = rng.choice((0, 1, 3, rng.randint(0, pattern.span), pattern.span))
        self.pattern = replace(pattern, prefix=min(prefix, pattern.span))
        self.store = spa.BandStore(
            self.pattern,
            batch,
            key_heads,
            4,
            value_dim=4 if dtype != torch.float64 else rng.choice((3, 4)),
            max_rollback=rng.choice((0, 1, 4, 9)),
            capacity=rng.choice((None, None, 1, 7, 40)),
            dtype=dtype,
        )
        self.texts: list[list[tuple[Any, ...]]] = [[] for _ in range(batch)]
        self.starts = [rng.choice((0, 0, rng.randint(0, 12))) for _ in range(batch)]
        self.documents, self.padding = rng.random() < 0.5, rng.random() < 0.4
        self.sinks = self._random(heads) if rng.random() < 0.4 else None

    def step(self) -> None:
        """Append some tokens, with or without their queries, and compare."""
        rng, store, batch = self.rng, self.store, len(self.texts)
        new = rng.choice((1, 1, 1, 2, rng.randint(1, 8), rng.randint(1, 60)))
        dims = store.keys.shape[2], store.keys.shape[2], store.values.shape[2]
        heads = self.pattern.num_heads, store.num_key_heads, store.num_key_heads
        query, key, value = (self._random(batch, h, new, d) for h, d in zip(heads, dims))
        mask = None
        if self.padding and rng.random() < 0.7:
            mask = torch.rand(batch, new, generator=self.generator) < 0.7
        key_start = self._key_start(new, mask)
        for b, text in enumerate(self.texts):
            for i in range(new):
                if mask is None or mask[b, i]:
                    token = query[b, :, i], key[b, :, i], value[b, :, i], int(key_start[b, i])
                    text.append(token)
        given: Tensor | None = key_start
        if not self.documents and not self.padding and rng.random() < 0.5:
            given = torch.tensor(self.starts, dtype=torch.int32)
        if not self.documents and not any(self.starts) and rng.random() < 0.7:
            given = None
        room = store.max_rollback + 1 - int(store.rolled_back.max())
        if mask is None and new <= room and rng.random() < 0.4:
            store.append(key, value, key_start=given)
            tokens: tuple[Tensor, ...] = ()
        else:
            tokens = key, value
        out, lse = spa.band_attention_cached(
            query,
            store,
            self.pattern,
            *tokens,
            key_start=given,
            mask=mask,
            sinks=self.sinks,
            return_lse=True,
        )
        for b, text in enumerate(self.texts):
            real = slice(None) if mask is None else mask[b]
            self._compare(text, out[b][:, real], lse[b][:, real])

    def change(self) -> None:
        """Take tokens back, move sequences, or start another text."""
        rng, store, batch = self.rng, self.store, len(self.texts)
        kind, behind = rng.random(), int(store.rolled_back.max())
        most = min(store.max_rollback - behind, min(map(len, self.texts)))
        if kind < 0.4 and not self.padding and most > 0:
            back = rng.randint(1, most)
            store.crop(back)
            self.texts = [text[:-back] for text in self.texts]
        elif kind < 0.5:
            self._move([rng.randrange(batch) for _ in range(batch)], store.reorder)
        elif kind < 0.6:
            self._move([rng.randrange(batch) for _ in range(rng.randint(1, 3))], store.select)
        elif kind < 0.7 and not self.padding:
            store.set_max_rollback(rng.choice((0, 2, 5, 12)))
        elif kind < 0.72:
            store.reset()
            self.texts = [[] for _ in self.texts]

    def _move(self, rows: list[int], change: Any) -> None:
        change(torch.tensor(rows))
        self.texts = [list(self.texts[row]) for row in rows]
        self.starts = [self.starts[row] for row in rows]

    def _key_start(self, new: int, mask: Tensor | None) -> Tensor:
        rows = []
        for b, text in enumerate(self.texts):
            position, start, row = len(text), text[-1][3] if text else self.starts[b], []
            for i in range(new):
                if mask is None or mask[b, i]:
                    if self.documents and position >= start and self.rng.random() < 0.15:
                        start = position
                    position += 1
                row.append(start)
            rows.append(row)
        return torch.tensor(rows, dtype=torch.int32)

    def _compare(self, text: list[tuple[Any, ...]], out: Tensor, lse: Tensor) -> None:
        if not out.shape[1]:
            return
        query, key, value = (torch.stack([t[part] for t in text], 1)[None] for part in range(3))
        whole = spa.band_attention(
            query[:, :, -out.shape[1] :],
            key,
            value,
            self.pattern,
            sinks=self.sinks,
            key_start=torch.tensor([[token[3] for token in text[-out.shape[1] :]]]).int(),
            return_lse=True,
            impl="reference",
        )
        for found, wanted in zip((out, lse), whole):
            error = 1e-9 if self.dtype == torch.float64 else 2e-5
            torch.testing.assert_close(found, wanted[0], rtol=error, atol=error)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype)


def check(seed: int) -> None:
    """Raise AssertionError unless the life of this seed is right."""
    life = Life(seed)
    for _ in range(life.rng.randint(1, 9)):
        life.step()
        life.change()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int, help="number of stores")
    parser.add_argument("--first", type=int, default=0, help="seed of the first store; default 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = []
    for seed in range(options.first, options.first + options.count):
        try:
            check(seed)
        except Exception:
            failed.append(seed)
            print(f"seed {seed}:")
            traceback.print_exc()
    print(f"{len(failed)} of {options.count} stores failed: {failed}")
    return len(failed) > 0


if __name__ == "__main__":
    raise SystemExit(main())
