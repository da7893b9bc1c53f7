"""`spattention bench decode`: one query, or a few, against a long cache, beside dense decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import band_attention
from ..bands import BandPattern
from ..benchmarking import results, timing
from ..benchmarking.competitors import PATTERNS
from ..cache import BandStore
from ..cached_attention import band_attention_cached
from ..testing import Case, check_error, exact, plain
from .bounds import (
    LARGEST_GRID,
    LARGEST_HEAD_DIM,
    LARGEST_LENGTH,
    LARGEST_SEED,
    check_commit,
    check_each,
    check_output,
    check_range,
    check_size,
)
from .options.bench_decode import Options

DEVICE = "cuda"
MAX_QUERIES = 16  # of the decoding kernel
DENSE = {
    "dense FlashAttention": SDPBackend.FLASH_ATTENTION,
    "dense cuDNN": SDPBackend.CUDNN_ATTENTION,
    "dense efficient": SDPBackend.EFFICIENT_ATTENTION,
    "dense math": SDPBackend.MATH,
}
Attend = Callable[[], Any]  # gives the output


@dataclass(frozen=True)
class Row:
    """One line of the results. Times in milliseconds, speed in TB/s, memory in MiB."""

    batch: int
    length: int
    mask: str
    by: str
    layout: str
    time: float
    eager: float
    speed: float
    share_of_copy: float
    cache: float
    over_dense: float | None = None


class Cache(NamedTuple):
    """Queries `[B, H, Q, D]`, keys and values `[B, Hkv, N, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def token_bytes(self) -> int:
        """Bytes of key and value of one token in one key/value head."""
        return 2 * self.key.shape[3] * self.key.element_size()


def main(options: Options) -> None:
    """Measure, print, write."""
    check_options(options)
    timing.needs_gpu("bench decode")
    copy = timing.copy_speed()
    rows: list[Row] = []
    missing: list[str] = []
    for length in options.lengths:
        for batch in options.batches:
            rows += _measure_case(options, batch, length, copy, missing)
            torch.cuda.empty_cache()
            print(f"measured batch {batch}, length {length}", flush=True)
    record = results.run_header(options)
    record |= {"copy": copy, "missing": missing, "rows": [asdict(row) for row in rows]}
    notes = [
        f"A copy moves {copy:.2f} TB/s. Milliseconds, medians of graph replays (`eager`: of plain "
        "calls). TB/s count compulsory bytes; `x dense` is against the fastest dense decoding.",
        *(f"- not measured: {reason}" for reason in missing),
    ]
    results.show(notes[0], COLUMNS, rows)
    print("\n".join(notes[1:]))
    if options.output is not None:
        stem = results.write_page(options.output, "decode", record, ["", *notes], COLUMNS, rows)
        plot(stem.with_suffix(".png"), rows, record["environment"]["gpu"])
        print(f"wrote {stem}.json, .md and .png")


def check_options(options: Options) -> None:
    """Raise ValueError for an option that breaks a rule."""
    check_range(
        options,
        heads=(1, LARGEST_GRID),
        key_heads=(1, LARGEST_GRID),
        queries=(1, MAX_QUERIES),
        head_dim=(1, LARGEST_HEAD_DIM),
        seed=(0, LARGEST_SEED),
    )
    if options.key_heads is not None and options.heads % options.key_heads:
        raise ValueError(
            f"`--key-heads` must divide `--heads` = {options.heads}, got {options.key_heads}"
        )
    check_each("--lengths", options.lengths, options.queries, LARGEST_LENGTH)
    check_each("--batches", options.batches, 1, LARGEST_GRID)
    check_size(
        "--lengths",
        batch=max(options.batches),
        heads=options.key_heads or options.heads,
        length=max(options.lengths),
        head_dim=options.head_dim,
    )
    check_commit(options.commit)
    check_output(options.output)


def _measure_case(
    options: Options, batch: int, length: int, copy: float, missing: list[str]
) -> Iterator[Row]:
    """Dense decoding, then every pattern in both layouts; what does not run is named in
    `missing`.
    """
    cache = _cache(options, batch, length)
    key_heads = cache.key.shape[1]
    whole = batch * key_heads * length * cache.token_bytes

    def row(mask: str, by: str, layout: str, moved: int, held: int, attend: Attend) -> Row:
        time = timing.graph_milliseconds(attend)
        speed = moved / time / 1e9
        eager = timing.eager_milliseconds(attend)
        return Row(
            batch, length, mask, by, layout, time, eager, speed, speed / copy, held / 2**20
        )  # fmt: skip

    dense: list[Row] = []
    for name, attend in _dense(options, cache).items():
        try:
            dense.append(row("dense", name, "all keys", whole, whole, attend))
        except RuntimeError as error:  # no kernel of this back end for the case, or no memory
            reason = str(error).strip().splitlines()[0]
            missing.append(f"{name} at batch {batch}, length {length}: {reason}")
            torch.cuda.empty_cache()
    fastest = min(found.time for found in dense)
    yield from (replace(found, over_dense=fastest / found.time) for found in dense)
    for mask, make in PATTERNS.items():
        pattern = make(options.heads, length)
        moved = batch * cache.token_bytes * compulsory(pattern, key_heads, options.queries, length)
        store = _store(cache, pattern)
        layouts: dict[str, tuple[int, Attend]] = {
            "all keys": (whole, partial(band_attention, *cache, pattern)),
            "BandStore": (
                store.nbytes,
                partial(band_attention_cached, cache.query, store, pattern),
            ),
        }
        for layout, (held, attend) in layouts.items():
            check(cache, pattern, attend())
            found = row(mask, "spattention", layout, moved, held, attend)
            yield replace(found, over_dense=fastest / found.time)
        del store, layouts, attend


def _cache(options: Options, batch: int, length: int) -> Cache:
    generator = torch.Generator(DEVICE).manual_seed(options.seed)
    key_heads = options.key_heads or options.heads

    def draw(heads: int, tokens: int) -> Tensor:
        shape = (batch, heads, tokens, options.head_dim)
        made = torch.empty(shape, device=DEVICE, dtype=getattr(torch, options.dtype))
        for row in made:  # a row at a time: some of these tensors are large
            row.normal_(generator=generator)
        return made

    return Cache(
        draw(options.heads, options.queries), draw(key_heads, length), draw(key_heads, length)
    )


def _store(cache: Cache, pattern: BandPattern) -> BandStore:
    """A store that has taken up the whole text."""
    batch, key_heads, _, head_dim = cache.key.shape
    store = BandStore(
        pattern, batch, key_heads, head_dim, dtype=cache.key.dtype, device=cache.key.device
    )
    store.append(cache.key, cache.value)
    return store


def _dense(options: Options, cache: Cache) -> dict[str, Attend]:
    """Attention to all keys, as a single query has it: later queries of several see a little too
    much, which costs nothing.
    """
    query, key, value = cache.query, cache.key, cache.value
    grouped = query.shape[1] != key.shape[1]

    def through(backend: SDPBackend) -> Attend:
        def attend() -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, enable_gqa=grouped
                )

        return attend

    found = {name: through(backend) for name, backend in DENSE.items()}
    if options.flex:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        # Its kernel for few queries does not compile for tensors of 2^31 elements and more.
        rows = max(1, (2**31 - 1) // key[0].numel())

        def flex() -> Tensor:
            parts = zip(*(tensor.split(rows) for tensor in (query, key, value)))
            return torch.cat([compiled(q, k, v, enable_gqa=grouped) for q, k, v in parts])

        found["FlexAttention"] = flex
    return found


def compulsory(pattern: BandPattern, key_heads: int, queries: int, length: int) -> int:
    """Keys that some of the last `queries` queries of a text see, over all key/value heads."""
    seen = pattern.mask(queries, length).any(dim=1)
    return int(seen.unflatten(0, (key_heads, -1)).any(dim=1).sum())


def check(cache: Cache, pattern: BandPattern, out: Tensor) -> None:
    """The correctness gate: first and last rows and heads against float64, within the budget of
    `testing.py`.
    """
    batch, heads = cache.query.shape[:2]
    group = heads // cache.key.shape[1]
    for row in {0, batch - 1}:
        for head in {0, heads // 2, heads - 1}:
            one = slice(row, row + 1), slice(head, head + 1)
            keys = slice(row, row + 1), slice(head // group, head // group + 1)
            case = Case(
                cache.query[one], cache.key[keys], cache.value[keys], pattern.heads(head, head + 1)
            )
            name = f"row {row}, head {head}"
            check_error(name, out[one], plain(case)["out"], exact(case)["out"])


COLUMNS: dict[str, Callable[[Row], str]] = {
    "B, N": lambda row: f"{row.batch}, {row.length}",
    "mask": lambda row: row.mask,
    "by": lambda row: row.by,
    "layout": lambda row: row.layout,
    "ms": lambda row: f"{row.time:.4f}",
    "eager ms": lambda row: f"{row.eager:.4f}",
    "TB/s": lambda row: f"{row.speed:.2f}",
    "of a copy": lambda row: f"{row.share_of_copy:.0%}",
    "cache MiB": lambda row: f"{row.cache:.0f}",
    "x dense": lambda row: "" if row.over_dense is None else f"{row.over_dense:.2f}",
}


def plot(path: Path, rows: list[Row], gpu: str) -> None:
    """Time over the length of the text, one panel for each batch size."""
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(row.batch for row in rows))
    figure = Figure(figsize=(4.5 * len(batches), 4.5), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches):
        shown = [row for row in rows if row.batch == batch]
        for name in dict.fromkeys((row.by, row.mask, row.layout) for row in shown):
            line = sorted((r.length, r.time) for r in shown if (r.by, r.mask, r.layout) == name)
            style = "--^" if name[1] == "dense" else "-o" if name[2] == "BandStore" else ":s"
            label = name[0] if name[1] == "dense" else f"{name[1]}, {name[2]}"
            axes.plot(*zip(*line), style, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of the text")
        axes.set_title(f"batch {batch}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("milliseconds for one step of decoding")
    lines, names = figure.axes[-1].get_legend_handles_labels()
    figure.legend(lines, names, fontsize="small", loc="outside right center")
    figure.suptitle(f"Decoding on {gpu}")
    figure.savefig(path, dpi=160)
