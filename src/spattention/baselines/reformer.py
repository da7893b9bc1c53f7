"""Reformer (Kitaev, Kaiser and Levskaya, ICLR 2020, arXiv:2001.04451) as a causal language model.

Queries and keys are one projection; a key is its query at unit length. In each of several rounds
vectors are hashed by a random rotation, h(x) = argmax([x R; -x R]), sorted by (bucket, position),
and cut into chunks; a query sees the keys of its bucket in its own chunk and the one before it, up
to its own position, itself only where there is nothing else (equations 3 to 6). A key seen in
several rounds counts once (appendix A), and rounds are merged by their log-sum-exp.

Rotations are drawn once from a seed, one set per layer and head. Queries carry the model's rotary
positions when they are hashed, as the scores that the hash stands for do. Which bucket mates share
a chunk depends on all tokens, later ones too: that is the method. Values never flow backwards. A
key/value cache keeps earlier tokens as they were computed, where recomputation might place them
in other chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .adapter import Baseline, check_integers, check_size

# What the paper takes from a query's score of itself; any other key wins.
SELF_PENALTY = 1e5


@dataclass(frozen=True)
class Reformer(Baseline):
    """Shared query-key attention within buckets of a locality-sensitive hash.

    Args:
        num_heads: query heads.
        span: longest input, in tokens.
        rounds: independent hashes.
        chunk: tokens per chunk; default `span / 16`, 2 to 64.
        buckets: of each hash, an even number; default `2 span / chunk` as in the paper, so that a
            bucket fills half a chunk.
        seed: of the rotations.
    """

    kind: ClassVar[str] = "reformer"

    rounds: int = 4
    chunk: int = None  # type: ignore[assignment]  # resolved below
    buckets: int = None  # type: ignore[assignment]  # resolved below
    seed: int = 0

    def __post_init__(self) -> None:
        check_size(self)
        span = self.span
        if self.chunk is None:
            object.__setattr__(self, "chunk", min(64, max(2, span // 16)))
        check_integers(self.kind, chunk=(self.chunk, 1, max(2, span)))
        if self.buckets is None:
            object.__setattr__(self, "buckets", max(2, 2 * (span // self.chunk)))
        check_integers(
            self.kind,
            rounds=(self.rounds, 1, 64),
            buckets=(self.buckets, 2, max(2, 2 * span)),
            seed=(self.seed, 0, 2**32 - 1),
        )
        if self.buckets % 2:
            raise ValueError(f"`buckets` of `{self.kind}` must be even, got {self.buckets}")

    def layer(self, index: int, num_layers: int) -> HashedAttention:
        seed = self.seed * 2**20 + index
        return HashedAttention(self.num_heads, self.rounds, self.chunk, self.buckets, seed)

    def pairs(self, seq_len: int, num_layers: int) -> int:
        """Pairs that are compared, an upper bound of those attended, which depend on the data."""
        chunks = -(-seq_len // self.chunk)
        return self.num_heads * self.rounds * (2 * chunks - 1) * self.chunk**2

    def check(self, module: Any) -> None:
        if not hasattr(module, "q_proj") or not hasattr(module, "k_proj"):
            raise ValueError(
                "`model` must have separate projections q_proj and k_proj for reformer, which "
                f"{type(module).__name__} has not"
            )

    def equip(self, module: Any) -> None:
        """Keys come from the projection (and the norm) of the queries; their own are removed."""
        for own, shared in (("k_proj", "q_proj"), ("k_norm", "q_norm")):
            if hasattr(module, own):
                setattr(module, own, Shared(module, shared))


class Shared(torch.nn.Module):
    """Calls another module of its owner, whose parameters are not its own: the one that is there
    when it is called, which an adapter (LoRA) may have put in place of the first.
    """

    def __init__(self, owner: torch.nn.Module, name: str) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is no child
        self._name = name

    def forward(self, *arguments: Any) -> Any:
        return getattr(self._owner[0], self._name)(*arguments)


class HashedAttention:
    """The attention of one layer; arguments as in `Reformer`."""

    def __init__(self, num_heads: int, rounds: int, chunk: int, buckets: int, seed: int) -> None:
        self.num_heads = num_heads
        self.rounds = rounds
        self.chunk = chunk
        self.buckets = buckets
        self.seed = seed
        self._rotations: dict[tuple[torch.device, int], Tensor] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `LayerAttention.attend`: `key` is the shared projection of all positions, `query` its
        last rows.
        """
        value = value.repeat_interleave(key.shape[1] // value.shape[1], dim=1)
        out = hashed_attention(key, value, self.hash(key), self.chunk, scale)
        return out[:, :, key.shape[2] - query.shape[2] :]

    def weights(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        length = key.shape[2]
        place = _places(self.hash(key), self.chunk, length)[1][..., :length]  # [R, B, H, K]
        seen = torch.zeros(1, dtype=torch.bool, device=key.device)
        for each in place:
            seen = seen | _meet(each[:, :, start:stop, None], each[:, :, None])
        position = torch.arange(length, device=key.device)
        row = position[start:stop, None]
        key = key.float()
        scores = key[:, :, start:stop] @ _keys(key, scale).mT
        scores = scores.masked_fill(~(seen & (position <= row)), -torch.inf)
        return (scores - SELF_PENALTY * (position == row)).softmax(dim=-1)

    def hash(self, shared: Tensor) -> Tensor:
        """Buckets of `shared [B, H, N, D]` in each round: `[R, B, H, N]`, int64."""
        rotated = torch.einsum("bhnd,rhdk->rbhnk", shared.detach().float(), self._rotation(shared))
        return torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)

    def _rotation(self, shared: Tensor) -> Tensor:
        """`[R, H, D, buckets / 2]`, the same on every device."""
        place = shared.device, shared.shape[-1]
        if place not in self._rotations:
            # On the CPU, in float32: the same on every device and under every default dtype.
            generator = torch.Generator("cpu").manual_seed(self.seed)
            size = self.rounds, self.num_heads, place[1], self.buckets // 2
            drawn = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
            self._rotations[place] = drawn.to(shared.device)
        return self._rotations[place]


def hashed_attention(
    shared: Tensor, value: Tensor, buckets: Tensor, chunk: int, scale: float
) -> Tensor:
    """Attention within buckets.

    Args:
        shared: queries, and keys before their normalisation, `[B, H, N, D]`.
        value: `[B, H, N, Dv]`.
        buckets: `[R, B, H, N]`, non-negative integers.
        chunk: tokens per chunk m; the sorted sequence is filled up at its end.
        scale: of scores against keys of length sqrt(D), as in the authors' code: with
            `D ** -0.5` a score is the query times a key of unit length.

    Returns:
        `[B, H, N, Dv]` in value's dtype; scores and softmax are float32 (float64 for float64).
    """
    length = shared.shape[2]
    order, place = _places(buckets, chunk, length)
    filled = [
        torch.nn.functional.pad(t, (0, 0, 0, order.shape[-1] - length)) for t in (shared, value)
    ]
    outs, sums = [], []
    for number in range(len(order)):
        # Recomputed in the backward pass: the scores of all rounds would fill the memory.
        out, lse = checkpoint(
            _one_round, *filled, order[number], place, number, chunk, scale,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        outs.append(out[:, :, :length])
        sums.append(lse[:, :, :length])
    shares = torch.stack(sums).softmax(dim=0)[..., None]  # exp(lse_r - lse), [R, B, H, N, 1]
    merged: Sequence[Tensor] = [share * out for share, out in zip(shares, outs)]
    return torch.stack(list(merged)).sum(dim=0).to(value.dtype)


def _places(buckets: Tensor, chunk: int, length: int) -> tuple[Tensor, Tensor]:
    """Places of the tokens of each round after sorting.

    Returns:
        order: `[R, B, H, N']`, N' whole chunks: the position that each place holds.
        place: `[R, B, H, N']`, per position a number that tells bucket and chunk: see `_meet`.
    """
    padding = -length % chunk
    # What fills the last chunk is in a bucket of its own, behind all others.
    buckets = torch.nn.functional.pad(buckets, (0, padding), value=2**20)
    order = buckets.argsort(dim=-1, stable=True)
    ranks = torch.arange(length + padding, device=buckets.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, ranks)
    chunks = (length + padding) // chunk
    return order, buckets * (chunks + 2) + rank // chunk


def _meet(query: Tensor, key: Tensor) -> Tensor:
    """True where places share a bucket, the key in the query's chunk or the one before."""
    apart = query - key
    return (apart == 0) | (apart == 1)


def _keys(shared: Tensor, scale: float) -> Tensor:
    """Normalised keys with the scale in them, at least float32."""
    work = shared if shared.dtype == torch.float64 else shared.float()
    length = work.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(work.dtype).tiny)
    return work / length * (scale * shared.shape[-1] ** 0.5)


def _one_round(
    shared: Tensor,
    value: Tensor,
    order: Tensor,
    place: Tensor,
    number: int,
    chunk: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, N', Dv]` and log-sum-exp `[B, H, N']` of round `number`, by position."""

    def sort(tensor: Tensor) -> Tensor:
        """`[B, H, N', ...]` by position to `[B, H, chunks, chunk, ...]` by place."""
        index = (
            order if tensor.dim() == 3 else order[..., None].expand(*order.shape, tensor.shape[-1])
        )
        return tensor.gather(2, index).unflatten(2, (-1, chunk))

    def look_back(tensor: Tensor, fill: float) -> Tensor:
        """Each chunk behind the one before it; before the first there is `fill`."""
        before = torch.full_like(tensor[:, :, :1], fill)
        return torch.cat([torch.cat([before, tensor[:, :, :-1]], dim=2), tensor], dim=3)

    query, values = sort(shared), look_back(sort(value), 0.0)
    # The dtype of the products stays the input's; what follows is at least float32.
    keys = look_back(sort(_keys(shared, scale).to(shared.dtype)), 0.0)
    scores = query @ keys.mT  # [B, H, chunks, m, 2 m]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    position = order.unflatten(2, (-1, chunk))
    key_position = look_back(position, -1)
    rounds = [(p[..., :, None], look_back(p, -2)[..., None, :]) for p in map(sort, place)]
    counts = torch.stack([_meet(*each) for each in rounds]).sum(dim=0)
    seen = _meet(*rounds[number]) & (key_position[..., None, :] <= position[..., None])
    itself = key_position[..., None, :] == position[..., None]
    scores = scores - counts.clamp_min(1).to(scores.dtype).log() - SELF_PENALTY * itself
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    weights = (scores - lse).exp()
    out = (weights.to(value.dtype) @ values).to(weights.dtype).flatten(2, 3)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    by_position = rank[..., None].expand_as(out)
    return out.gather(2, by_position), lse[..., 0].flatten(2).gather(2, rank)
