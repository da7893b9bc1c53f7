"""Host-side description of one call (sizes, table of bands, positions), shared by the portable,
Hopper and decoding kernels. No choice of a kernel is made here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

from ..attention_call import CallForm
from . import tiles
from .arguments import Positions
from .constants import ConstantCache, int32_table

LOG2_E = math.log2(math.e)
MISSING, MAX_POSITION = tiles.MISSING.value, tiles.MAX_POSITION.value
NOWHERE = Positions(None, None, None, None)
_band_tables = ConstantCache[torch.Tensor](max_entries=1024)
_calls: ConstantCache[Call] = ConstantCache(max_entries=4096, copies=False)


class ForwardTensors(NamedTuple):
    """Tensors of a forward pass, `[B, H, tokens, D]`; it writes `out`, and `lse` `[B, H, Q]`. And
    `remainder`, unless that is None: what rounding takes from `out`, with its strides.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    sinks: torch.Tensor | None
    remainder: torch.Tensor | None = None


class BackwardTensors(NamedTuple):
    """Tensors of a backward pass, `[B, H, tokens, D]`; it writes the last three."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    d_out: torch.Tensor
    d_query: torch.Tensor
    d_key: torch.Tensor
    d_value: torch.Tensor


class PagedKeys(NamedTuple):
    """How the keys of documents are in a paged cache.

    Attributes:
        page: tokens of a block; 0 for keys that are in no cache.
        longest: keys of the longest document, or more.
    """

    page: int
    longest: int


CONTIGUOUS = PagedKeys(0, 0)


class Call:
    """Facts of one call; all but `positions` depend on shapes and the pattern alone.

    Args:
        query, key: `[B, H, Q, D]`, `[B, Hkv, K, D]`.
        intervals: the bands, `BandPattern.flat`.
        scale: factor of the scores.
        query_start: position of the first query, unless `positions` has it as a tensor.
        positions: `query_start` int32 `[]` or `[B]`, `key_start` int32 `[B]` or `[B, Q]`,
            `cu_seqlens_q` and `cu_seqlens_k` int32 `[documents + 1]`, each or None.
        prefix: number of keys of the pattern's prefix.
        has_all_keys: False for a part of the keys of its rows, as in `parts.py`.
        deterministic: whether the gradients must have the same bits on every run.
        paged: of documents whose keys are in a paged cache. `key` has the shape of as many keys
            as a row of the block table can name.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        intervals: Sequence[int],
        scale: float,
        query_start: int,
        positions: Positions,
        prefix: int = 0,
        *,
        has_all_keys: bool = True,
        deterministic: bool = True,
        paged: PagedKeys = CONTIGUOUS,
    ) -> None:
        check_query_start(query_start)
        self.batch, self.heads, self.queries, self.head_dim = query.shape
        _, self.key_heads, self.keys, _ = key.shape
        self.group = self.heads // self.key_heads
        self.dtype, self.itemsize, self.device = query.dtype, query.element_size(), query.device
        self.capability = compute_capability(query.device)
        self.intervals = tuple(intervals)
        # More than all keys is all keys: no kernel needs to be compiled for it.
        self.prefix = min(prefix, self.keys)
        second = zip(intervals[2::4], intervals[3::4])
        self.n_intervals = 2 if any(near < far for near, far in second) else 1
        self.bands = band_table(self.intervals, self.key_heads, query.device)
        self.bands_by_head, self.bands_by_key_head = self.bands.unbind()
        offsets = positions.cu_seqlens_q
        self.n_documents = 0 if offsets is None else offsets.shape[0] - 1
        self.positions = positions
        self.start_strides = start_strides(positions.query_start, positions.key_start)
        self.query_start = query_start
        self.has_all_keys, self.deterministic = has_all_keys, deterministic
        self.page, self.longest = paged
        self.precise = query.dtype == torch.float32
        self.scale = softmax_scale(scale, self.precise)
        # What launches make of these facts and of which positions there are, by name
        self.derived: dict[Hashable, Any] = {}

    def at(self, positions: Positions) -> Call:
        """The same call with other tensors of the same form as positions."""
        call = object.__new__(Call)
        call.__dict__.update(self.__dict__, positions=positions)
        return call

    @property
    def has_row_starts(self) -> bool:
        """True if first keys per query may describe documents of each row."""
        key_start = self.positions.key_start
        return (
            self.query_start == 0
            and self.positions.query_start is None
            and key_start is not None
            and key_start.dim() == 2
            and self.queries == self.keys
            and self.has_all_keys
        )

    def variant(self, name: str, positions: Positions, n_documents: int = 0) -> Call:
        """A copy with other tensors of positions, of `n_documents` documents in each batch entry.
        Copies of one name share what launches keep in `derived`.
        """
        found: Call | None = self.derived.get(name)
        if found is None:
            found = self.at(NOWHERE)  # not to hold these tensors
            found.derived, found.n_documents = {}, n_documents
            self.derived[name] = found
        return found.at(positions)

    @property
    def has_one_start(self) -> bool:
        """True if each document, or each batch entry from position 0, has one first key."""
        key_start = self.positions.key_start
        return (
            self.query_start == 0
            and self.positions.query_start is None
            and (key_start is None or key_start.dim() == 1)
            and (self.positions.cu_seqlens_q is None or self.n_documents > 0)
        )


def call_of(
    query: torch.Tensor,
    key: torch.Tensor,
    intervals: Sequence[int],
    scale: float,
    query_start: int,
    positions: Positions,
    prefix: int,
    form: CallForm | None = None,
    *,
    has_all_keys: bool = True,
    deterministic: bool = True,
    paged: PagedKeys = CONTIGUOUS,
) -> Call:
    """The `Call` with these arguments, made once per shape, pattern and form of positions; found
    by `form`, if that is given.
    """
    facts: Hashable = (form, deterministic)
    if form is None:
        intervals = tuple(intervals)
        given = tuple([None if each is None else (each.shape, each.stride()) for each in positions])
        shapes = query.shape, key.shape, query.dtype
        options = has_all_keys, deterministic, paged
        facts = (intervals, prefix, scale, query_start, shapes, given, *options)

    def make() -> Call:
        arguments = query, key, intervals, scale, query_start, positions, prefix
        made = Call(*arguments, has_all_keys=has_all_keys, deterministic=deterministic, paged=paged)
        made.positions = NOWHERE  # not to hold the tensors of the first call
        return made

    found = _calls.get(facts, query.device, make)
    return found if all(each is None for each in positions) else found.at(positions)


def band_table(intervals: tuple[int, ...], key_heads: int, device: torch.device) -> torch.Tensor:
    """int32 `[2, H, 8]` on the device: entries `head, near, far, near, far, 0, 0, 0`, those with
    the most work first.

    `table[0]` is in the order of the query heads' work, `table[1]` in that of the key heads, whose
    query heads are consecutive. Raises RuntimeError for a first call inside the capture of a CUDA
    graph.
    """
    return _band_tables.get(
        (intervals, key_heads),
        device,
        lambda: int32_table(sorted_bands(intervals, key_heads), device),
    )


def sorted_bands(intervals: tuple[int, ...], key_heads: int) -> list[list[list[int]]]:
    """The entries of `band_table`."""
    entries, work = [], []
    for head in range(len(intervals) // 4):
        entry = [head]
        edges = intervals[4 * head : 4 * head + 4]
        for near, far in (edges[:2], edges[2:]):
            if near < far:
                entry += [min(near, MISSING), min(far, MAX_POSITION)]
            else:
                entry += [MISSING, MISSING]
        entries.append([*entry, 0, 0, 0])
        work.append(edges[1] - edges[0] + edges[3] - edges[2])
    group = len(entries) // key_heads
    by_head = sorted(entries, key=lambda entry: -work[entry[0]])
    members = [range(first, first + group) for first in range(0, len(entries), group)]
    members.sort(key=lambda heads: -sum(work[head] for head in heads))
    return [by_head, [entries[head] for heads in members for head in heads]]


def ensure_inner_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same values without strides: kernels read consecutive sinks and offsets."""
    return None if tensor is None else tensor.contiguous()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which the device is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of a GPU, (0, 0) of AMD's; None for the CPU, where Triton's
    interpreter runs.
    """
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        # ROCm reports an architecture number, such as (9, 4) for MI300: that of Hopper to the rules
        # here, whose blocks exceed the 64 KiB of shared memory there.
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def check_query_start(query_start: int) -> None:
    """Raise ValueError for a position that does not fit the kernels' 32-bit arithmetic.

    The upper bound alone; `checks.py` refuses negative ones. PyTorch's operators ask again, since a
    compiled graph may call them with a new start.
    """
    if query_start > MAX_POSITION:
        raise ValueError(
            f"`query_start` must be at most {MAX_POSITION} in kernels, got {query_start}"
        )


def start_strides(
    query_start: torch.Tensor | None, key_start: torch.Tensor | None
) -> tuple[int, int, int]:
    """Stride of `query_start` `[]` or `[B]` along B, and of `key_start` `[B]` or `[B, Q]` along
    both; 0 where all batch entries or queries share one.
    """
    entry = 0 if query_start is None or query_start.dim() == 0 else query_start.stride(0)
    if key_start is None:
        return entry, 0, 0
    return entry, key_start.stride(0), key_start.stride(1) if key_start.dim() == 2 else 0


def softmax_scale(scale: float, precise: bool) -> float:
    """The factor of the scores in powers of two, or of e if `precise`. A scale of 0 becomes too
    small to matter, because -inf * 0 would be NaN.
    """
    return scale * (1.0 if precise else LOG2_E) if scale else 1e-30
