"""A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

T = TypeVar("T")
Reporter = Callable[[Iterable[Any], str, int | None], Iterator[Any]]


@contextmanager
def reporting(shown: bool) -> Iterator[Reporter]:
    """A function that shows how far an iteration is: `report(items, name, count)`."""
    bars: list[Any] = []

    def report(items: Iterable[T], name: str, count: int | None) -> Iterator[T]:
        if not shown:
            yield from items
        elif sys.stderr.isatty():
            bars.append(tqdm(items, desc=name, total=count, leave=False))
            yield from bars[-1]
        else:
            yield from _lines(items, name, count)

    try:
        yield report
    finally:
        for bar in bars:
            bar.close()


def _lines(items: Iterable[T], name: str, count: int | None) -> Iterator[T]:
    """A line at each tenth; without a count, at each power of two."""
    told = 0
    for done, item in enumerate(items, start=1):
        yield item
        share = done.bit_length() if count is None else 10 * done // max(1, count)
        if share > told:
            told = share
            of = "" if count is None else f" of {count}"
            print(f"{name}: {done}{of}", file=sys.stderr, flush=True)
