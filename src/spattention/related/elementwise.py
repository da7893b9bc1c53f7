"""Element-wise attention, derived from the abstract of arXiv:2501.05730v1 (G. Feng, 2025): the
paper's equations, constants and code could not be read.

Certain are: similarity is the squared distance of query and key channel by channel, its cross term
`exp(q k)` becomes a Taylor polynomial of order t, training takes O(t L D) and generation runs as a
recurrence of O(t D). From there, for each channel by itself and with a scale c:

    y_i = sum_j exp(-c (q_i - k_j)^2) v_j / sum_j exp(-c (q_i - k_j)^2)
        ~ sum_n a_n(i) A_n(i) / sum_n a_n(i) B_n(i),   n = 0 .. t

    a_n(i) = (2 c q_i)^n / n!,   A_n(i) = sum_{j <= i} k_j^n w_j v_j,   w_j = exp(-c k_j^2),

and B_n alike without v; `exp(-c q_i^2)` cancels. The past is 2 (t + 1) numbers per channel. A band
`[near, far)` is a difference of two prefix sums, so its cost does not depend on its width; those
sums are float64, as their difference loses what they have in common. Generation in bands keeps the
keys and values that the bands reach.

Chosen here: c = 1/2, with which the cross term is the abstract's `exp(q k)`. Even orders alone,
since odd polynomials become negative, and with them the denominator. Queries and keys pass
`bound tanh(x / bound)`: beyond a few units no polynomial is near the exponential, and `w_j`
underflows. At low orders this is a kernel of its own rather than an approximation, and is trained
as such.

The model's scale of scores has no part in this. Its rotary positions stay in queries and keys. They
are not relative within a channel, and without them the past would have no order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..bands import BandPattern, in_bands
from ..baselines.adapter import check_integers
from ..baselines.state import State
from .method import Related, check_bands, check_number, tokens_kept

MOST_DECAY = 64.0  # c bound^2: exp(-64) is a normal float32 number


@dataclass(frozen=True)
class Elementwise(Related):
    """Softmax of squared distances in every channel, by a polynomial.

    Args:
        num_heads: query heads.
        span: longest input, in tokens.
        bands: of the heads; None: all of the past.
        order: of the polynomial t, even.
        scale: c, of squared distances.
        bound: of queries and keys, in their own unit; `scale * bound**2` is at most 64.
    """

    kind: ClassVar[str] = "elementwise"
    keeps_state: ClassVar[bool] = True

    bands: BandPattern | None = None
    order: int = 6
    scale: float = 0.5
    bound: float = 4.0

    def __post_init__(self) -> None:
        check_bands(self, self.bands)
        check_integers(self.kind, order=(self.order, 0, 64))
        if self.order % 2:
            raise ValueError(
                f"`order` of `elementwise` must be even, as odd polynomials become negative, got "
                f"{self.order}"
            )
        check_number(self.kind, scale=(self.scale, 0.0, 1e3), bound=(self.bound, 0.0, 1e3))
        if self.scale * self.bound**2 > MOST_DECAY:
            raise ValueError(
                f"`scale * bound**2` of `elementwise` must be at most {MOST_DECAY:g}, got "
                f"{self.scale * self.bound**2:g}"
            )

    def layer(self, index: int, num_layers: int) -> ChannelAttention:
        return ChannelAttention(self)

    def pairs(self, seq_len: int, num_layers: int) -> int:
        """Work in place of pairs: the moments that each query reads, `order + 1` per prefix sum."""
        sums = self.num_heads
        if self.bands is not None:
            sums = 2 * sum(len(head) for head in self.bands.intervals)
        return sums * seq_len * (self.order + 1)


class ChannelAttention:
    """The attention of one layer.

    Args:
        method: its polynomial and bands.
    """

    def __init__(self, method: Elementwise) -> None:
        self.method = method
        self.bands = method.bands

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `LayerAttention.attend`; `scale` is not used."""
        return self._attend(query, key, value, None)[0]

    def attend_after(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See `StatefulAttention`. A state holds `moments [B, 2 (order + 1), H, 1, D]`, or the
        `key` and `value` of the tokens that bands reach. `scale` is not used.
        """
        if self.bands is None:
            out, last = self._attend(query, key, value, state.tensors.get("moments"))
            state.keep(moments=last)
            return out
        if state.tensors:
            key = torch.cat([state.tensors["key"], key], dim=2)
            value = torch.cat([state.tensors["value"], value], dim=2)
        out = self._attend(query, key, value, None)[0]
        drop = max(0, key.shape[2] - (tokens_kept(self.bands) or 0))
        state.keep(key=key[:, :, drop:].clone(), value=value[:, :, drop:].clone())
        return out

    @torch.compiler.disable  # its prefix sums are what PyTorch's compiler fails on, on a GPU
    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, past: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The output of the last Q positions, and the moments of all keys (without bands)."""
        if value.shape[-1] != key.shape[-1]:
            raise ValueError(
                f"`value` must have the {key.shape[-1]} channels of `key` for elementwise, got "
                f"{value.shape[-1]}"
            )
        given = query, key, value, past
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
            # Recomputed in the backward pass: the moments of all orders would fill the memory.
            found: tuple[Tensor, Tensor] = checkpoint(
                self._moments, *given, use_reentrant=False, preserve_rng_state=False
            )
            return found
        return self._moments(*given)

    def _moments(
        self, query: Tensor, key: Tensor, value: Tensor, past: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype, queries = value.dtype, query.shape[2]
        wide = torch.promote_types(query.dtype, torch.float32)
        exact = wide if self.bands is None else torch.float64
        group = query.shape[1] // key.shape[1]
        query, key = self._bounded(query.to(wide)), self._bounded(key.to(wide))
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value.to(wide)))
        above = below = torch.zeros((), dtype=exact, device=query.device)
        sums: list[Tensor] = []
        for number, (of_query, of_key) in enumerate(self._terms(query, key)):
            pair = []
            for which, terms in enumerate((of_key * value, of_key)):
                total = terms.to(exact).cumsum(dim=2)
                if past is not None:
                    total = total + past[:, 2 * number + which]
                pair.append(total if self.bands is None else self._in_bands(total, queries))
                sums.append(total[:, :, -1:])
            above = above + of_query * pair[0]
            below = below + of_query * pair[1]
        if self.bands is not None:  # rows without keys
            above, below = above.masked_fill(below == 0, 0.0), below.masked_fill(below == 0, 1.0)
        return (above / below).to(dtype), torch.stack(sums, dim=1)

    def _bounded(self, tensor: Tensor) -> Tensor:
        bound = self.method.bound
        return bound * torch.tanh(tensor / bound)

    def _terms(self, query: Tensor, key: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Factors `a_n` of the queries and `k^n w` of the keys, for n = 0 .. t."""
        scale = self.method.scale
        of_query, of_key = torch.ones_like(query), torch.exp(-scale * key.square())
        for n in range(self.method.order + 1):
            if n:
                of_query, of_key = of_query * query * (2 * scale / n), of_key * key
            yield of_query, of_key

    def _in_bands(self, total: Tensor, queries: int) -> Tensor:
        """Sums over the bands of the last positions, from prefix sums `[B, H, K, D]`."""
        assert self.bands is not None
        heads = []
        for head, intervals in enumerate(self.bands.intervals):
            found = torch.zeros_like(total[:, head, :queries])
            for near, far in intervals:
                reached, left_out = (_before(total[:, head], edge, queries) for edge in (near, far))
                found = found + reached - left_out
            heads.append(found)
        return torch.stack(heads, dim=1)

    def weights(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """See `LayerAttention.weights`: the mean over channels, each of which adds up to 1; rows
        without keys are zero.
        """
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        query, key = self._bounded(query[:, :, start:stop].double()), self._bounded(key.double())
        position = torch.arange(key.shape[2], device=key.device)
        distance = position[start:stop, None] - position
        bands = self.bands or BandPattern.dense(query.shape[1], key.shape[2])
        mask = in_bands(distance, bands.intervals)
        total = query.new_zeros(*query.shape[:3], key.shape[2])
        terms = list(self._terms(query, key))
        for channel in range(query.shape[3]):
            share = sum(q[..., channel, None] * k[..., None, :, channel] for q, k in terms)
            share = torch.where(mask, share, 0.0)
            total += share / share.sum(dim=-1, keepdim=True).clamp_min(1e-300)
        return (total / query.shape[3]).float()


def _before(total: Tensor, distance: int, queries: int) -> Tensor:
    """Prefix sums `[B, K, D]` up to a distance before each of the last positions, 0 before the
    first token. Slices, unlike indices, have a backward pass without sorting.
    """
    keys = total.shape[1]
    part = total[:, max(0, keys - queries - distance) : max(0, keys - distance)]
    return torch.nn.functional.pad(part, (0, 0, queries - part.shape[1], 0))
