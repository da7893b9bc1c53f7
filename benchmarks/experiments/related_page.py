"""What the runs of the related systems say, as the tables of docs/related.md."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from spattention.choice import STOCK, is_other
from spattention.comparison.plan import Plan
from spattention.files import write_atomically

from .gaps import Entry
from .ledger import finished, read_ledger, same_runs

BEGIN, END = "<!-- measured: written by benchmarks.experiments.evidence -->", "<!-- /measured -->"
NORM = "mea:mix=0"  # the head norm alone, which MEA is measured against
PLANS = ("related-2048", "related")
Done = dict[tuple[str, int], Entry]


def base(label: str) -> str | None:
    """What a row is measured against beside dense attention: MEA against its norm alone, any other
    system against its bands; None where that is dense attention itself, or the row is no system.
    """
    if not is_other(label):
        return None
    name, _, options = label.partition(":")
    _, found, bands = options.partition("bands=")
    if name == "mea" and not label.startswith(NORM):
        return f"{NORM},bands={bands}" if found else NORM
    return bands if found else None


def write(page: Path, plans: dict[str, Plan], ledger: Path) -> None:
    """Put the tables between the marks of a page.

    Raises:
        ValueError: if the page lacks the marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must have the marks {BEGIN} and {END}")
    parts = [table(plans[name], ledger) for name in PLANS if name in plans]
    write_atomically(page, "\n".join([before + BEGIN, "", *parts, END + after]))


def table(plan: Plan, ledger: Path) -> str:
    """All rows of a plan of which there are runs, those that were not run too."""
    entries = read_ledger(ledger, plan.name)
    title = f"{plan.title[0].upper()}{plan.title[1:]}"
    known = {(e["label"], e["seed"]) for e in entries if finished(e)}
    if not known:
        return f"{title}: nothing of this was run yet.\n"
    missing = [run for run in plan.runs if (run.label, run.seed) not in known]
    lent = same_runs(ledger, missing, entries)
    done = {(e["label"], e["seed"]): e for e in [*entries, *lent] if finished(e)}
    lines = [
        f"{title}:",
        "",
        "| attention | loss minus dense's | minus its bands', or its norm's alone "
        "| pairs, dense = 1 | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    pairs = [e["facts"]["pairs_per_token"] for (name, _), e in done.items() if name == STOCK]
    for label in dict.fromkeys(run.label for run in plan.runs):
        mine = [entry for (name, _), entry in done.items() if name == label]
        if not mine:
            lines.append(f"| {label} | not run | | | 0 |")
            continue
        other = base(label)
        cells = [
            label,
            _spread(_differences(done, label, STOCK)) if label != STOCK else "",
            _spread(_differences(done, label, other)) if other else "",
            f"{mine[0]['facts']['pairs_per_token'] / pairs[0]:.2f}" if pairs else "",
            str(len(mine)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _differences(done: Done, label: str, other: str) -> list[float]:
    """Last loss minus the other's, of the seeds that both have."""
    return [
        entry["final"]["loss"]["mean"] - done[other, seed]["final"]["loss"]["mean"]
        for (name, seed), entry in sorted(done.items())
        if name == label and (other, seed) in done
    ]


def _spread(values: list[float]) -> str:
    if not values:
        return "?"
    found = f"{mean(values):+.4f}"
    return f"{found} ± {stdev(values):.4f}" if len(values) > 1 else found
