"""The first table of the page: nine patterns at the full budget, in loss and in retrieval, and the
sentences that follow from it. What has no run stands there as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spattention.choice import STOCK
from spattention.comparison.plan import Plan, Run
from spattention.markdown import table

from .gaps import NOT_SEEN, Entry, ends, fit
from .ledger import finished, read_ledger
from .mqar import BANDS, SETTINGS, THEN
from .mqar_page import read as read_recall
from .related_page import NEITHER, verdict
from .trained_recall import SINKS

# Parameters, context and tokens of training of each plan.
NAMES = {
    "finalists-2048": ("77 M", "2,048", "98 M"),
    "budget-2048": ("77 M", "2,048", "650 M"),
    "budget-25m-2048": ("28 M", "2,048", "692 M"),
    "budget-25m-8192": ("28 M", "8,192", "692 M"),
}
ROWS = "budget-2048"  # the plan whose runs are the rows; others have them by their attention
KINDS = ("passkeys", "needles", "variables")
RECALL = "mqar-2048"
OURS = "geometric bands"  # named beside the best pattern
CONTROL = "dense after bands"  # dense attention, and no pattern to choose
LITTLE = 5.0  # per cent: fewer needles than that say nothing about a pattern
# The mixes of layers, which have one layer of each in the models of two layers.
MIXES = {
    "5:1 window 128 with sinks": f"sliding_window:window=128{THEN}dense sinks=True",
    "5:1 geometric bands": f"{BANDS}{THEN}dense",
    "5:1 geometric bands, prefix 4, sinks": f"{BANDS},prefix=4{THEN}dense sinks=True",
}
ABSENT = "not run"
Done = dict[tuple[str, int], Entry]


@dataclass(frozen=True)
class Budget:
    """A plan of the full budget and its finished runs."""

    name: str
    plan: Plan
    done: Done

    @property
    def labels(self) -> list[str]:
        """Labels of the finished runs."""
        return list(dict.fromkeys(label for label, _ in self.done))

    @property
    def where(self) -> str:
        """The plan, for readers."""
        parameters, context, tokens = NAMES[self.name]
        return f"{parameters} parameters, context {context}, {tokens} tokens"

    def gaps(self, label: str) -> list[float]:
        """Last loss minus dense's, of the seeds that both have."""
        return [
            loss(entry) - loss(self.done[STOCK, seed])
            for (name, seed), entry in sorted(self.done.items())
            if name == label and (STOCK, seed) in self.done
        ]

    def as_near(self, label: str) -> list[str]:
        """Patterns that several seeds do not tell apart from this one."""
        found = []
        for other in self.labels:
            seeds = [s for n, s in self.done if n == other and (label, s) in self.done]
            apart = [loss(self.done[other, s]) - loss(self.done[label, s]) for s in seeds]
            if (
                other not in (label, STOCK, CONTROL)
                and len(apart) > 1
                and verdict(apart) == NEITHER
            ):
                found.append(other)
        return found

    def scores(self, label: str, kind: str) -> list[float]:
        """Scores in per cent of one kind: passkeys, needles or variables; one per seed."""
        found = [entry["final"] for (name, _), entry in self.done.items() if name == label]
        return [100 * score(final["retrieval"], kind) for final in found if "retrieval" in final]


def loss(entry: Entry) -> float:
    """The last validation loss."""
    return entry["final"]["loss"]["mean"]


def score(retrieval: dict[str, Any], kind: str) -> float:
    """Share of passkeys over all depths, of RULER's needles over its three tasks, of variables."""
    if kind == "passkeys":
        return mean(retrieval["passkeys"].values())
    ruler = {task: value["mean"] for task, value in retrieval["ruler"].items()}
    if kind == "variables":
        return ruler["tracking"]
    return mean(value for task, value in ruler.items() if task != "tracking")


def read(plans: dict[str, Plan], ledger: Path) -> list[Budget]:
    """The plans of the table, with the rows' labels."""
    rows = {_attention(run): run.label for run in plans[ROWS].runs}
    found = []
    for name in NAMES:
        if name in plans:
            entries = read_ledger(ledger, name)
            labels = {run.label: rows.get(_attention(run), run.label) for run in plans[name].runs}
            done = {
                (labels.get(e["label"], e["label"]), e["seed"]): e for e in entries if finished(e)
            }
            found.append(Budget(name, plans[name], done))
    return found


def _attention(run: Run) -> str:
    """The attention of a run, in words that are equal where it is."""
    fields = run.fields
    named = fields["attention"]
    text = named if isinstance(named, str) else "+".join(named)
    more = [f"{name}={fields[name]}" for name in ("sinks", "first_attention") if fields.get(name)]
    return " ".join([text, *more])


def section(plans: dict[str, Plan], ledger: Path) -> str:
    """Sentences and table; empty if there is no such plan."""
    if ROWS not in plans:
        return ""
    budgets = read(plans, ledger)
    runs = plans[ROWS].runs
    labels = list(dict.fromkeys(run.label for run in runs))
    recalled = _recalled(ledger)
    recall = {
        run.label: recalled.get(MIXES.get(run.label, _attention(run)), ABSENT) for run in runs
    }
    measured = [budget for budget in budgets if budget.scores(STOCK, "needles")]
    last = measured[-1] if measured else budgets[-1]
    heads = [", ".join(NAMES[budget.name]) for budget in budgets]
    heads += [*KINDS, f"recall, {SETTINGS[RECALL].length:,}"]
    lines = [
        "## In three sentences and one table",
        "",
        *sentences(budgets, recall),
        "",
        "The columns of losses are by parameters, context and tokens of training: validation loss "
        "minus that of dense attention, whose row has its own. Passkeys, RULER's needles and its "
        f"variables are of {last.where}, at the whole context, in per cent. The last column has "
        "the values that models of two layers find which are trained for associative recall, in "
        "per cent; mixes have one layer of each there. ± is the standard deviation over seeds; "
        "what has none is of one seed.",
        "",
    ]
    rows = []
    for label in labels:
        cells = [_gap(budget, label) for budget in budgets]
        cells += [_score(last, label, kind) for kind in KINDS]
        rows.append([label, *cells, recall[label]])
    return "\n".join([*lines, *table(["attention", *heads], rows, numbers=True), ""])


def _recalled(ledger: Path) -> dict[str, str]:
    """Accuracy of models that are trained for recall, by their attention."""
    found = {}
    for attention, entries in read_recall(ledger, RECALL).items():
        right = [100 * e["accuracy"]["mean"] for e in entries if e["finished"]]
        if right:
            name, sinks, _ = attention.partition(SINKS)
            error = f" ± {stdev(right):.0f}" if len(right) > 1 else ""
            found[f"{name} sinks=True" if sinks else name] = f"{mean(right):.0f}{error}"
    return found


def sentences(budgets: Sequence[Budget], recall: Mapping[str, str]) -> list[str]:
    """Three sentences: which pattern, what it retrieves, and what is not known. `recall` has the
    values that models find which are trained for it, by label.
    """
    with_runs = [budget for budget in budgets if len(budget.done) > 1]
    measured = [found for budget in budgets if (found := _retrieval(budget))]
    known = [f"{label} {found} %" for label, found in recall.items() if found != ABSENT]
    if known:
        measured.append(
            f"Trained for recall over {SETTINGS[RECALL].length:,} tokens, models of two layers, "
            f"mixes with one layer of each, find: {', '.join(known)} "
            "(± over seeds, where there are several)."
        )
    return [
        "1. **Loss.** " + (" ".join(map(_best, with_runs)) or "No pattern was run."),
        "2. **Retrieval.** " + (" ".join(measured) or "Not measured yet beside dense attention."),
        f"3. **Not known.** {_absent(budgets)}",
    ]


def _best(budget: Budget) -> str:
    """The pattern of the lowest loss, and where its lead ends."""
    where = budget.where
    gaps = {label: found for label in budget.labels if (found := budget.gaps(label))}
    gaps.pop(STOCK, None)
    control = gaps.pop(CONTROL, [])
    if not gaps:
        return f"{where}: no pattern was run beside dense attention."
    label = min(gaps, key=lambda each: mean(gaps[each]))
    fitted = fit(label, budget.done)
    end = ""
    if fitted is not None and fitted.level < 0:
        there = ends(fitted)
        at = there if there == NOT_SEEN else f"at {there} million tokens"
        end = f"; by the fit its lead ends {at}"
    below = mean(gaps[label]) < 0
    far = _spread([-gap if below else gap for gap in gaps[label]], "")
    lowest = (
        f"the lowest loss is that of {label}, {far} below dense attention"
        if below
        else f"no pattern is below dense attention; nearest is {label}, {far} above it"
    )
    count = len(gaps[label])
    seeds = f"{count} seeds" if count > 1 else "one seed, not settled"
    if count > 1 and verdict(gaps[label]) == NEITHER:
        seeds += ", not told apart from it"
    near = budget.as_near(label)
    others = {OURS: gaps[OURS]} if OURS in gaps and OURS not in (label, *near) else {}
    others |= {CONTROL: control} if control else {}
    named = [f"{other} {_spread(gaps[other], '+')}" for other in near]
    beside = f"; not told apart from {label}: {', '.join(named)}" if near else ""
    for other, found in others.items():
        alone = " (one seed)" if len(found) == 1 < count else ""
        beside += f"; {other} {_spread(found, '+')}{alone}"
    return f"{where}: {lowest} ({seeds}){beside}{end}."


def _retrieval(budget: Budget) -> str:
    """The pattern that retrieves most, beside dense attention; empty if it was not measured."""
    where = budget.where
    found = {
        label: mean(each) for label in budget.labels if (each := budget.scores(label, "needles"))
    }
    dense = found.pop(STOCK, None)
    if dense is None or not found:
        return ""
    label = max(found, key=lambda each: found[each])
    most = max(dense, found[label])
    if most < LITTLE:
        return f"{where}: no model finds more than {most:.0f} % of the needles, dense included."
    return (
        f"{where}: the pattern that finds most needles is {label}, {found[label]:.0f} %; "
        f"dense attention finds {dense:.0f} %."
    )


def _absent(budgets: Sequence[Budget]) -> str:
    planned = {(b.name, run.label, run.seed) for b in budgets for run in b.plan.runs}
    made = sum(len(budget.done) for budget in budgets)
    if made >= len(planned):
        return "Everything planned was run."
    empty = [budget.where for budget in budgets if not budget.done]
    none = f"; none of these: {'; '.join(empty)}" if empty else ""
    return f"{len(planned) - made} of {len(planned)} planned runs are not made{none}."


def _gap(budget: Budget, label: str) -> str:
    if label == STOCK:
        losses = [loss(entry) for (name, _), entry in budget.done.items() if name == STOCK]
        return _spread(losses, "") if losses else ABSENT
    gaps = budget.gaps(label)
    return _spread(gaps, "+") if gaps else ABSENT


def _score(budget: Budget, label: str, kind: str) -> str:
    found = budget.scores(label, kind)
    if not found:
        return ABSENT
    return f"{mean(found):.0f}" + (f" ± {stdev(found):.0f}" if len(found) > 1 else "")


def _spread(values: Sequence[float], sign: str) -> str:
    found = f"{mean(values):{sign}.4f}"
    return f"{found} ± {stdev(values):.4f}" if len(values) > 1 else found
