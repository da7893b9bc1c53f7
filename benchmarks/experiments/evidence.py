"""Write docs/evidence.md, with its plots, from the plans and the ledger: no figure by hand.

python benchmarks/experiments/evidence.py
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure

if __package__ is None:
    sys.path.insert(0, str(Path(__file__).parent))
from ledger import HERE, finished, read_ledger
from plan import Plan, read_plan

from spattention.choice import STOCK
from spattention.training.results import write_atomically

ROOT = Path(__file__).parents[2]
PLANS = Path(__file__).parent / "plans"
PAGE = ROOT / "docs" / "evidence.md"
ORDER = ["paper", "screen-1024", "context-8192", "context-16384"]
ON_A_PAR = 0.005  # of dense's loss: what the project set out to confirm or refute
Entry = dict[str, Any]

INTRO = """\
# Evidence: does it keep the quality?

This page is written by `python benchmarks/experiments/evidence.py` from the runs in
`benchmarks/experiments/ledger`, one JSON each with its configuration, seed, data, commit and GPU.
Every table names what was not run. A run is made again with

```
cd benchmarks/experiments
python run.py plans/PLAN.toml --data FOLDER --only LABEL
```

Within a plan all runs have the same data in the same order, the same steps and, per seed, the same
weights at the start (Reformer's shared queries and keys leave it fewer). Losses are nats per token
on held-out text; *error* is the standard error over validation windows, the same windows for all
runs, so that it says how well the loss of this model is known, not how another seed would do.
*Spread* is the standard deviation over seeds. **With one seed the spread is unknown, and small
differences say nothing.** What the baselines are, and where they differ from their papers:
[baselines](baselines.md).
"""
OUTRO = """\
## What is not answered yet

- Other sizes: OLMoE 0.25B-1.75B, dense against the best two patterns. Not run yet.
- Tasks (HellaSwag, WinoGrande, COPA, MMLU, PIQA, ARC, LAMBADA), recall, and what heads look at, on
  trained models: `spattention evaluate` measures them. Not run yet.
- Loss against wall-clock with the fastest kernels on both sides. Not run yet; *tokens/s* in the
  tables is the training speed of these small models, where attention is a small part.
"""


def write(plans: Path, ledger: Path, page: Path, order: Sequence[str]) -> Path:
    """Write the page and its plots; returns its path.

    Args:
        plans: folder of TOML files.
        ledger: folder of entries.
        page: the Markdown file; plots go to `images` beside it.
        order: names of plans that come first; the others follow by name.
    """
    found = {path.stem: read_plan(path) for path in sorted(plans.glob("*.toml"))}
    names = [*(n for n in order if n in found), *(n for n in found if n not in order)]
    parts = [INTRO]
    for name in names:
        parts.append(section(found[name], read_ledger(ledger, name), page.parent / "images"))
    parts.append(OUTRO)
    write_atomically(page, "\n".join(parts))
    return page


def section(plan: Plan, entries: list[Entry], images: Path) -> str:
    """A plan's table, plots, and what is missing."""
    lines = [f"## {plan.title[0].upper()}{plan.title[1:]}", "", _configuration(plan), ""]
    done = {(e["label"], e["seed"]): e for e in entries if finished(e)}
    labels = list(dict.fromkeys(run.label for run in plan.runs))
    rows = [label for label in labels if any(key[0] == label for key in done)]
    if not rows:
        return "\n".join([*lines, "Nothing of this was run yet.", ""])
    lines += [
        "| attention | validation loss | error | spread | minus dense | pairs, dense = 1 "
        "| tokens/s | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label in rows:
        lines.append(_row(label, done))
    lines += ["", *_verdicts(plan, done), *_missing(plan, entries, done), ""]
    for what, draw in (("tokens", _tokens_figure), ("position", _position_figure)):
        figure = draw(rows, done)
        if figure is not None:
            name = f"{plan.name}-{what}.png"
            picture = io.BytesIO()
            figure.savefig(picture, dpi=130, format="png", metadata={"Software": None})
            write_atomically(images / name, picture.getvalue())
            lines += [f"![{TITLES[what]}](images/{name})", ""]
    return "\n".join(lines)


TITLES = {
    "tokens": "loss minus dense's against tokens",
    "position": "loss minus dense's by position in the context",
}


def _configuration(plan: Plan) -> str:
    fields = plan.runs[0].fields
    tokens = fields["steps"] * fields["batch"] * fields["context"]
    return (
        f"`plans/{plan.name}.toml`: `{fields['model']}`, "
        f"{fields['steps']:,} steps of {fields['batch']} x {fields['context']:,} tokens "
        f"({tokens / 1e6:.0f} M), learning rate {fields['learning_rate']:g}, "
        f"{fields.get('precision', 'bfloat16')}, data {', '.join(fields['data'])}."
    )


def _seeds(label: str, done: dict[tuple[str, int], Entry]) -> list[int]:
    return sorted(seed for name, seed in done if name == label)


def _differences(label: str, done: dict[tuple[str, int], Entry]) -> list[float]:
    """Loss minus dense's, of the seeds that both have."""
    return [
        _loss(done[label, s]) - _loss(done[STOCK, s])
        for s in _seeds(label, done)
        if (STOCK, s) in done
    ]


def _loss(entry: Entry) -> float:
    return entry["final"]["loss"]["mean"]


def _row(label: str, done: dict[tuple[str, int], Entry]) -> str:
    runs = [done[label, seed] for seed in _seeds(label, done)]
    losses = [_loss(run) for run in runs]
    differences = _differences(label, done)
    dense = next((e["facts"]["pairs_per_token"] for (n, _), e in done.items() if n == STOCK), None)
    pairs = runs[0]["facts"]["pairs_per_token"]
    speeds = sorted(line["tokens_per_second"] for run in runs for line in run["train"][1:])
    cells = [
        label,
        f"{mean(losses):.4f}",
        f"{mean(run['final']['loss']['error'] for run in runs):.4f}",
        f"{stdev(losses):.4f}" if len(losses) > 1 else "?",
        f"{mean(differences):+.4f}" if differences and label != STOCK else "",
        f"{pairs / dense:.2f}" if dense else "?",
        f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "?",
        str(len(runs)),
    ]
    return f"| {' | '.join(cells)} |"


def _verdicts(plan: Plan, done: dict[tuple[str, int], Entry]) -> list[str]:
    """Whether `shared_local` is on a par with dense attention, as was expected."""
    lines = []
    for label in dict.fromkeys(run.label for run in plan.runs):
        differences = _differences(label, done)
        if not label.startswith("shared_local") or not differences:
            continue
        seeds = [s for s in _seeds(label, done) if (STOCK, s) in done]
        share = mean(differences) / mean(_loss(done[STOCK, s]) for s in seeds)
        verdict = "confirmed" if share <= ON_A_PAR else "refuted"
        known = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed, not settled"
        lines.append(
            f"- Expected of `{label}`: at most {100 * ON_A_PAR} % above dense. "
            f"{verdict.capitalize()} here: {100 * share:+.2f} % ({known})."
        )
    return [*lines, ""] if lines else []


def _missing(plan: Plan, entries: list[Entry], done: dict[tuple[str, int], Entry]) -> list[str]:
    known = {(e["label"], e["seed"]): e for e in entries}
    lines = []
    for run in plan.runs:
        entry = known.get((run.label, run.seed))
        if entry is not None and entry["diverged"]:
            lines.append(f"{run.label}, seed {run.seed} (diverged: {entry['diverged']})")
        elif entry is not None and not finished(entry):
            lines.append(f"{run.label}, seed {run.seed} (stopped at step {entry['step']})")
        elif entry is None:
            lines.append(f"{run.label}, seed {run.seed}")
    return [f"Not run yet: {'; '.join(lines)}."] if lines else ["Everything planned was run."]


def _colors(rows: Sequence[str]) -> dict[str, Any]:
    palette = matplotlib.color_sequences["tab20"]
    return {label: palette[k % 20] for k, label in enumerate(rows)}


def _tokens_figure(rows: Sequence[str], done: dict[tuple[str, int], Entry]) -> Figure | None:
    """A bias that helps early can fade: the gap to dense against tokens, seed by seed."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    colors = _colors(rows)
    for label in rows:
        for seed in _seeds(label, done):
            dense = done.get((STOCK, seed))
            if label == STOCK or dense is None:
                continue
            base = {line["step"]: line["eval_loss"] for line in dense["validation"]}
            per_step = done[label, seed]["tokens"] / done[label, seed]["step"]
            points = [
                (line["step"] * per_step / 1e6, line["eval_loss"] - base[line["step"]])
                for line in done[label, seed]["validation"]
                if line["step"] in base
            ]
            name = label if seed == _seeds(label, done)[0] else None
            axis.plot(*zip(*points), "o-", markersize=3, color=colors[label], label=name)
    if not axis.lines:
        return None
    axis.axhline(0.0, color="#333333", linewidth=1)
    axis.set(xlabel="million tokens", ylabel="validation loss minus dense's (nats)")
    _finish(axis, TITLES["tokens"])
    return figure


def _position_figure(rows: Sequence[str], done: dict[tuple[str, int], Entry]) -> Figure | None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    colors = _colors(rows)
    for label in rows:
        shared = [s for s in _seeds(label, done) if (STOCK, s) in done]
        if label == STOCK or not shared:
            continue
        edges = done[label, shared[0]]["final"]["edges"]
        gaps = [
            mean(
                done[label, s]["final"]["by_position"][k]
                - done[STOCK, s]["final"]["by_position"][k]
                for s in shared
            )
            for k in range(len(edges) - 1)
        ]
        axis.stairs(gaps, edges, color=colors[label], label=label, baseline=None)
    if not axis.patches:
        return None
    axis.axhline(0.0, color="#333333", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="position in the context (tokens)", ylabel="loss minus dense's (nats)")
    _finish(axis, TITLES["position"])
    return figure


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=7, frameon=False, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print(f"wrote {write(PLANS, HERE, PAGE, ORDER)}")
