"""Speed of one model: the first pass over a text, and steps of decoding; bytes of its cache.

The first pass is timed between events, after one that warms up. A step of decoding is a replay of a
CUDA graph, so that the host's time does not count: it is the same for all rows. On a CPU both are
timed by the host's clock. Dense attention is PyTorch's, cuDNN first, with Transformers' caches; the
row `dense-bands` attends to all distances with the kernels that the bands have.

Nothing is timed before it is right: every layer's bands are compared with a dense mask, and a step
of decoding with a pass over the whole text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, StaticCache

import spattention as spa
from spattention.bands import BandPattern
from spattention.benchmarking.timing import (
    cache_bytes,
    eager_milliseconds,
    graph_milliseconds,
    wall_seconds,
)
from spattention.hf.config import read_section

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
TOKENS = 32_768  # of a first pass, all texts together
STEPS = 512  # room for the steps that are timed, within the longest text
TEXTS, CHECKED = 4, 1024  # texts that are checked, and their tokens
FAR = {torch.bfloat16: 0.05, torch.float32: 1e-3}  # relative distance of logits that is too much


@torch.no_grad()
def speed(model: Any, long: Tensor, lengths: tuple[int, ...], rows: int) -> dict[str, Any]:
    """Milliseconds and tokens per second, and the share of pairs at each length.

    Args:
        model: dense or with bands, on its device.
        long: texts, int64 `[W, longest]`.
        lengths: tokens of a first pass; decoding is at the longest, less the steps.
        rows: texts that are decoded together.

    Raises:
        ValueError: if a result is wrong.
    """
    model.eval()
    found: dict[str, Any] = {"errors": check(model, long)}
    longest = max(lengths)
    with sdpa_kernel(BACKENDS, set_priority=True):
        found["prefill"] = {str(length): _prefill(model, long, length) for length in lengths}
    found["decode"] = {str(longest): _decode(model, long, longest, rows)}
    for length in lengths:
        found["prefill"][str(length)]["pairs"] = _pairs(model, length)
    return found


def check(model: Any, long: Tensor) -> dict[str, float]:
    """Relative distances of the bands and of a step of decoding; raises where they are too far."""
    length = min(CHECKED, long.shape[1])
    ids = long[:TEXTS, :length].to(model.device)
    whole = _centred(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits)
    cache = _cache(model, length)
    model(input_ids=ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    step = _centred(model(input_ids=ids[:, -1:], past_key_values=cache).logits)
    found = {"decode": _distance(step, whole)}
    patterns = {each for each in _patterns(model) if each is not None}
    shape = model.config.num_key_value_heads, length, model.config.head_dim
    distances = [_of_bands(pattern, shape, model) for pattern in patterns]
    if distances:
        found["bands"] = max(distances)
    for name, distance in found.items():
        if not distance <= FAR[model.dtype]:
            raise ValueError(
                f"`{name}` must be within {FAR[model.dtype]} of what is right, got {distance:.3g}"
            )
    return found


def _of_bands(pattern: BandPattern, shape: tuple[int, int, int], model: Any) -> float:
    """Distance of `band_attention` from PyTorch's attention with a dense mask, in float32."""
    heads, length, size = shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, length, size, generator=generator).to(model.device, model.dtype)
        for count in (pattern.num_heads, heads, heads)
    )
    out = spa.band_attention(query, key, value, pattern)
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    group = pattern.num_heads // heads
    key, value = (each.float().repeat_interleave(group, dim=1) for each in (key, value))
    mask = pattern.mask(length, device=model.device)
    wanted = scaled_dot_product_attention(query.float(), key, value, attn_mask=mask)
    # A row without keys is 0 in bands, and not a number there.
    return _distance(out, wanted.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0))


def _prefill(model: Any, long: Tensor, length: int) -> dict[str, float]:
    rows = max(1, TOKENS // length)
    ids = _texts(long, rows, length).to(model.device)
    bands = spa.hf.BandCache(model.config) if _has_bands(model) else None

    def run() -> None:
        if bands is not None:
            bands.reset()
        cache = DynamicCache(config=model.config) if bands is None else bands
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    taken = milliseconds(run, model.device, replayed=False)
    return {"rows": rows, "milliseconds": taken, "tokens_per_second": 1e3 * ids.numel() / taken}


def _decode(model: Any, long: Tensor, length: int, rows: int) -> dict[str, float]:
    """A step of all rows after `length` tokens, less the room that the steps take."""
    steps = min(STEPS, length // 2)
    ids = _texts(long, rows, length - steps).to(model.device)
    cache = _cache(model, length)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, :1].clone()

    def step() -> None:
        model(input_ids=token, past_key_values=cache)

    taken = milliseconds(step, model.device, replayed=True)
    return {
        "rows": rows,
        "tokens": length - steps,
        "milliseconds": taken,
        "tokens_per_second": 1e3 * rows / taken,
        "cache_bytes": cache_bytes(cache) / rows,
    }


def milliseconds(call: Callable[[], None], device: torch.device, *, replayed: bool) -> float:
    """Median time of a call: of a recorded graph or of plain calls, on the CPU by the clock."""
    if device.type != "cuda":
        return 1e3 * wall_seconds(call, 3)
    return graph_milliseconds(call) if replayed else eager_milliseconds(call)


def _texts(long: Tensor, rows: int, length: int) -> Tensor:
    """`rows` texts; the same ones again where there are too few."""
    return long[torch.arange(rows) % len(long), :length]


def _cache(model: Any, length: int) -> Any:
    if _has_bands(model):
        return spa.hf.BandCache(model.config)
    return StaticCache(config=model.config, max_cache_len=length)


def _has_bands(model: Any) -> bool:
    return read_section(model.config) is not None


def _patterns(model: Any) -> list[BandPattern | None]:
    section = read_section(model.config)
    return [] if section is None else list(section.layer_patterns)


def _pairs(model: Any, length: int) -> float:
    """Attended pairs as a share of dense attention's."""
    patterns = _patterns(model)
    whole = length * (length + 1) / 2
    shares = [
        1.0 if each is None else sum(each.pairs(length)) / (each.num_heads * whole)
        for each in patterns
    ]
    return sum(shares) / len(shares) if shares else 1.0


def _centred(logits: Tensor) -> Tensor:
    logits = logits[:, -1].float()
    return logits - logits.mean(dim=-1, keepdim=True)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())
