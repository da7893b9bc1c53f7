"""`spattention bench attention` and `spattention bench decode`."""

from __future__ import annotations

from . import bench_attention, bench_decode
from .options import bench_decode as decode_options
from .options.bench import Options


def main(options: Options) -> None:
    """Measure what was asked for."""
    if isinstance(options.what, decode_options.Options):
        bench_decode.main(options.what)
    else:
        bench_attention.main(options.what)
