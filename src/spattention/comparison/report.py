"""The report of a comparison: JSON, Markdown, and the cells of a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..choice import STOCK
from ..data.prepare import CorpusFacts
from ..files import counted, write_atomically
from ..markdown import table
from ..plots import picture_of
from ..provenance import machine, versions
from .figure import comparison_figure
from .summary import Result, Row, summarize

LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
HEADER = (
    "attention",
    "validation loss",
    "minus dense",
    "below unigram",
    "tokens/s",
    "attended pairs",
    "peak memory",
)


@dataclass(frozen=True)
class Report:
    """The results of a comparison, finished or not, with settings and data."""

    facts: CorpusFacts
    settings: dict[str, Any]
    results: list[Result]
    missing: list[str]
    command: str

    @property
    def rows(self) -> list[Row]:
        """Rows of the table, one per attention."""
        return summarize(self.results)

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows as text, in the order of `HEADER`."""
        rows = self.rows
        dense = next((r.pairs for r in rows if r.attention == STOCK), None)
        entropy = self.facts.unigram_entropy
        last = ("unigram entropy", f"{entropy:.3f}", *[""] * (len(HEADER) - 2))
        return [*(_cells(row, dense, entropy) for row in rows), last]

    def notes(self) -> list[str]:
        """Notes that explain the table."""
        facts, settings, rows = self.facts, self.settings, self.rows
        context = settings["context"]
        threads = counted(settings["threads"], "thread") if settings["threads"] else "all threads"
        notes = [
            f"Unigram entropy of the evaluated windows: {facts.unigram_entropy:.3f} nats, the loss "
            "of the best model that ignores context. Losses are nats per token.",
            f"Data: {facts.source}; {facts.train_tokens:,} training tokens in "
            f"{counted(facts.train_documents, 'document')}, "
            f"{facts.validation_tokens:,} tokens in the evaluated windows, which are cut from "
            f"{counted(facts.validation_documents, 'held-out document')}; tokenizer: "
            f"{facts.tokenizer}.",
            f"Every run: {settings['steps']} steps of {settings['batch']} x {context} tokens at "
            f"context {context}, {threads}, equal weights at the start, equal data in equal order.",
            "Attended pairs: (query, key) pairs per layer and window, all heads together; in "
            "brackets how many times fewer or more than dense.",
        ]
        if self.results:
            notes.append(
                f"Peak memory: {self.results[0].memory_kind}; in brackets what the run added to it."
            )
        if any(row.verdict == "seed spread unknown" for row in rows):
            notes.append(
                "?: one seed, so the spread between seeds is unknown and small differences say "
                "nothing; "
                "`--seeds 0 1 2` measures it."
            )
        if any(row.spread is not None for row in rows):
            notes.append(
                "≈: the difference is within the seed spread (the larger range of the loss over "
                "seeds, this row's "
                "or dense's)."
            )
        if self.missing:
            notes.append(f"Not finished: {', '.join(self.missing)}.")
        return notes

    @property
    def shown(self) -> Result | None:
        """The run whose text is shown and whose model `generate` opens: the first that is not
        dense.
        """
        banded = [run for run in self.results if run.attention != STOCK]
        return next(iter(banded or self.results), None)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "format": "spattention-comparison",
            "version": 1,
            "command": self.command,
            "settings": self.settings,
            "data": asdict(self.facts),
            "machine": machine(),
            "versions": versions(LIBRARIES),
            "table": [{**asdict(row), "verdict": row.verdict} for row in self.rows],
            "runs": [asdict(result) for result in self.results],
            "missing": self.missing,
            "model": self.shown and f"models/{self.shown.model}",
        }

    def to_markdown(self) -> str:
        """A page with the table, its notes, the plot and the continuations."""
        lines = ["# Dense and banded attention compared", "", f"`{self.command}`", ""]
        lines += table(HEADER, self.cells(), numbers=True)
        lines += ["", *(f"- {note}" for note in self.notes()), "", "![loss and work](results.png)"]
        if self.shown and self.shown.continuation:
            words = self.shown.continuation.strip()
            space = " " if self.shown.continuation[:1].isspace() else ""
            text = f"{self.shown.prompt}{space}**{words}**"
            quoted = "> " + " ".join(text.split())
            lines += ["", f"## A text that {self.shown.attention} continued (in bold)", "", quoted]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write `results.json`, `results.md` and `results.png`."""
        write_atomically(folder / "results.json", json.dumps(self.to_dict(), indent=2) + "\n")
        write_atomically(folder / "results.md", self.to_markdown())
        if self.results:
            figure = comparison_figure(self.results, self.rows, self.facts.unigram_entropy)
            write_atomically(folder / "results.png", picture_of(figure, 150))


def _cells(row: Row, dense_pairs: int | None, entropy: float) -> tuple[str, ...]:
    mark = {"seed spread unknown": " ?", "within seed spread": " ≈"}.get(row.verdict, "")
    is_dense = row.attention == STOCK
    difference = "" if row.difference is None or is_dense else f"{row.difference:+.3f}{mark}"
    pairs = f"{row.pairs:,}"
    if dense_pairs and not is_dense:
        ratio = dense_pairs / row.pairs
        pairs += f" ({ratio:.1f}x less)" if ratio >= 1 else f" ({1 / ratio:.1f}x more)"
    memory = "" if row.memory_peak is None else f"{row.memory_peak / 2**20:.0f} MiB"
    if row.memory_growth is not None and memory:
        memory += f" (+{row.memory_growth / 2**20:.0f})"
    return (
        row.attention,
        f"{row.loss:.3f}",
        difference,
        f"{entropy - row.loss:.3f}",
        f"{row.tokens_per_second:,.0f}",
        pairs,
        memory,
    )
