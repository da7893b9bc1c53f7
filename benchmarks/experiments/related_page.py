"""What the runs of the related systems say, as the tables and sentences of docs/related.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spattention.choice import STOCK, is_other
from spattention.comparison.plan import Plan
from spattention.files import write_atomically
from spattention.markdown import table

from .costs import read_costs
from .figures import seeds_of
from .gaps import Entry
from .ledger import finished, read_ledger, same_runs

BEGIN, END = "<!-- measured: written by benchmarks.experiments.evidence -->", "<!-- /measured -->"
NORM = "mea:mix=0"  # the head norm alone, which MEA is measured against
PLANS = ("related-2048", "related")
TOLD_APART = 0.01  # nats; one seed says nothing about less
NEITHER = "Not told apart from"
Done = dict[tuple[str, int], Entry]


def bands_of(label: str) -> str | None:
    """The bands that a system was combined with, as a row of their own; None for none."""
    if not is_other(label):
        return None
    _, found, bands = label.partition("bands=")
    return bands if found else None


def norm_of(label: str) -> str | None:
    """The head norm alone, in the same bands, for a row of MEA that mixes heads; else None."""
    if label.partition(":")[0] != "mea" or label.startswith(NORM):
        return None
    bands = bands_of(label)
    return NORM if bands is None else f"{NORM},bands={bands}"


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
    parts = [section(plans[name], ledger) for name in PLANS if name in plans]
    write_atomically(page, "\n".join([before + BEGIN, "", *parts, END + after]))


def section(plan: Plan, ledger: Path) -> str:
    """All rows of a plan of which there are runs, those that were not run too, and what follows."""
    entries = read_ledger(ledger, plan.name)
    title = f"{plan.title[0].upper()}{plan.title[1:]}"
    known = {(e["label"], e["seed"]) for e in entries if finished(e)}
    if not known:
        return f"{title}: nothing of this was run yet.\n"
    missing = [run for run in plan.runs if (run.label, run.seed) not in known]
    lent = same_runs(ledger, missing, entries)
    done = {(e["label"], e["seed"]): e for e in [*entries, *lent] if finished(e)}
    costs = read_costs(ledger, plan.name)
    labels = list(dict.fromkeys(run.label for run in plan.runs))
    headings = ["attention", "loss", "minus dense's", "minus its bands'"]
    headings += ["minus the norm's alone", "a step's time, dense = 1", "cache, dense = 1"]
    headings += ["pairs, dense = 1", "seeds"]
    lines = table(headings, [_row(label, done, costs) for label in labels], numbers=True)
    return "\n".join([f"{title}:", "", *lines, "", *_sentences(labels, done), *_timed(costs)])


def _row(label: str, done: Done, costs: dict[str, Any]) -> list[str]:
    if not seeds_of(label, done):
        return [label, "not run", "", "", "", _time(label, costs), "", "", "0"]
    runs = [done[label, seed] for seed in seeds_of(label, done)]
    bands, norm = bands_of(label), norm_of(label)
    losses = [_loss(run) for run in runs]
    return [
        label,
        _spread(losses).removeprefix("+"),
        _spread(differences(done, label, STOCK)) if label != STOCK else "",
        _spread(differences(done, label, bands)) if bands else "",
        _spread(differences(done, label, norm)) if norm else "",
        _time(label, costs),
        _share(label, done, _cache),
        _share(label, done, lambda run: run["facts"]["pairs_per_token"]),
        str(len(runs)),
    ]


def _sentences(labels: Iterable[str], done: Done) -> list[str]:
    """Which systems add to bands, which do not, and which are not told apart from them."""
    there = [label for label in labels if seeds_of(label, done)]
    patterns = [label for label in there if not is_other(label) and label != STOCK]
    compared = [(label, bands_of(label)) for label in there]
    combined = [(label, bands) for label, bands in compared if bands in patterns]
    lines = _sorted_out(done, combined, "its bands", lambda bands: f" (`{bands}`)")
    if patterns:
        best = min(patterns, key=lambda label: mean(_losses(done, label)))
        rest = [(label, bands) for label, bands in compared if (label, bands) not in combined]
        alone = [(label, best) for label, _ in rest if is_other(label)]
        lines += _sorted_out(done, alone, f"`{best}`, the best bands", lambda _: "")
    norms = [(label, norm) for label in there if (norm := norm_of(label)) in there]
    lines += _sorted_out(done, norms, "the head norm alone", lambda _: "")
    return [*lines, ""] if lines else []


def _sorted_out(
    done: Done, pairs: Iterable[tuple[str, str | None]], than: str, note: Callable[[str], str]
) -> list[str]:
    """Lines that say which of the first are better, worse, or neither, than the second."""
    found: dict[str, list[str]] = {"Better than": [], "Worse than": [], NEITHER: []}
    for label, other in pairs:
        assert other is not None
        gaps = differences(done, label, other)
        if gaps:
            found[verdict(gaps)].append(f"`{label}`{note(other)} {_spread(gaps)}")
    return [f"- {how} {than}: {'; '.join(rows)}." for how, rows in found.items() if rows]


def verdict(gaps: list[float]) -> str:
    """Better, worse or neither: all seeds agree, and by more than their spread, or, with one seed,
    by `TOLD_APART`.
    """
    least = stdev(gaps) if len(gaps) > 1 else TOLD_APART
    agree = all(gap < 0 for gap in gaps) or all(gap > 0 for gap in gaps)
    if not agree or abs(mean(gaps)) <= least:
        return NEITHER
    return "Better than" if gaps[0] < 0 else "Worse than"


def _timed(costs: dict[str, Any]) -> list[str]:
    """Where times come from."""
    if STOCK not in costs:
        return []
    dense = costs[STOCK]
    commits = ", ".join(dict.fromkeys(each["commit"][:7] for each in costs.values()))
    return [
        f"Times are of full training steps, one row after another on one {dense['gpu']} that did "
        f"nothing else ({commits}): a step of dense attention takes "
        f"{1e3 * dense['seconds']:.1f} ms for {dense['tokens']:,} tokens. Caches are those of "
        "generation after a text as long as the context.",
        "",
    ]


def _time(label: str, costs: dict[str, Any]) -> str:
    found = costs[label]["over_dense"] if label in costs else None
    return "?" if found is None else f"{found:.2f}"


def _share(label: str, done: Done, size: Callable[[Entry], float | None]) -> str:
    """A size over dense attention's; `?` where either is not known."""
    mine, dense = ([size(run) for (n, _), run in done.items() if n == k] for k in (label, STOCK))
    known, whole = ([each for each in found if each] for found in (mine, dense))
    return f"{known[0] / whole[0]:.2f}" if known and whole else "?"


def _cache(run: Entry) -> float | None:
    found: float | None = run["final"].get("cache_bytes")
    return found


def _loss(run: Entry) -> float:
    found: float = run["final"]["loss"]["mean"]
    return found


def _losses(done: Done, label: str) -> list[float]:
    return [_loss(done[label, seed]) for seed in seeds_of(label, done)]


def differences(done: Done, label: str, other: str) -> list[float]:
    """Last loss minus the other's, of the seeds that both have."""
    return [
        _loss(done[label, seed]) - _loss(done[other, seed])
        for seed in seeds_of(label, done)
        if (other, seed) in done
    ]


def _spread(values: list[float]) -> str:
    if not values:
        return "?"
    found = f"{mean(values):+.4f}"
    return f"{found} ± {stdev(values):.4f}" if len(values) > 1 else found
