"""Results of a run, by case: times, limits, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spattention.benchmarking.roofline import Work

from .cases import (
    ANY_ORDER,
    DECODE,
    DENSE,
    FLASH_4,
    FLASH_SPARSE,
    FLEX,
    FLEX_FLASH,
    OURS,
    PAGED,
    Case,
    cases,
)

FOLDER = Path(__file__).parents[1] / "results"
NOT_REACHED = "the run ended before it"
PASSES = ("forward", "total")  # of the times, and of the lists of work and rates
ON_MASK = (FLEX, FLEX_FLASH, FLASH_4, FLASH_SPARSE)
COMPARED = (OURS, ANY_ORDER, PAGED, *ON_MASK, *DENSE)


def newest() -> Path | None:
    """The newest file of results, by its date, or None."""
    found = FOLDER.glob("limits_*.json")
    return max(found, key=lambda file: (file.stem.rsplit("_", 1)[-1], file.stem), default=None)


@dataclass(frozen=True)
class Line:
    """All implementations on one mask and shape, in one pass.

    Args:
        case: that of this library.
        limit: milliseconds that the call takes at least.
        bound: "products" or "bytes", whichever takes longer.
        times: milliseconds by implementation, dense attention on all keys among them.
    """

    case: Case
    limit: float
    bound: str
    times: dict[str, float]

    def share(self, by: str) -> float:
        """Limit over time, 1 at the limit."""
        return self.limit / self.times[by]

    @property
    def competitors(self) -> dict[str, float]:
        """Times of all but this library."""
        return {by: time for by, time in self.times.items() if by not in (OURS, ANY_ORDER, PAGED)}


@dataclass(frozen=True)
class Results:
    """A file of results.

    Args:
        record: its content.
    """

    record: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> Results:
        return cls(json.loads(file.read_text(encoding="utf-8")))

    @property
    def environment(self) -> dict[str, str]:
        """GPU, versions, date and commit of the last run."""
        found: dict[str, str] = self.record["environments"][-1]
        return found

    @property
    def rows(self) -> dict[Case, dict[str, Any]]:
        """Rows by case."""
        fields = Case.__dataclass_fields__
        return {Case(**{name: row[name] for name in fields}): row for row in self.record["rows"]}

    def lines(self, which: str) -> Iterator[Line]:
        """Lines of the pass, in the order of the file: every mask that this library was timed on.

        Args:
            which: one of `PASSES`.
        """
        rows = self.rows
        for case, row in rows.items():
            if case.by != OURS or which not in row:
                continue
            index = PASSES.index(which)
            work, copy = Work(**row["work"][index]), row["copy"]
            matrix = row["matrix"][index] if "matrix" in row else float("inf")
            by_bytes = work.moved / copy > work.flops / matrix
            times = {}
            for by in COMPARED:
                found = rows.get(other(case, by), {})
                if "as" in found:
                    found = rows.get(replace(case, by=found["as"]), {})
                if which in found:
                    times[by] = found[which]
            yield Line(
                case,
                work.limit(matrix, copy),
                "bytes" if by_bytes else "products",
                times,
            )

    def missing(self) -> dict[tuple[str, str], list[Case]]:
        """Cases that were not timed, by implementation and reason."""
        found: dict[tuple[str, str], list[Case]] = {}
        rows = self.rows
        for case in dict.fromkeys([*rows, *cases()]):
            reason = rows[case].get("failed") if case in rows else NOT_REACHED
            if reason is not None:
                found.setdefault((case.by, reason), []).append(case)
        return found


def other(case: Case, by: str) -> Case:
    """The case of another implementation that a case is compared with. Dense attention has neither
    sinks nor a prefix: it is that of plain rows.
    """
    if by not in DENSE:
        return replace(case, by=by)
    variant = case.variant if case.variant in ("packed", DECODE) else "plain"
    return replace(case, by=by, mask="dense", variant=variant)
