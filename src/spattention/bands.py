"""Patterns of attention made of bands of distances.

A pattern gives every head up to two half-open intervals of distances `[near, far)`, in tokens. The
query at position `p` sees the key at position `j` when `p - j` lies in one of its head's intervals.
With a prefix it also sees the first few keys, at any distance.

A worked mask: `BandPattern.exclusive(num_heads=2, span=4)`; rows are queries, columns keys, `#` is
attended.

    head 0: [0, 2)    head 1: [2, 4)
    # . . .           . . . .
    # # . .           . . . .
    . # # .           # . . .
    . . # #           # # . .

The same with `prefix=1`, the first token in every head:

    head 0: [0, 2)    head 1: [2, 4)
    # . . .           # . . .
    # # . .           # . . .
    # # # .           # . . .
    # . # #           # # . .
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .constructor import differs, plain
from .scalars import as_int
from .widths import Interval, Widths, band_edges, integer, integers, local_windows, merged

Intervals = tuple[tuple[Interval, ...], ...]

FORMAT_VERSIONS = (1, 2)  # without and with a prefix
MAX_INTERVALS = 2  # more would change the kernels' table (`impl/triton/call.py`), rings and fitting
MAX_SPAN = 2**31 - 1  # positions are int32
MAX_HEADS = 2**20
MAX_MASK = 2**36  # elements of a mask; no machine holds the distances of more


@dataclass(frozen=True, repr=False)
class BandPattern:
    """Which distances each head attends.

    Args:
        intervals: per head, up to two intervals `(near, far)` of distances in tokens,
            `0 <= near < far <= span`, sorted and apart (at least one distance between
            them). `()` is a head without keys.
        span: the context length, in tokens, that the pattern was made for, below `2**31`. Distances
            `>= span` are never attended. It belongs to the pattern and never depends on the length
            of the input.
        constructor: how a named constructor was called, except `prefix`; for reading only. Equality
            and hash look at `span`, `intervals` and `prefix`.
        prefix: number of first keys that every query of a head with intervals sees as well, from 0
            to `span`. They are the first that the query may see at all: those of its document. A
            key that a band covers too counts once.

    Raises:
        ValueError: if an interval is empty, negative, unsorted, overlapping, touching, or reaches
            beyond `span`, if there are more than 2**20 heads, or if `prefix` is not an int from 0
            to `span`.
    """

    intervals: Intervals = field(compare=False)
    span: int = field(compare=False)
    constructor: Mapping[str, Any] | None = field(default=None, compare=False)
    prefix: int = field(default=0, kw_only=True, compare=False)
    _flat: tuple[int, ...] = field(default=(), init=False, compare=False)
    # Equality compares text: torch.compile takes integers that differ between calls for variables.
    _key: str = field(default="", init=False)

    def __post_init__(self) -> None:
        span = _span(self.span)
        heads = _heads(self.intervals)
        if not heads:
            raise ValueError("`intervals` must hold at least one head, got none")
        if len(heads) > MAX_HEADS:
            raise ValueError(f"`intervals` must hold at most {MAX_HEADS} heads, got {len(heads)}")
        for h, head in enumerate(heads):
            _check_head(h, head, span)
        object.__setattr__(self, "intervals", heads)
        object.__setattr__(self, "span", span)
        object.__setattr__(self, "prefix", _prefix(self.prefix, span))
        object.__setattr__(self, "constructor", plain(self.constructor))
        padded = ((*head, *((0, 0),) * (MAX_INTERVALS - len(head))) for head in heads)
        flat = tuple(edge for head in padded for interval in head for edge in interval)
        object.__setattr__(self, "_flat", flat)
        object.__setattr__(self, "_key", repr((self.span, self.prefix, flat)))

    @classmethod
    def dense(cls, num_heads: int, span: int, *, prefix: int = 0) -> BandPattern:
        """Every head attends `[0, span)`: ordinary causal attention. For `prefix` see
        `BandPattern`."""
        num_heads, span, _ = _size(num_heads, span)
        return cls._named("dense", [((0, span),)], num_heads, span, prefix)

    @classmethod
    def sliding_window(
        cls, num_heads: int, span: int, window: int, *, prefix: int = 0
    ) -> BandPattern:
        """Every head attends the nearest `window` tokens, itself included: `[0, window)`,
        `1 <= window <= span`. For `prefix` see `BandPattern`."""
        num_heads, span, _ = _size(num_heads, span)
        window = integer("window", window)
        if not 1 <= window <= span:
            raise ValueError(f"`window` must be between 1 and `span` = {span}, got {window}")
        bands = [((0, window),)]
        return cls._named("sliding_window", bands, num_heads, span, prefix, window=window)

    @classmethod
    def exclusive(
        cls,
        num_heads: int,
        span: int,
        *,
        widths: Widths = "uniform",
        first: int | None = None,
        kv_heads: int | None = None,
        prefix: int = 0,
    ) -> BandPattern:
        """Head h attends only its own band `[S_h, S_h + W_h)`: Eqs. 2-4 of Zhao et al.,
        arXiv:2511.09596.

        The heads are disjoint and together cover every distance in `[0, span)`. Without a prefix
        queries `i < S_h` see no key.

        Args:
            num_heads: number of heads H.
            span: context length N, in tokens.
            widths: `"uniform"` (the paper), `"geometric"` (edges grow by a constant ratio),
                `"equal_work"` (every head has about the same number of attended pairs), or H + 1
                edges from 0 to `span` that never decrease.
            first: width of the first geometric band, in tokens; default `max(1, span // 128)`. Only
                for `"geometric"`.
            kv_heads: number of bands G, which divides H; default H. Query head h has band
                `h // (H // G)`, as it reads the key/value head of that number in grouped-query
                attention. "Heads" above then means bands: G + 1 edges.
            prefix: see `BandPattern`.
        """
        num_heads, span, groups = _size(num_heads, span, kv_heads)
        widths = widths if isinstance(widths, str) else integers("widths", widths)
        edges = band_edges(groups, span, widths, first)
        bands = [merged([band], span) for band in zip(edges, edges[1:])]
        given = {"widths": widths, "first": first, "kv_heads": kv_heads}
        return cls._named("exclusive", bands, num_heads, span, prefix, **given)

    @classmethod
    def shared_local(
        cls,
        num_heads: int,
        span: int,
        *,
        widths: Widths = "uniform",
        local: int | Sequence[int] | None = None,
        first: int | None = None,
        kv_heads: int | None = None,
        prefix: int = 0,
    ) -> BandPattern:
        """Head h attends a local window `[0, local_h)` and its own band: the form that the paper's
        code runs.

        Args:
            num_heads: number of heads H.
            span: context length N, in tokens.
            widths: see `exclusive`.
            local: size of the local window in tokens, one for all heads or one per head, at least
                0. Default: the uniform band width plus one, `W_h + 1`; for `"geometric"` widths
                `min(span, max(128, span // 32))`, which is everything for a span of up to 128.
            first: see `exclusive`.
            kv_heads: see `exclusive`; `local` is then one size or one per band.
            prefix: see `BandPattern`.
        """
        num_heads, span, groups = _size(num_heads, span, kv_heads)
        widths = widths if isinstance(widths, str) else integers("widths", widths)
        whole = as_int(local)
        if whole is not None:
            local = whole
        elif isinstance(local, Iterable):
            local = integers("local", local)
        edges = band_edges(groups, span, widths, first)
        windows = local_windows(groups, span, widths, local, per="band" if kv_heads else "head")
        bands = [
            merged([(0, window), band], span)
            for window, band in zip(windows, zip(edges, edges[1:]))
        ]
        given = {"widths": widths, "local": local, "first": first, "kv_heads": kv_heads}
        return cls._named("shared_local", bands, num_heads, span, prefix, **given)

    @classmethod
    def gapped(
        cls, num_heads: int, span: int, *, kv_heads: int | None = None, prefix: int = 0
    ) -> BandPattern:
        """Head h attends the nearer half of its uniform band, `[S_h, S_h + W_h // 2)`: the ablation
        GBHALF. For `kv_heads` and `prefix` see `exclusive`."""
        num_heads, span, groups = _size(num_heads, span, kv_heads)
        edges = band_edges(groups, span, "uniform", None)
        bands = [
            merged([(near, near + (far - near) // 2)], span) for near, far in zip(edges, edges[1:])
        ]
        return cls._named("gapped", bands, num_heads, span, prefix, kv_heads=kv_heads)

    @classmethod
    def local_only(
        cls, num_heads: int, span: int, *, kv_heads: int | None = None, prefix: int = 0
    ) -> BandPattern:
        """Head h attends `[0, W_h + 1)`, W_h its uniform width: the ablation published as "sliding
        window". For `kv_heads` and `prefix` see `exclusive`."""
        num_heads, span, groups = _size(num_heads, span, kv_heads)
        windows = local_windows(groups, span, "uniform", None)
        bands = [merged([(0, window)], span) for window in windows]
        return cls._named("local_only", bands, num_heads, span, prefix, kv_heads=kv_heads)

    @classmethod
    def _named(
        cls,
        name: str,
        bands: Sequence[tuple[Interval, ...]],
        num_heads: int,
        span: int,
        prefix: int,
        **arguments: Any,
    ) -> BandPattern:
        """The pattern of a constructor. Neighbouring heads share a band, equal numbers of them."""
        heads = tuple(band for band in bands for _ in range(num_heads // len(bands)))
        given = {"name": name, "num_heads": num_heads, "span": span, **arguments}
        constructor = {key: value for key, value in given.items() if value is not None}
        return cls(heads, span, constructor, prefix=prefix)

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return len(self.intervals)

    @property
    def recipe(self) -> Mapping[str, Any] | None:
        """Former name of `constructor`; files keep it."""
        return self.constructor

    @property
    def flat(self) -> tuple[int, ...]:
        """`near, far, near, far` per head, 4 * num_heads integers; a missing interval is `0, 0`.
        For operators, which need `prefix` beside it."""
        return self._flat

    def heads(self, start: int, stop: int) -> BandPattern:
        """The pattern of heads `start` to `stop - 1`, for tensor parallelism."""
        start, stop = integer("start", start), integer("stop", stop)
        if not 0 <= start < stop <= self.num_heads:
            raise ValueError(
                f"`start` and `stop` must satisfy 0 <= start < stop <= {self.num_heads} "
                "(the number of heads), "
                f"got {start} and {stop}"
            )
        constructor = None
        if self.constructor is not None:
            offset = self.constructor.get("heads", (0,))[0]
            constructor = {**self.constructor, "heads": (offset + start, offset + stop)}
        return BandPattern(self.intervals[start:stop], self.span, constructor, prefix=self.prefix)

    def mask(
        self,
        query_len: int,
        key_len: int | None = None,
        *,
        query_start: int | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Dense mask, bool `[num_heads, query_len, key_len]`, True where the query sees the key.
        The prefix is the first keys.

        Args:
            query_len: number of queries Q.
            key_len: number of keys K; default `query_len`.
            query_start: position of the first query; default `key_len - query_len` (the queries are
                the last positions).
            device: device of the mask.
        """
        query_len = integer("query_len", query_len)
        key_len = query_len if key_len is None else integer("key_len", key_len)
        if query_len < 0 or key_len < 0:
            raise ValueError(
                f"`query_len` and `key_len` must not be negative, got {query_len} and {key_len}"
            )
        if query_start is None:
            if query_len > key_len:
                raise ValueError(
                    f"`query_len` must be at most `key_len` when `query_start` is not given, "
                    f"got {query_len} and {key_len}"
                )
            query_start = key_len - query_len
        longest = max(query_len, key_len)
        if longest > MAX_SPAN or self.num_heads * query_len * key_len > MAX_MASK:
            raise ValueError(
                f"`mask` must have at most {MAX_SPAN} queries and keys and {MAX_MASK} elements, "
                f"got {self.num_heads} x {query_len} x {key_len}"
            )
        query_start = integer("query_start", query_start)
        if abs(query_start) > MAX_SPAN:
            raise ValueError(f"`query_start` must be at most {MAX_SPAN}, got {query_start}")
        positions = torch.arange(query_len, device=device) + query_start
        keys = torch.arange(key_len, device=device)
        return attended(self.intervals, self.prefix, positions[:, None] - keys, keys)

    def pairs(self, seq_len: int) -> tuple[int, ...]:
        """Attended (query, key) pairs per head in causal self-attention over `seq_len` tokens: the
        unit of work. A key of the prefix that a band covers too counts once."""
        seq_len = integer("seq_len", seq_len)
        if seq_len < 0:
            raise ValueError(f"`seq_len` must not be negative, got {seq_len}")

        def at_least(distance: int) -> int:
            rows = max(0, seq_len - distance)
            return rows * (rows + 1) // 2

        # The keys after the prefix have the pairs of a text that is shorter by the prefix.
        in_prefix = at_least(0) - at_least(self.prefix)
        return tuple(
            (in_prefix if head else 0)
            + sum(at_least(near + self.prefix) - at_least(far + self.prefix) for near, far in head)
            for head in self.intervals
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON: version, span and resolved intervals; the constructor's arguments
        beside them. Version 1 without a prefix, version 2 with one."""
        prefix = {"prefix": self.prefix} if self.prefix else {}
        return {
            "version": 2 if self.prefix else 1,
            "span": self.span,
            "intervals": [[list(interval) for interval in head] for head in self.intervals],
            **prefix,
            "recipe": None if self.constructor is None else dict(self.constructor),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BandPattern:
        """The pattern that `to_dict` wrote. The intervals are what counts; the constructor's
        arguments are kept for reading, and left out with a warning if they give other intervals.

        Raises:
            ValueError: if the version is not known, or an entry is missing or breaks a rule of
                `BandPattern`.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a pattern must be a mapping, got {type(data).__name__}")
        version = data.get("version")
        if type(version) is not int or version not in FORMAT_VERSIONS:
            raise ValueError(
                f"the pattern's `version` must be one of {FORMAT_VERSIONS} (those this library "
                f"writes), got {version!r}"
            )
        if version == 1 and "prefix" in data:
            raise ValueError(
                f"a pattern of `version` 1 must have no `prefix`, got {data['prefix']!r}"
            )
        needed = ("span", "intervals", "prefix") if version == 2 else ("span", "intervals")
        missing = [name for name in needed if name not in data]
        if missing:
            raise ValueError(
                f"the pattern lacks {missing}, got the entries {sorted(map(str, data))}"
            )
        prefix = data.get("prefix", 0)
        pattern = cls(data["intervals"], data["span"], data.get("recipe"), prefix=prefix)
        if not differs(pattern):
            return pattern
        warnings.warn(
            f"the pattern's `recipe` must give its `intervals`, got {pattern}, which does not: "
            "the intervals count, and the recipe is left out",
            stacklevel=2,
        )
        return cls(pattern.intervals, pattern.span, prefix=prefix)

    def __repr__(self) -> str:
        arguments: dict[str, Any]
        if self.constructor is None:
            arguments = {"intervals": self.intervals, "span": self.span}
        else:
            other = ("name", "heads", "prefix")
            arguments = {k: v for k, v in self.constructor.items() if k not in other}
        if self.prefix:
            arguments["prefix"] = self.prefix
        text = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        if self.constructor is None:
            return f"BandPattern({text})"
        part = self.constructor.get("heads")
        suffix = f".heads({part[0]}, {part[1]})" if part else ""
        return f"BandPattern.{self.constructor['name']}({text}){suffix}"


def attended(
    intervals: Intervals, prefix: int, distance: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """The keys that each head attends, by band or prefix: bool `[..., num_heads, Q, K]`.

    Args:
        intervals: the bands of each head.
        prefix: number of first keys that every head with bands attends.
        distance: int `[..., Q, K]`, from the query to the key.
        place: int, broadcast to `[..., Q, K]`: index of the key among those that the query may see.
    """
    seen = in_bands(distance, intervals)
    if not prefix:
        return seen
    in_prefix = (place >= 0) & (place < prefix) & (distance >= 0)
    attends = torch.tensor([bool(head) for head in intervals], device=distance.device)
    return seen | (in_prefix.unsqueeze(-3) & attends[:, None, None])


def in_bands(distance: torch.Tensor, intervals: Intervals) -> torch.Tensor:
    """Membership of distances in a head's intervals: int `[..., Q, K]` to bool
    `[..., num_heads, Q, K]`."""
    heads = []
    for head in intervals:
        seen = torch.zeros_like(distance, dtype=torch.bool)
        for near, far in head:
            seen = seen | ((distance >= near) & (distance < far))
        heads.append(seen)
    return torch.stack(heads, dim=-3)


def _check_head(head: int, intervals: tuple[Interval, ...], span: int) -> None:
    where = f"`intervals` of head {head}"
    if len(intervals) > MAX_INTERVALS:
        raise ValueError(f"{where} must be at most {MAX_INTERVALS}, got {len(intervals)}")
    for near, far in intervals:
        if near < 0:
            raise ValueError(f"{where} must not be negative, got ({near}, {far})")
        if near >= far:
            raise ValueError(f"{where} must not be empty (near < far), got ({near}, {far})")
        if far > span:
            raise ValueError(f"{where} must end within `span` = {span}, got ({near}, {far})")
    for (_, far), (near, _) in zip(intervals, intervals[1:]):
        if near <= far:
            raise ValueError(
                f"{where} must be sorted and apart (join those that overlap or touch), got "
                f"{intervals}"
            )


def _size(num_heads: int, span: int, kv_heads: int | None = None) -> tuple[int, int, int]:
    """Heads and span as ints, and the number of bands: `kv_heads`, or one per head."""
    num_heads = integer("num_heads", num_heads)
    if not 1 <= num_heads <= MAX_HEADS:
        rule = "at least 1" if num_heads < 1 else f"at most {MAX_HEADS}"
        raise ValueError(f"`num_heads` must be {rule}, got {num_heads}")
    span = _span(span)
    groups = num_heads if kv_heads is None else integer("kv_heads", kv_heads)
    if groups < 1 or num_heads % groups:
        raise ValueError(
            f"`kv_heads` must be at least 1 and divide `num_heads` = {num_heads}, got {kv_heads}"
        )
    return num_heads, span, groups


def _span(span: Any) -> int:
    """`span` as an int, within its limits: what is made for it takes memory by its size."""
    span = integer("span", span)
    if not 1 <= span <= MAX_SPAN:
        rule = "at least 1" if span < 1 else f"at most {MAX_SPAN}"
        raise ValueError(f"`span` must be {rule}, got {span}")
    return span


def _prefix(prefix: Any, span: int) -> int:
    prefix = integer("prefix", prefix)
    if not 0 <= prefix <= span:
        raise ValueError(f"`prefix` must be between 0 and `span` = {span}, got {prefix}")
    return prefix


def _heads(intervals: Any) -> Intervals:
    try:
        pairs = [[(near, far) for near, far in head] for head in intervals]
    except (TypeError, ValueError):
        rule = "`intervals` must be, per head, a sequence of pairs (near, far)"
        raise ValueError(f"{rule}, got {reprlib.repr(intervals)}") from None
    as_integer = partial(integer, "intervals")
    return tuple(tuple((as_integer(near), as_integer(far)) for near, far in head) for head in pairs)
