"""Options of `spattention bench`: those of what it times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from . import bench_attention, bench_decode

Attention = Annotated[bench_attention.Options, tyro.conf.subcommand("attention", prefix_name=False)]
Decode = Annotated[bench_decode.Options, tyro.conf.subcommand("decode", prefix_name=False)]


@dataclass(frozen=True)
class Options:
    """Time the kernels beside what one would use otherwise, on this GPU.

    `attention` measures training and first passes, `decode` one query against a long cache.

    Args:
        what: attention if nothing is said; each has options of its own.
    """

    what: Annotated[Attention | Decode, tyro.conf.arg(name="")] = field(
        default_factory=bench_attention.Options
    )
