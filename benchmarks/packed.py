"""Time attention over packed documents on a GPU, beside the same documents unpacked.

Documents have log-normal lengths (sigma 1) and fill one row. Every pattern is checked against the
portable kernels, whose results the tests compare with float64, and is then timed by graph replay:

- `packed`: `band_attention_varlen` over the row, with the kernels that it gets;
- `portable`: the same with the portable kernels;
- `unpacked`: the documents in batches by length class (powers of two), each with its mean length:
  what the kernels reach without packing;
- `flex`: compiled FlexAttention with a block mask of bands and documents (`--flex`).

    python -m benchmarks.packed --output results.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import spattention as spa
from spattention.benchmarking.attend import Inputs
from spattention.benchmarking.competitors import PATTERNS
from spattention.benchmarking.results import environment, write_rows
from spattention.benchmarking.timing import graph_milliseconds, needs_gpu
from spattention.impl.triton import launch

HEADS, HEAD_DIM, REST = 16, 128, 0.1


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds, and useful TFLOP/s forward + backward."""

    documents: int
    mean: int
    tokens: int
    span: int
    key_heads: int
    pattern: str
    by: str
    forward: float
    total: float
    useful: float
    kernels: str = ""


def document_lengths(mean: int, count: int, longest: int = 65536) -> list[int]:
    """Log-normal lengths with this mean, sigma 1, seed 0."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(0))
    lengths = torch.exp(normal) * (mean / torch.exp(normal).mean())
    return [max(1, min(longest, round(each))) for each in lengths.tolist()]


def patterns(span: int) -> dict[str, spa.BandPattern]:
    return {name: make(HEADS, span) for name, make in PATTERNS.items()}


def tensors(tokens: int, key_heads: int, batch: int = 0) -> Inputs:
    """query, key, value, d_out: `[T, H, D]`, or `[B, H, T, D]` with a batch."""
    generator = torch.Generator("cuda").manual_seed(0)

    def tensor(heads: int) -> torch.Tensor:
        shape = (batch, heads, tokens, HEAD_DIM) if batch else (tokens, heads, HEAD_DIM)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    query, key, value = (tensor(heads).requires_grad_() for heads in (HEADS, key_heads, key_heads))
    return query, key, value, tensor(HEADS)


def times(attend: Callable[[], torch.Tensor], inputs: Inputs) -> tuple[float, float]:
    """Milliseconds of the forward pass, and of forward + backward."""

    def forward() -> None:
        with torch.no_grad():
            attend()

    def total() -> None:
        torch.autograd.grad(attend(), inputs[:3], inputs[3])

    return graph_milliseconds(forward, rest=REST), graph_milliseconds(total, rest=REST)


def attend_rows(
    inputs: Inputs, pattern: spa.BandPattern, key_start: torch.Tensor | None = None
) -> torch.Tensor:
    """The output of rows of one length."""
    out = spa.band_attention(*inputs[:3], pattern, key_start=key_start, impl="triton")
    assert isinstance(out, torch.Tensor)
    return out


def attend_packed(
    inputs: Inputs, pattern: spa.BandPattern, offsets: torch.Tensor, longest: int
) -> torch.Tensor:
    """The output of documents one after another."""
    out = spa.band_attention_varlen(
        *inputs[:3], pattern, offsets, offsets, longest, longest, impl="triton"
    )
    assert isinstance(out, torch.Tensor)
    return out


def unpacked(
    pattern: spa.BandPattern, lengths: list[int], key_heads: int
) -> tuple[float, float, float]:
    """Milliseconds forward and in total, and useful FLOP, of all length classes together."""
    classes: dict[int, list[int]] = {}
    for length in lengths:
        classes.setdefault(length.bit_length(), []).append(length)
    forward = total = work = 0.0
    for members in classes.values():
        length = round(sum(members) / len(members))
        inputs = tensors(length, key_heads, len(members))
        found = times(partial(attend_rows, inputs, pattern), inputs)
        forward, total = forward + found[0], total + found[1]
        work += 14 * HEAD_DIM * sum(pattern.pairs(length)) * len(members)
    return forward, total, work


def flex(
    pattern: spa.BandPattern, offsets: torch.Tensor, inputs: Inputs
) -> Callable[[], torch.Tensor]:
    """FlexAttention on the same mask, `[T, H, D]`."""
    tokens = inputs[0].shape[0]
    document = torch.searchsorted(offsets[1:], torch.arange(tokens, device="cuda"), right=True)
    edges = torch.tensor(pattern.flat, device="cuda").view(-1, 4)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        d = q - k
        band = edges[h]
        seen = (d >= band[0]) & (d < band[1]) | (d >= band[2]) & (d < band[3])
        return seen & (d >= 0) & (document[q] == document[k])

    blocks = create_block_mask(mask, None, HEADS, tokens, tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)

    def attend() -> torch.Tensor:
        query, key, value = (each.transpose(0, 1)[None] for each in inputs[:3])
        grouped = key.shape[1] != query.shape[1]
        out: torch.Tensor = compiled(query, key, value, block_mask=blocks, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return attend


def check(found: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    """Raise RuntimeError if two kernels differ by more than half precision explains."""
    for name, a, b in zip(("out", "d_query", "d_key", "d_value"), found, expected):
        error = ((a - b).float().norm() / b.float().norm()).item()
        if not error < 0.01:
            raise RuntimeError(f"{what}: {name} is off by {error}")


def measured(mean: int, count: int, span: int, key_heads: int, with_flex: bool) -> Iterator[Row]:
    lengths = document_lengths(mean, count)
    tokens = sum(lengths)
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    inputs = tensors(tokens, key_heads)
    longest = max(lengths)
    for name, pattern in patterns(span).items():
        attend = partial(attend_packed, inputs, pattern, offsets, longest)

        def results(pattern: spa.BandPattern = pattern) -> list[torch.Tensor]:
            x = tensors(tokens, key_heads)  # others than those that a graph captures
            out = attend_packed(x, pattern, offsets, longest)
            return [out.detach(), *torch.autograd.grad(out, x[:3], x[3])]

        work = 14 * HEAD_DIM * sum(sum(pattern.pairs(length)) for length in lengths)
        facts = (count, mean, tokens, span, key_heads, name)

        def row(by: str, forward: float, total: float, kernels: str = "") -> Row:
            return Row(*facts, by, forward, total, work / total / 1e9, kernels)  # noqa: B023

        kernels = spa.explain(
            *inputs[:3],
            pattern,
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            impl="triton",
        ).kernels
        found = results()
        with mock.patch.object(launch.hopper, "plan", return_value=None):
            expected = results()
            check(found, expected, f"{name}, packed")
            yield row("portable", *times(attend, inputs))
        yield row("packed", *times(attend, inputs), kernels)
        forward, total, flop = unpacked(pattern, lengths, key_heads)
        yield Row(*facts, "unpacked", forward, total, flop / total / 1e9)
        if with_flex:
            rival = flex(pattern, offsets, inputs)
            seen = expected[0].abs().amax(-1, keepdim=True) > 0  # rows without keys are NaN there
            with torch.no_grad():
                check([rival().nan_to_num() * seen], expected[:1], f"{name}, flex")
            yield row("flex", *times(rival, inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--flex", action="store_true", help="also time compiled FlexAttention")
    parser.add_argument("--commit", help="to record where git cannot tell")
    arguments = parser.parse_args()
    needs_gpu("benchmarks.packed")
    rows: list[Row] = []
    for mean, count, span in ((1024, 64, 4096), (4096, 16, 16384)):
        for key_heads in (16, 4):
            for row in measured(mean, count, span, key_heads, arguments.flex):
                rows.append(row)
                print(
                    f"{row.documents} documents of {row.mean}, {row.key_heads} key heads, "
                    f"{row.pattern:24} {row.by:9} {row.forward:7.3f} {row.total:7.3f} ms "
                    f"{row.useful:5.0f} TFLOP/s {row.kernels}",
                    flush=True,
                )
                if arguments.output is not None:
                    write_rows(
                        arguments.output,
                        "milliseconds of attention over packed documents",
                        {"heads": HEADS, "head_dim": HEAD_DIM},
                        [asdict(each) for each in rows],
                        commit=arguments.commit,
                        environment=environment(),
                    )


if __name__ == "__main__":
    main()
