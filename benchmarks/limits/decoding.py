"""Cases of decoding: one query of each request over 65,536 tokens, dense and by bands.

A measurement replays a graph of calls on different requests, as a model has layers, so that a call
finds none of its keys in the cache of the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import spattention as spa
from spattention.benchmarking.competitors import import_below, window_sizes
from spattention.benchmarking.flex import block_mask
from spattention.benchmarking.timing import copy_speed
from spattention.testing import Case as Checked
from spattention.testing import exact

from ..serving_replay import SHAPES, TOKEN, layouts, per_call, seen_keys, texts
from .cases import DENSE, FLEX, OURS, PAGED, Case
from .check import ERRORS

ROUNDS = 3  # of the calls of a graph
MOST_CALLS = 8  # in a round
MOST_ELEMENTS = 2**31 - 1  # of a tensor of FlexAttention's kernel for few queries
Attend = Callable[[slice], torch.Tensor]  # output of some requests


@dataclass
class Decoding:
    """Cases of decoding.

    Args:
        device: of all tensors.
    """

    device: torch.device

    @cached_property
    def copy(self) -> float:
        """Rate of a copy in TB/s."""
        return copy_speed()

    @cached_property
    def flex(self) -> Any:
        """FlexAttention, compiled for each shape."""
        from torch.nn.attention.flex_attention import flex_attention

        return torch.compile(flex_attention, dynamic=False)

    @torch.no_grad()
    def prepare(self, case: Case) -> dict[str, Any]:
        """Compile and check a case; the facts of its row."""
        pattern, query, cache = self.inputs(case)
        attend = self.call(case, pattern, query, cache)
        some = parts_of(case.batch)[-1]
        rows = sorted({some.start, some.stop - 1})
        text = in_pages(cache, rows) if case.by == PAGED else cache[:, rows]
        key, value = text.transpose(2, 3)
        out = attend(some)[[row - some.start for row in rows]]
        return {"errors": {"out": self.check(out, pattern, query[rows], key, value)}}

    def inputs(self, case: Case) -> tuple[spa.BandPattern, torch.Tensor, torch.Tensor]:
        """Pattern, queries, and keys and values of all requests."""
        shape = next(
            each
            for each in SHAPES.values()
            if (each[0].num_heads, each[1]) == (case.heads, case.key_heads)
        )
        query, cache = texts(*shape)
        if case.mask == "dense":
            return spa.BandPattern.dense(case.heads, case.length), query, cache
        return shape[0], query, cache

    def call(
        self, case: Case, pattern: spa.BandPattern, query: torch.Tensor, cache: torch.Tensor
    ) -> Attend:
        """The call of a case, for some of the requests."""
        if case.by in (OURS, PAGED):
            return layouts(pattern, query, cache)["paged" if case.by == PAGED else "contiguous"]
        key, value = cache.transpose(2, 3)  # [16, Hkv, tokens, D]
        if case.by in DENSE:
            backend = SDPBackend.CUDNN_ATTENTION
            if case.by != DENSE[0]:
                backend = SDPBackend.FLASH_ATTENTION

            def dense(some: slice) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(
                        query[some], key[some], value[some], enable_gqa=True
                    )

            return dense
        if case.by == FLEX:
            return self.by_flex(case, pattern, query, key, value)
        return by_flash_sparse(pattern, query, cache)

    def by_flex(
        self,
        case: Case,
        pattern: spa.BandPattern,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> Attend:
        """FlexAttention on the mask of a pattern."""
        mask = block_mask(pattern, case.length, self.device, queries=1)
        most = max(1, MOST_ELEMENTS // key[0].numel())
        grouped = case.heads != case.key_heads

        def attend(some: slice) -> torch.Tensor:
            parts = zip(*(tensor[some].split(most) for tensor in (query, key, value)))
            outs = [self.flex(*part, block_mask=mask, enable_gqa=grouped) for part in parts]
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        return attend

    def check(
        self,
        out: torch.Tensor,
        pattern: spa.BandPattern,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> float:
        """Relative error of the first, middle and last head; RuntimeError if too large."""
        heads, key_heads = query.shape[1], key.shape[1]
        off = norm = 0.0
        for entry in range(len(query)):
            for head in {0, heads // 2, heads - 1}:
                one = slice(entry, entry + 1), slice(head, head + 1)
                first = head * key_heads // heads
                keys = slice(entry, entry + 1), slice(first, first + 1)
                case = Checked(query[one], key[keys], value[keys], pattern.heads(head, head + 1))
                truth = exact(case)["out"].double()
                off += float((out[one].double() - truth).square().sum())
                norm += float(truth.square().sum())
        error = (off / norm) ** 0.5
        if not error < ERRORS["out"]:
            raise RuntimeError(f"out is off by {error:.4f} of its norm")
        return round(error, 5)

    @torch.no_grad()
    def time(self, case: Case) -> dict[str, Any]:
        """Milliseconds of a call, and what limits them."""
        pattern, query, cache = self.inputs(case)
        attend = self.call(case, pattern, query, cache)
        calls = [lambda some=some: attend(some) for some in parts_of(case.batch)]
        found: dict[str, Any] = {"forward": round(per_call(calls, ROUNDS) / 1e3, 5)}
        if case.by != OURS:
            return found
        moved = case.batch * seen_keys(pattern, case.key_heads) * TOKEN
        return found | {"work": [{"flops": 0, "moved": moved}], "copy": round(self.copy, 3)}

    def release(self) -> None:
        """Nothing is kept between cases."""


def by_flash_sparse(pattern: spa.BandPattern, query: torch.Tensor, cache: torch.Tensor) -> Attend:
    """flash-sparse-attn on the mask of a pattern. It does not split keys on Hopper."""
    module = import_below("flash_sparse_attn", "ops.cute")
    sizes = window_sizes(pattern, cache.shape[3])
    windows = torch.tensor(sizes, device=query.device, dtype=torch.int32)
    queries = query.transpose(1, 2).contiguous()  # [16, 1, H, D]

    def attend(some: slice) -> torch.Tensor:
        key, value = cache[0][some], cache[1][some]
        out = module.flash_attn_func(queries[some], key, value, window_sizes=windows, is_local=True)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)

    return attend


def in_pages(cache: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Keys and values of some requests as the paged calls of `layouts` read them: blocks of 16
    tokens in random order.
    """
    blocks = cache.flatten(1, 2).unflatten(1, (-1, 16))
    order = torch.randperm(blocks.shape[1], generator=torch.Generator().manual_seed(0))
    table = order.view(cache.shape[1], -1).to(cache.device)
    return torch.stack([blocks[:, table[row]].flatten(1, 2) for row in rows], dim=1)


def parts_of(requests: int) -> list[slice]:
    """Requests of each call."""
    return [slice(first, first + requests) for first in range(0, 16, requests)][:MOST_CALLS]
