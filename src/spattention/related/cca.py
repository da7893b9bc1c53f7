"""CCA, Core Context Aware attention (arXiv:2412.12465v3, ICML 2025, SCUT and Peng Cheng Lab).

Equations from the project page and the authors' code at commit 052cc8e. Tokens come in groups of g.
The *last* query of a group weighs its members, and their weighted sums are the group's core key and
core value, without new parameters:

    w_j = softmax(q_{(j+1)g-1} K_j^T / sqrt(d)),   core_j = (w_j K_j, w_j V_j)

Counted from 0, query i sees the core tokens `0 .. c - 1` and the tokens `g c .. i`, with
`c = max(0, (i + 1 - s) // g)`, in one softmax: at least s tokens exactly, the others through their
groups. Core token j is read by `i >= (j + 1) g + s - 1` alone, so the method is causal.

As in the authors' code, keys are pooled per query head, after rotary positions; the page pools
hidden states, which is the same except for the rotation. Their code and equations differ in places:

- The paper's window starts one token early, at a member of the last core token. Here, as in the
  mask of their PyTorch code, every past token is seen exactly once.
- Their kernel is right only where g divides s. Here anything else raises.
- Their cache pools the wrong tokens in the first two layers, and keeps all heads' keys. Here it
  keeps core tokens, and those tokens that are in the window, with the model's key/value heads.

Computed on the band operator: a sliding window in which `key_start` of each query is `g c`, and
dense attention on the core tokens, in which the g queries of one c are g heads over one key head.
Both are joined by log-sum-exp. The second may have any bands, in units of core tokens, so that far
bands cost 1/g; distance 0 is then the nearest group outside the window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention import band_attention
from ..bands import BandPattern, in_bands
from ..baselines.adapter import check_integers, check_size
from ..baselines.state import State
from ..merging import merge
from .method import Related, check_bands, check_whole


@dataclass(frozen=True)
class CCA(Related):
    """Near tokens one by one, far tokens as core tokens of their groups.

    Args:
        num_heads: query heads.
        span: longest input, in tokens.
        bands: of the heads over core tokens, in units of core tokens, with the span `band_span`;
            None: every head sees all of them.
        group: tokens g of a group; default 16 as published.
        window: tokens s that a query sees exactly at least, itself included, a multiple of `group`;
            default a quarter of the span, at most the published 1,024.
    """

    kind: ClassVar[str] = "cca"
    keeps_state: ClassVar[bool] = True

    bands: BandPattern | None = None
    group: int = 16
    window: int = None  # type: ignore[assignment]  # resolved below

    def __post_init__(self) -> None:
        check_size(self)
        check_integers(self.kind, group=(self.group, 1, self.span))
        if self.window is None:
            near = min(1024, self.span // 4) // self.group * self.group
            object.__setattr__(self, "window", max(self.group, near))
        check_integers(self.kind, window=(self.window, 1, 2 * self.span))
        if self.window % self.group:
            raise ValueError(
                f"`window` of `cca` must be a multiple of `group` = {self.group}, got {self.window}"
            )
        check_bands(self, self.bands)

    @property
    def band_span(self) -> int:
        """Core tokens that the last query sees; at least 1."""
        return max(1, core_count(self.span - 1, self.group, self.window))

    def layer(self, index: int, num_layers: int) -> CoreAttention:
        return CoreAttention(self)

    def pairs(self, seq_len: int, num_layers: int) -> int:
        """See `Baseline.pairs`: tokens and core tokens; pooling reads every token again."""
        position = torch.arange(seq_len)
        cores = core_count(position, self.group, self.window)
        total = self.num_heads * int((position + 1 - self.group * cores).sum())
        full, last = divmod(int((cores > 0).sum()), self.group)
        if self.bands is None:
            far = self.num_heads * int(cores.sum())
        else:
            far = self.group * _pairs(self.bands, full)
            far += last * (_pairs(self.bands, full + 1) - _pairs(self.bands, full))
        return total + far


class CoreAttention:
    """The attention of one layer.

    Args:
        method: its group, window and bands.
    """

    def __init__(self, method: CCA) -> None:
        heads, group, window = method.num_heads, method.group, method.window
        self.group = group
        self.window = window
        self.near = BandPattern.sliding_window(heads, method.span + window + group, window + group)
        self.far = method.bands or BandPattern.dense(heads, method.band_span)
        # The g queries that see the same core tokens become heads of their own.
        folded = tuple(each for each in self.far.intervals for _ in range(group))
        self.far_folded = replace(self.far, intervals=folded, constructor=None)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        check_whole("cca", query, key, "core tokens need the queries of their groups")
        return self._attend(State(), query, key, value, scale)[0]

    def attend_after(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See `StatefulAttention`. A state holds `core_key`, `core_value` `[B, H, n, D]`, and the
        `key` and `value` of the tokens that the next query sees.
        """
        out, first, held = self._attend(state, query, key, value, scale)
        end = state.length + query.shape[2]
        drop = self.group * core_count(end, self.group, self.window) - first
        held["key"], held["value"] = (held[n][:, :, drop:].clone() for n in ("key", "value"))
        state.keep(**held)
        return out

    def _attend(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """The output, the position of the first key that is there, and all keys and core tokens."""
        start, first = state.length, 0
        if state.tensors:
            first = self.group * core_count(start, self.group, self.window)
            key = torch.cat([state.tensors["key"], key], dim=2)
            value = torch.cat([state.tensors["value"], value], dim=2)
        cores = self._pool(start, first, query, key, value, scale)
        if state.tensors:
            old = state.tensors["core_key"], state.tensors["core_value"]
            cores = [torch.cat(pair, dim=2) for pair in zip(old, cores)]
        position = torch.arange(start, start + query.shape[2], device=query.device)
        seen = core_count(position, self.group, self.window)
        key_start = (self.group * seen - first).to(torch.int32).expand(query.shape[0], -1)
        near = band_attention(
            query, key, value, self.near, scale=scale, key_start=key_start, return_lse=True
        )
        held = {"key": key, "value": value, "core_key": cores[0], "core_value": cores[1]}
        skipped = max(0, self.window - 1 + self.group - start)  # queries that see no core token
        if skipped >= query.shape[2]:
            return near[0], first, held
        far = self._attend_cores(start + skipped, query[:, :, skipped:], cores, scale)
        out, lse = pad(far[0], (0, 0, skipped, 0)), pad(far[1], (skipped, 0), value=-torch.inf)
        return merge([(near[0], near[1]), (out, lse)])[0], first, held

    def _pool(
        self, start: int, first: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> list[Tensor]:
        """Core keys and values `[B, H, n, D]` of the n groups whose last query is given. Queries
        start at position `start`; keys, their members among them, at `first`.
        """
        keys, values = (self._members(start, first, query, t) for t in (key, value))
        weights = self._shares(start, query, keys, scale)[..., None, :]
        return [(weights.to(t.dtype) @ t)[..., 0, :].flatten(1, 2) for t in (keys, values)]

    def _members(self, start: int, first: int, query: Tensor, tokens: Tensor) -> Tensor:
        """Keys or values of the groups whose last query is given, `[B, Hkv, 1, n, g, D]`."""
        begin, stop = start // self.group, (start + query.shape[2]) // self.group
        found = tokens[:, :, begin * self.group - first : stop * self.group - first]
        return found.unflatten(2, (stop - begin, self.group))[:, :, None]

    def _shares(self, start: int, query: Tensor, members: Tensor, scale: float) -> Tensor:
        """Weights of the keys of groups, `[B, Hkv, H / Hkv, n, g]`, in float32 or more."""
        skip = (start // self.group + 1) * self.group - 1 - start
        last = query[:, :, skip :: self.group][:, :, : members.shape[3]]
        last = last.unflatten(1, (members.shape[1], -1))  # [B, Hkv, H / Hkv, n, D]
        scores = (last[..., None, :] @ members.mT)[..., 0, :] * scale
        return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def _attend_cores(
        self, start: int, query: Tensor, cores: list[Tensor], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of queries that see core tokens, from position `start` on, and its log-sum-exp.
        `cores` are keys and values `[B, H, n, D]`.
        """
        group, count = self.group, query.shape[2]
        visible = core_count(start, group, self.window)
        most = core_count(start + count - 1, group, self.window)
        key, value = (t[:, :, :most] for t in cores)
        pattern, before = self.far, 0
        if count > 1:
            before = start - (self.window - 1 + group * visible)
            rows = most - visible + 1
            query = pad(query, (0, 0, before, rows * group - before - count))
            query = query.unflatten(2, (rows, group)).transpose(2, 3).flatten(1, 2)
            pattern = self.far_folded
        out, lse = band_attention(
            query, key, value, pattern, scale=scale, query_start=visible - 1, return_lse=True
        )
        if count > 1:
            out = out.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)
            lse = lse.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)
        return out[:, :, before : before + count], lse[:, :, before : before + count]

    def weights(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """See `LayerAttention.weights`; a core token's weight is shared among its members as it was
        pooled. Heads whose bands leave out core tokens see less, and still add up to 1.
        """
        query, key = query.float(), key.float()
        length, heads = key.shape[2], query.shape[1]
        members = self._members(0, 0, query, key)
        shares = self._shares(0, query, members, scale)
        core_key = (shares[..., None, :] @ members)[..., 0, :].flatten(1, 2)
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        position = torch.arange(start, stop, device=key.device)[:, None]
        cores = core_count(position, self.group, self.window)
        token = torch.arange(length, device=key.device)
        near = (token <= position) & (token >= self.group * cores)
        group = torch.arange(core_key.shape[2], device=key.device)
        far = (group < cores) & in_bands(cores - 1 - group, self.far.intervals)
        scores = query[:, :, start:stop] @ torch.cat([core_key, key], dim=2).mT * scale
        mask = torch.cat([far, near.expand(heads, -1, -1)], dim=-1)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        on_cores, on_tokens = weights.split([len(group), length], dim=-1)
        spread = on_cores[..., None] * shares.flatten(1, 2)[:, :, None]  # [B, H, rows, n, g]
        return on_tokens + pad(spread.flatten(3), (0, length - spread[0, 0, 0].numel()))

    def grouped(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """The pairs of `weights` that are seen through a core token, bool of the same shape."""
        position = torch.arange(start, stop, device=key.device)[:, None]
        cores = core_count(position, self.group, self.window)
        token = torch.arange(key.shape[2], device=key.device) // self.group
        seen = (token < cores) & in_bands(cores - 1 - token, self.far.intervals)
        return seen.expand(query.shape[0], -1, -1, -1)


@overload
def core_count(position: int, group: int, window: int) -> int: ...
@overload
def core_count(position: Tensor, group: int, window: int) -> Tensor: ...
def core_count(position: Any, group: int, window: int) -> Any:
    """Core tokens that the query at a position sees, `max(0, (i + 1 - s) // g)`."""
    count = (position + 1 - window) // group
    return count.clamp(min=0) if isinstance(count, Tensor) else max(0, count)


def _pairs(bands: BandPattern, length: int) -> int:
    return sum(bands.pairs(length)) if length else 0
