"""Recurrent near heads, **in the spirit of** RecurFormer (arXiv:2410.12850v1, 2024), of which one
formula and an outline could be read: heads that attend near tokens become a linear recurrence, the
others keep attention and their part of the cache, and training continues.

The formula ranks heads of a dense model by their recency ratio, the share of attention within k
tokens (`recency_ratio`, of a profile that `spattention.hf.profile` measured). With bands, near
heads are known without one: those are the first.

RecurFormer puts Mamba in their place; its sizes and inputs are not known. Here it is retention
(arXiv:2307.08621): a head keeps its projections and rotary positions, and with a learned decay
`gamma` in (0, 1) per head

    S_t = gamma S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(d),   out = RMSNorm(o_t) gain

in place of softmax attention. 1 / (1 - gamma) starts at 8, 16, ... 256 tokens, head by head, and
again. A sum without softmax is of any size, hence the norm of a head, with a gain per channel.

On CUDA tensors the kernel of flash-linear-attention runs (`chunk_simple_gla` of `fla-core`, the
extra `spattention[fla]`) where it is installed and the input is no float64; otherwise chunks of 64
tokens in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..bands import BandPattern
from ..baselines.adapter import check_integers
from ..baselines.state import State
from ..fitting.profile import Profile
from ..hf.decoder import head_dim, key_heads
from ..hf.sinks import new_parameter
from .method import (
    Related,
    causal_attention,
    causal_pairs,
    causal_weights,
    check_bands,
    check_whole,
    norm_heads,
    tokens_kept,
)

CHUNK = 64
HAS_FLA = find_spec("fla") is not None
MOST_LAYERS = 2**16


@dataclass(frozen=True)
class RecurrentNear(Related):
    """Near heads as recurrences, the others as attention.

    Args:
        num_heads: query heads.
        span: longest input, in tokens.
        bands: of all heads, of which those of recurrent heads are not used; None: attention to all
            of the past.
        recurrent: recurrent heads of each layer, the first ones; default a quarter. All query heads
            of a key/value head go together.
        heads: the recurrent heads of each layer, instead of `recurrent`; as `near_heads` returns
            them.
    """

    kind: ClassVar[str] = "recurrent_near"
    keeps_state: ClassVar[bool] = True
    has_weights: ClassVar[bool] = True

    bands: BandPattern | None = None
    recurrent: int = None  # type: ignore[assignment]  # resolved below
    heads: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_bands(self, self.bands)
        if self.heads is not None:
            if self.recurrent not in (None, 0):
                raise ValueError(
                    f"`recurrent` of `recurrent_near` must not be given with `heads`, got "
                    f"{self.recurrent}"
                )
            object.__setattr__(self, "recurrent", 0)
            self._check_heads()
        elif self.recurrent is None:
            object.__setattr__(self, "recurrent", self.num_heads // 4)
        check_integers(self.kind, recurrent=(self.recurrent, 0, self.num_heads))

    def _check_heads(self) -> None:
        layers = self.heads
        assert layers is not None
        if not isinstance(layers, tuple) or not 1 <= len(layers) <= MOST_LAYERS:
            raise ValueError("`heads` of `recurrent_near` must be a tuple with one entry per layer")
        for each in layers:
            whole = isinstance(each, tuple) and all(type(head) is int for head in each)
            if not whole or list(each) != sorted(set(each) & set(range(self.num_heads))):
                raise ValueError(
                    "`heads` of `recurrent_near` must hold increasing indices below "
                    f"{self.num_heads} for each layer, got {each!r}"
                )

    def heads_of(self, index: int) -> tuple[int, ...]:
        """The recurrent heads of a layer."""
        return tuple(range(self.recurrent)) if self.heads is None else self.heads[index]

    def section(self) -> dict[str, Any]:
        layers = None if self.heads is None else [list(each) for each in self.heads]
        return {**super().section(), "heads": layers}

    @classmethod
    def from_section(cls, section: Any) -> Self:
        """See `Baseline.from_section`."""
        layers = section.get("heads") if isinstance(section, dict) else None
        if isinstance(layers, list):
            inner = (tuple(each) if isinstance(each, list) else each for each in layers)
            section = {**section, "heads": tuple(inner)}
        return super().from_section(section)

    def check(self, module: Any) -> None:
        config = module.config
        layers = config.num_hidden_layers
        if self.heads is not None and len(self.heads) != layers:
            raise ValueError(
                f"`heads` of `recurrent_near` must have an entry for each of {layers} layers, got "
                f"{len(self.heads)}"
            )
        group = self.num_heads // key_heads(config)
        here = set(self.heads_of(module.layer_idx))
        for head in here:
            first = head // group * group
            if not here >= set(range(first, first + group)):
                raise ValueError(
                    f"`recurrent` heads must be all {group} query heads of a key/value head, got "
                    f"{sorted(here)} in layer {module.layer_idx}"
                )

    def equip(self, module: Any) -> None:
        """Give an attention module the weights of its recurrent heads."""
        count = len(self.heads_of(module.layer_idx))
        if count:
            module.recurrent_heads = RecurrentHeads(module, count)

    def layer(self, index: int, num_layers: int) -> NearAndFar:
        """A layer whose decays are where they start: see `Baseline.layer`."""
        return NearAndFar(self, self.heads_of(index), None)

    def layer_in(self, module: Any, num_layers: int) -> NearAndFar:
        """See `Baseline.layer_in`."""
        weights = getattr(module, "recurrent_heads", None)
        return NearAndFar(self, self.heads_of(module.layer_idx), weights)

    def pairs(self, seq_len: int, num_layers: int) -> int:
        """See `Baseline.pairs`; a recurrent head reads one state a token."""
        total = 0
        for index in range(num_layers):
            near = self.heads_of(index)
            far = [head for head in range(self.num_heads) if head not in near]
            total += len(near) * seq_len
            if far:
                total += causal_pairs(len(far), seq_len, _part(self.bands, far))
        return round(total / num_layers)


class RecurrentHeads(torch.nn.Module):
    """Weights of the recurrent heads of an attention module.

    Attributes:
        decay: `[heads]`, logits of `gamma`.
        gain: `[d]` of the head norm.
    """

    def __init__(self, module: Any, count: int) -> None:
        super().__init__()
        self.decay = new_parameter(module, first_decay(count))
        self.gain = new_parameter(module, torch.ones(head_dim(module.config)))


class NearAndFar:
    """The attention of one layer.

    Args:
        method: its bands.
        near: recurrent heads.
        weights: of the recurrent heads; None for those at the start, and no gain.
    """

    def __init__(
        self, method: RecurrentNear, near: Sequence[int], weights: RecurrentHeads | None
    ) -> None:
        self.num_heads = method.num_heads
        self.near = list(near)
        self.far = [head for head in range(method.num_heads) if head not in near]
        self.bands = _part(method.bands, self.far)
        self.kept = tokens_kept(self.bands)
        self.weights_near = weights

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        reason = "the state of earlier tokens is not in their keys"
        check_whole("recurrent_near", query, key, reason)
        return self._attend(State(), query, key, value, scale)

    def attend_after(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See `StatefulAttention`. A state holds `memory [B, near heads, D, D]`, and `key`, `value`
        of the other heads as far as their bands reach. `scale` is also that of the recurrence.
        """
        out = self._attend(state, query, key, value, scale)
        if self.bands is not None:  # not views of what the bands do not reach any more
            state.keep(**{name: tensor.clone() for name, tensor in state.tensors.items()})
        return out

    def _attend(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        group = self.num_heads // key.shape[1]
        parts = []
        if self.near:
            # Grouped queries share their keys; each keeps a state of its own.
            keys, values = (_heads(t, self.near, group) for t in (key, value))
            before = state.tensors.get("memory")
            queries = query[:, self.near]
            out, memory = retain(queries, keys, values, self.decays(query), scale, before)
            weights = self.weights_near
            gain = out.new_ones(out.shape[-1]) if weights is None else weights.gain
            parts.append(norm_heads(out, gain).to(query.dtype))
            state.keep(memory=memory)
        if self.far:
            kept = sorted({head // group for head in self.far})
            keys, values = key[:, kept], value[:, kept]
            if "key" in state.tensors:
                keys = torch.cat([state.tensors["key"], keys], dim=2)
                values = torch.cat([state.tensors["value"], values], dim=2)
            parts.append(causal_attention(query[:, self.far], keys, values, scale, self.bands))
            drop = 0 if self.kept is None else max(0, keys.shape[2] - self.kept)
            state.keep(key=keys[:, :, drop:], value=values[:, :, drop:])
        order = torch.tensor(self.near + self.far, device=query.device).argsort()
        return torch.cat(parts, dim=1).index_select(1, order)

    def grouped(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """The pairs of `weights` that are seen through a state, bool of the same shape."""
        position = torch.arange(key.shape[2], device=key.device)
        past = position <= position[start:stop, None]
        found = past.expand(*query.shape[:2], -1, -1).clone()
        found[:, self.far] = False
        return found

    def decays(self, query: Tensor) -> Tensor:
        """`log(gamma)` of the recurrent heads, float32 or more."""
        weights = self.weights_near
        logits = first_decay(len(self.near)) if weights is None else weights.decay
        wide = torch.promote_types(query.dtype, torch.float32)
        return torch.nn.functional.logsigmoid(logits.to(query.device, wide))

    def weights(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """See `LayerAttention.weights`; of recurrent heads the shares of `|q_i k_j| gamma^(i - j)`,
        whose signs are lost. Rows without keys are zero.
        """
        query, key = query.float(), key.float()
        found = query.new_zeros(*query.shape[:2], stop - start, key.shape[2])
        group = self.num_heads // key.shape[1]
        if self.near:
            position = torch.arange(key.shape[2], device=key.device)
            distance = position[start:stop, None] - position
            fade = torch.exp(self.decays(query)[:, None, None] * distance.clamp(min=0))
            fade = torch.where(distance >= 0, fade, 0.0)
            products = query[:, self.near, start:stop] @ _heads(key, self.near, group).mT
            sizes = products.abs() * fade
            total = sizes.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
            found[:, self.near] = sizes / total
        if self.far:
            keys = _heads(key, self.far, group)
            given = query[:, self.far], keys, scale, start, stop
            found[:, self.far] = causal_weights(*given, self.bands)
        return found


def first_decay(count: int) -> Tensor:
    """Logits at which decays start: memories of 8, 16, ... 256 tokens, and again."""
    tokens = 2.0 ** (3 + torch.arange(count) % 6)
    return torch.log(tokens - 1)


def retain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    scale: float,
    memory: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence `S_t = gamma S_{t-1} + k_t^T v_t`, `o_t = scale q_t S_t`.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, N, D]`.
        value: `[B, H, N, Dv]`.
        decay: `log(gamma) [H]`, float32 or more.
        scale: factor of the output.
        memory: `S [B, H, D, Dv]` before the first token; default zero.

    Returns:
        `o [B, H, N, Dv]` and the last `S`, in float32 or more (the kernel's `o` has query's dtype).
    """
    if query.is_cuda and HAS_FLA and query.dtype != torch.float64:
        return _retain_by_kernel(query, key, value, decay, scale, memory)
    wide = decay.dtype
    given = [tensor.to(wide) for tensor in (query, key, value)]
    if memory is None:
        memory = given[0].new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])
    whole = query.shape[2] // CHUNK * CHUNK  # the last tokens may fill no chunk
    outs = []
    for part in (slice(0, whole), slice(whole, None)):
        query, key, value = (tensor[:, :, part] for tensor in given)
        if query.shape[2]:
            size = min(CHUNK, query.shape[2])
            out, memory = _retain_chunks(query, key, value, decay, memory, size)
            outs.append(out * scale)
    return torch.cat(outs, dim=2), memory


def _retain_chunks(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, memory: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """`retain` of whole chunks, all at once, without its scale. What each chunk adds to the state
    is a product; a matrix of decays sums it up for the chunks after it.
    """
    q, k, v = (t.unflatten(2, (-1, size)) for t in (query, key, value))  # [B, H, chunks, size, D]
    place = torch.arange(size, device=query.device)
    chunk = torch.arange(q.shape[2], device=query.device)
    since = torch.exp(decay[:, None] * (place + 1))[:, None, :, None]
    until = torch.exp(decay[:, None] * (size - 1 - place))[:, None, :, None]
    added = (k * until).mT @ v
    before = _fade(chunk[:, None] - 1 - chunk, decay * size) @ added.flatten(3)
    kept = torch.exp(decay[:, None] * size * chunk)[..., None, None]
    before = before.unflatten(3, added.shape[3:]) + kept * memory[:, :, None]
    last = before[:, :, -1] * torch.exp(decay * size)[:, None, None] + added[:, :, -1]
    scores = (q @ k.mT) * _fade(place[:, None] - place, decay)[:, None]
    return (scores @ v + (q * since) @ before).flatten(2, 3), last


def _fade(apart: Tensor, decay: Tensor) -> Tensor:
    """`gamma^apart` for each head, `[H, *apart]`, and 0 where `apart` is negative."""
    return torch.exp(decay[:, None, None] * apart.clamp(min=0)) * (apart >= 0)


def _retain_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, scale: float, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`retain` by flash-linear-attention, which has tokens before heads."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
    out, last = chunk_simple_gla(
        q,
        k,
        v,
        g=decay.expand(*q.shape[:2], -1).contiguous(),
        scale=scale,
        initial_state=memory,
        output_final_state=True,
    )
    return out.transpose(1, 2), last


def recency_ratio(profile: Profile, within: int) -> Tensor:
    """Share of attention at distances up to `within` tokens, float64 `[layers, heads]`: the formula
    of RecurFormer. `within + 1` must be an edge of the profile's bins.
    """
    edges = list(profile.edges)
    if within + 1 not in edges:
        raise ValueError(
            f"`within` must be one less than an edge of the profile's bins, {edges}, got {within}"
        )
    bins = edges.index(within + 1)
    first = profile.first_distance[..., :bins].sum(dim=(2, 3))
    return profile.distance[..., :bins].sum(dim=2) + first


def near_heads(profile: Profile, within: int, threshold: float) -> tuple[tuple[int, ...], ...]:
    """The query heads of each layer whose key/value head has a mean recency ratio of at least
    `threshold`, for `RecurrentNear(heads=...)`.
    """
    if not isinstance(profile, Profile):
        raise ValueError(f"`profile` must be a Profile, got {type(profile).__name__}")
    ratio = recency_ratio(profile, within)
    group = profile.model.heads // profile.model.kv_heads
    near = ratio.unflatten(1, (-1, group)).mean(dim=2, keepdim=True) >= threshold
    chosen = near.expand(-1, -1, group).flatten(1)
    return tuple(tuple(layer.nonzero()[:, 0].tolist()) for layer in chosen)


def _part(bands: BandPattern | None, heads: Sequence[int]) -> BandPattern | None:
    if bands is None or not heads:
        return None
    chosen = tuple(bands.intervals[head] for head in heads)
    return BandPattern(chosen, bands.span, prefix=bands.prefix)


def _heads(tokens: Tensor, heads: Sequence[int], group: int) -> Tensor:
    """The keys or values that some query heads read."""
    return tokens[:, [head // group for head in heads]]
