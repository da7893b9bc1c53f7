"""Tables of Markdown pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> list[str]:
    """The lines of a table; with `numbers`, columns after the first are aligned to the right."""
    rule = "|---" + ("|---:" if numbers else "|---") * (len(headings) - 1) + "|"
    return [_line(headings), rule, *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
