"""Write docs/evidence.md, with its plots, from the plans and the ledger: no figure by hand.

python -m benchmarks.experiments.evidence
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import tyro

from spattention.choice import STOCK
from spattention.comparison.plan import Plan
from spattention.files import write_atomically
from spattention.markdown import table
from spattention.plots import picture_of

from . import related_page
from .budget_page import section as budget_section
from .figures import (
    TITLES,
    Entry,
    curve,
    position_figure,
    reference_gpu,
    seconds_to,
    seeds_of,
    speed,
    time_figure,
    tokens_figure,
)
from .gaps import table as gap_table
from .ledger import HERE, finished, read_ledger, same_runs
from .mqar_page import sections as mqar_sections
from .plan_files import read_plan
from .recall_page import section as recall_section
from .speeds import read_speeds
from .tasks_page import section as tasks_section

ROOT = Path(__file__).parents[2]
PLANS = Path(__file__).parent / "plans"
PAGE = ROOT / "docs" / "evidence.md"
ORDER = [
    "paper",
    "variants-2048",
    "finalists-2048",
    "context-8192",
    "context-16384",
    "olmoe-1024",
    "budget-2048",
    "budget-25m-2048",
    "budget-25m-8192",
]
BASELINES = ("sliding_window", "longformer", "bigbird", "reformer")
ON_A_PAR = 0.005  # of dense's loss: what the project set out to confirm or refute
DRAWN = {"tokens": tokens_figure, "time": time_figure, "position": position_figure}

TITLE = "# Evidence: does it keep the quality?\n"
INTRO = """\
## How to read this page

This page is written by `python -m benchmarks.experiments.evidence` from the runs in
`benchmarks/experiments/ledger`, one JSON each with its configuration, seed, data, commit and GPU.
Every table names what was not run. A run is made again with

```
python -m benchmarks.experiments.run benchmarks/experiments/plans/PLAN.toml \\
    --data FOLDER --only LABEL
```

Within a plan all runs have the same data in the same order, the same steps and, per seed, the same
weights at the start (Reformer's shared queries and keys leave it fewer). Losses are nats per token
on held-out text; *error* is the standard error over validation windows, the same windows for all
runs, so that it says how well the loss of this model is known, not how another seed would do.
*Spread* is the standard deviation over seeds, in the next columns that of the differences, seed by
seed; *there, last quarter* is the difference over the last quarter of the context alone.

*Time to dense's loss* is the share of dense's training time after which a run has dense's last
validation loss, without compiling, evaluation and saving. Speeds were measured apart, in turns and
with the faster of two dense kernels, where the table says so, and *?* stands for attention that was
not among them; else they are medians of the runs, and *?* stands for runs that shared their GPU or
host with other work. Runs of one plan may have been made on two kinds of GPU (each entry names its
own); speeds, and losses against time, are those of the one that the table names. **With one seed
the spread is unknown, and small differences say nothing.** What the baselines are, and where they
differ from their papers: [baselines](baselines.md).

*The line of a gap* is the gap to dense attention as a line in the logarithm of tokens, fitted to
the last three quarters of the tokens, seed by seed, where there are several; ± is the standard
deviation over seeds. *Ends at* is where the mean line is 0, in brackets the earliest and the latest
of the seeds'. Tokens are those within runs of one length, whose learning rate falls to their end;
a line says little beyond a few times their tokens.

## In short, so far

Small models, 26 to 98 million tokens a run, and one of 1.75 billion parameters on 101 million:
early days of training, which favour short bands. Ten patterns are to go further.

- **28 million parameters on 692 million tokens, context 2,048**: one seed, eight of ten rows. Bands
  in every layer have no lead here from 52 million tokens on: geometric ones end 0.031 *above* dense
  attention, uniform ones, with twice the pairs, 0.024, a prefix and sinks take 0.006 off the
  geometric ones, and a sliding window of equal pairs ends 0.079 above. One full layer in six is
  what closes the gap: 0.0025 with practice's windows of 128 and sinks, 0.0032 with geometric bands,
  of 0.27 and 0.29 of the pairs. So bands beat windows by far where no layer is full, and are not
  better than practice's mix where one is, unless they get a prefix of four tokens and sinks: 5:1
  geometric bands with both, of 0.30 of the pairs, end 0.0048 *below* dense attention, 0.0074 below
  practice's mix and 0.0081 below the same bands without them. They are below dense attention at
  every validation since 184 million tokens, by 0.001 to 0.007, most so at the first positions:
  0.0019 over the last quarter of the context. This is one seed, and it settles nothing: at this
  context gaps to dense attention have standard deviations over seeds of 0.010 to 0.017 in other
  plans, two to three times as much. Nor is the comparison even: practice's mix has nine tenths of
  the pairs, 0.23 of a dense cache for 0.39, and no prefix; dense attention has no sinks, which
  might help it as much. Prefix and sinks were not run separately. RULER's needles and passkeys at
  the whole context are found by no model, dense attention included: 28 million parameters are too
  few, so that nothing is known about this mix and retrieval.
- **OLMoE 0.25B-1.75B, context 1,024**: one seed. `shared_local` with geometric widths ends 0.014
  below dense attention; with uniform widths, the paper's form, 0.009 *above* it. Both are within
  the expected half a percent, but the gap *closes*: at 38 million tokens they were 0.073 and 0.065
  below. The lead is one of early positions: over the second half of the context, dense attention
  is ahead of uniform widths nearly everywhere, and about level with geometric ones. With more
  tokens the whole may well become a loss.
- **Contexts of 8,192 and 16,384.** Every band pattern ends below dense attention in each of three
  seeds. Geometric widths end below uniform ones and below sliding windows in every seed, with the
  fewest pairs of all. Uniform `shared_local`, the paper's form, ends *above* sliding windows in
  every seed, though those cost less.
- **The paper's comparison, context 1,024**: one seed. `exclusive`, the paper's equations, `gapped`
  and Reformer are plainly worse than everything else; a sink helps `exclusive` by 0.011, geometric
  widths by 0.05, and both by 0.06 of the 0.10 that it lacks. The mask that the paper's code calls
  Reformer is 0.021 above dense, and all others lie within 0.03 of it, the three widths of
  `shared_local` within 0.003 of each other. Longformer, with more pairs, is ahead of all of them:
  "better than each baseline of equal or higher cost" is *not* confirmed. (The mask that the paper's
  code calls Longformer is behind `shared_local`, with more pairs than it.)
- **Finalists, context 2,048, 98 million tokens**: three seeds. All five end below dense attention
  in every seed, but about half of the lead of 33 million tokens or more is gone, and it was
  shrinking to the end. A line through each gap reaches dense attention at 190 to 320 million
  tokens, twice or three times those of the runs, and the smaller the window, the faster. Geometric
  widths with a local window of 32 end lowest, 0.031 below dense attention with 0.15 of the pairs,
  and *below sliding windows* of 0.24 in every seed, by 0.009 on average: a pattern that beats both
  the paper's and sliding windows at less work. It is no more than 0.002 ahead of a window of 64
  (0.18 of the pairs), and what smaller windows win early they lose again: after 33 million tokens a
  window of 32 was 0.014 ahead of 64. Windows of 64 and the default one, 0.0015 behind that, are
  ahead of sliding windows in two of three seeds. Uniform widths, the paper's form, are behind
  sliding windows in every seed, with more pairs. A sliding window of 128 tokens, better than the
  default early, is 0.004 behind it in the one seed that was run. Hence the geometric widths of the
  presets and of README's first example; a smaller window is an argument away, and not worth a
  constructor of its own. Entropy over heads and positions: 4.52 nats with dense attention, 2.83 to
  3.73 with bands. Tasks are at chance or just above it, with bands (one seed) as with dense
  attention (two).
- **Equal time**, the fastest kernels of both sides. At 16,384 tokens geometric widths come to dense
  attention's last loss in 0.51 of its time, sliding windows in 0.57 and uniform widths in 0.63; at
  8,192 in 0.64, 0.68 and 0.75. At 2,048 speeds differ by less than they scatter, and what is won is
  the lower loss. At 1,024, in a model as small as the paper's, steps with bands are 2 to 7 %
  *slower* than with dense attention, though the kernels by themselves take less time: such short
  steps wait for the host, and its share of a call is larger (0.44 ms for 0.13, forward and
  backward, in `benchmarks/results/attention_kept_h200_2026-11-26.md`). Before that share was cut
  by a quarter to a third they were 10 to 11 % slower on one machine, and 2 to 8 % with it cut
  (`hopper_host_h200_2026-11-26.json`), though steps scatter by as much. In OLMoE 0.25B-1.75B at
  1,024 steps are 1 % faster.
- **What makes the best pattern, context 2,048**: one seed, so differences of 0.01 say little.
  Everything is below dense attention, as early days would have it. Of the widths, geometric ones
  are ahead. Smaller local windows are better with both widths, and cost less: geometric widths with
  a window of 32 end lowest of all, 0.021 below those with 64 and 0.033 below the best sliding
  window, 128 tokens; 16 is 0.003 behind 32. With the finalists' 98 million tokens that faded: 32
  was 0.002 ahead of 64 there, and 64 ahead of the default by 0.0015, where it is 0.014 here.
  Smaller sliding windows, 192 and 128, are better than the default too, by 0.011 and 0.015. Sinks
  change nothing that stands out; nor does a dense layer at the end, or each fourth one, nor a dense
  head in place of the nearest band or the farthest; a dense first layer costs half of the lead.
  Geometric bands in the lower layers and sliding windows above are better than the other way round.
- **Recall** of random tokens is near chance for every language model, dense included.
- **Recall that is trained for**, two layers, 64 tokens, on the CPU, three seeds. `exclusive` with
  geometric widths finds nearly all values with an eighth of the pairs; with uniform widths, where
  no head sees the token before alone, it learns nothing, and sinks help little. `shared_local`
  learns later than dense attention, then finds every value at most distances and none at some, the
  same in every seed: the bands of single heads, which learned nothing. Every band has to learn for
  itself; why these did not is not known. With a band for each two heads, and so 0.44 of the pairs
  for 0.35, two seeds of three find every value at every distance; the third one does not learn the
  nearest band behind the window (distances 9 to 15). A sliding window of two layers does not reach.
  One task, one size, one recipe: dense attention finds all values in one seed and stays
  on a plateau in two, so that nothing follows about bands being better at recall.
- **Recall over 2,048 tokens that is trained for**, two layers of width 512, one seed, from shared
  weights that have learned 32 tokens. Dense attention finds every value, and so does each mix of
  one layer of bands or windows and a dense layer above it. Geometric and uniform bands with a
  window of 32 find all values at distances below 1,024 and none beyond, geometric ones with a
  prefix too, as far as it went; duplicated bands find 0.2 to 0.35 between 362 and 1,023 tokens and
  none elsewhere. Four geometric bands with two heads each, at a glance of 150 steps, find 0.99 of
  them at all distances. Sequences grow by doubling, and every band that fails lies wholly beyond
  the lengths before the last: it has to learn at the full length what heads that reach nearer too
  had learned on shorter ones. Four bands have no such band: their farthest starts at 406. This fits
  all rows but that of duplicated bands, and is not proven: at 64 tokens, where no length grows,
  bands of single heads fail too, and a band with two heads differs in two things at once. Runs with
  a prefix, with sinks, with four bands and with a sliding window were cut.
"""
OUTRO = """\
## What is not answered yet

- Whether the lead of bands lasts with 77 million parameters: it shrinks with tokens in all plans
  that are long enough to say, and the lines end before the 650 million tokens that
  `plans/budget-2048.toml` asks for. With 28 million parameters there is none after 692 million. At
  8,192 and 16,384 no end is in sight after 26 million tokens.
- Whether 5:1 geometric bands with a prefix and sinks are better than dense attention and than
  practice's mix: other seeds, practice's mix with a prefix and as many pairs, dense attention with
  sinks, and models that retrieve.
- Tasks (HellaSwag, WinoGrande, COPA, MMLU, PIQA, ARC, LAMBADA) at a size where they tell models
  apart; MMLU with five shots was run for dense attention alone.
- Equal time at the size of real models: *tokens/s* and the time to dense's loss in the tables are
  of small models, where attention is a small part.
"""


def write(
    plans: Path, ledger: Path, page: Path, order: Sequence[str], related: Path | None = None
) -> Path:
    """Write the page and its plots; returns its path.

    Args:
        plans: folder of TOML files.
        ledger: folder of entries.
        page: the Markdown file; plots go to `images` beside it.
        order: names of plans that come first; the others follow by name.
        related: page that gets the tables of the related systems; None leaves it alone.
    """
    found = {path.stem: read_plan(path) for path in sorted(plans.glob("*.toml"))}
    names = [*(n for n in order if n in found), *(n for n in found if n not in order)]
    parts = [TITLE, budget_section(found, ledger), INTRO]
    for name in names:
        parts.append(section(found[name], ledger, page.parent / "images"))
    parts.append(recall_section(ledger, page.parent / "images"))
    parts += mqar_sections(ledger, page.parent / "images")
    parts.append(OUTRO)
    write_atomically(page, "\n".join(part for part in parts if part))
    if related is not None:
        related_page.write(related, found, ledger)
    return page


def section(plan: Plan, ledger: Path, images: Path) -> str:
    """A plan's tables, plots, and what is missing."""
    entries = read_ledger(ledger, plan.name)
    lines = [f"## {plan.title[0].upper()}{plan.title[1:]}", "", _configuration(plan), ""]
    known = {(e["label"], e["seed"]) for e in entries if finished(e)}
    missing = [run for run in plan.runs if (run.label, run.seed) not in known]
    others = same_runs(ledger, missing, entries)
    entries = [e for e in entries if finished(e) or e["label"] not in {o["label"] for o in others}]
    entries += others
    done = {(e["label"], e["seed"]): e for e in entries if finished(e)}
    speeds = read_speeds(ledger, plan)
    if speeds is not None:
        done = speeds.put(done)
    labels = list(dict.fromkeys(run.label for run in plan.runs))
    rows = [label for label in labels if any(key[0] == label for key in done)]
    if not rows:
        return "\n".join([*lines, "Nothing of this was run yet.", ""])
    headings = ["attention", "validation loss", "error", "spread", "minus dense"]
    headings += ["there, last quarter", "pairs, dense = 1", f"tokens/s, {reference_gpu(done)}"]
    headings += ["time to dense's loss", "seeds"]
    lines += table(headings, [_row(label, done) for label in rows], numbers=True)
    if others:
        names = dict.fromkeys(f"{e['label']} ({e['plan']})" for e in others)
        lines += ["", f"Of other plans, with the same recipe, data and seed: {', '.join(names)}."]
    timed = _versions(done) if speeds is None else [speeds.line()]
    timed += [""] if timed else []  # what follows is no item of the list
    lines += ["", *_verdicts(plan, done), *timed, *_missing(plan, entries), ""]
    lines += gap_table(rows, done)
    for what, draw in DRAWN.items():
        figure = draw(rows, done)
        if figure is not None:
            name = f"{plan.name}-{what}.png"
            write_atomically(images / name, picture_of(figure, 130, metadata={"Software": None}))
            lines += [f"![{TITLES[what]}](images/{name})", ""]
    return "\n".join([*lines, *_looks(rows, done), *tasks_section(ledger, plan.name, rows)])


def _configuration(plan: Plan) -> str:
    fields = plan.runs[0].fields
    tokens = fields["steps"] * fields["batch"] * fields["context"]
    return (
        f"`plans/{plan.name}.toml`: `{fields['model']}`, "
        f"{fields['steps']:,} steps of {fields['batch']} x {fields['context']:,} tokens "
        f"({tokens / 1e6:.0f} M), learning rate {fields['learning_rate']:g}, "
        f"{fields.get('precision', 'bfloat16')}, data {', '.join(fields['data'])}."
    )


def _loss(entry: Entry) -> float:
    return entry["final"]["loss"]["mean"]


def _late_loss(entry: Entry) -> float:
    """Mean loss over the last quarter of the context."""
    edges, losses = entry["final"]["edges"], entry["final"]["by_position"]
    parts = [
        (end - begin, loss)
        for begin, end, loss in zip(edges, edges[1:], losses)
        if begin >= 0.75 * edges[-1]
    ]
    return sum(width * loss for width, loss in parts) / sum(width for width, _ in parts)


def _differences(
    label: str,
    done: dict[tuple[str, int], Entry],
    other: str = STOCK,
    loss: Callable[[Entry], float] = _loss,
) -> list[float]:
    """Loss minus the other's, of the seeds that both have."""
    return [
        loss(done[label, s]) - loss(done[other, s])
        for s in seeds_of(label, done)
        if (other, s) in done
    ]


def _spread(differences: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    found = f"{mean(differences):+.4f}"
    return f"{found} ± {stdev(differences):.4f}" if len(differences) > 1 else found


def _row(label: str, done: dict[tuple[str, int], Entry]) -> list[str]:
    runs = [done[label, seed] for seed in seeds_of(label, done)]
    losses = [_loss(run) for run in runs]
    differences = _differences(label, done)
    late = _differences(label, done, loss=_late_loss) if label != STOCK else []
    dense = next((e["facts"]["pairs_per_token"] for (n, _), e in done.items() if n == STOCK), None)
    pairs = runs[0]["facts"]["pairs_per_token"]
    timed = [run for run in runs if run["gpu"] == reference_gpu(done)]
    speeds = [found for run in timed if (found := speed(run)) is not None]
    return [
        label,
        f"{mean(losses):.4f}",
        f"{mean(run['final']['loss']['error'] for run in runs):.4f}",
        f"{stdev(losses):.4f}" if len(losses) > 1 else "?",
        _spread(differences) if differences and label != STOCK else "",
        _spread(late) if late else "",
        f"{pairs / dense:.2f}" if dense else "?",
        f"{mean(speeds):,.0f}" if speeds else "?",
        _time(label, done),
        str(len(runs)),
    ]


def _versions(done: dict[tuple[str, int], Entry]) -> list[str]:
    """Which speeds are of different code."""
    found: dict[str, list[str]] = {}
    for (label, _), entry in done.items():
        labels = found.setdefault(entry["commit"], [])
        if entry["gpu"] == reference_gpu(done) and speed(entry) and label not in labels:
            labels.append(label)
    parts = [f"{', '.join(labels)} ({commit})" for commit, labels in found.items() if labels]
    if len(parts) < 2:
        return []
    return [f"- Speeds are of several versions, which differ in speed: {'; '.join(parts)}."]


def _time(label: str, done: dict[tuple[str, int], Entry]) -> str:
    """The share of dense's time after which a run has dense's last loss, on one kind of GPU."""
    shares = []
    for seed in seeds_of(label, done) if label != STOCK else ():
        entry, dense = done[label, seed], done.get((STOCK, seed))
        if dense is None or dense["gpu"] != entry["gpu"] or not curve(dense) or not curve(entry):
            continue
        end, loss = curve(dense)[-1]
        found = seconds_to(loss, curve(entry))
        if found is None:
            return "not reached"
        shares.append(found / end)
    return f"{mean(shares):.2f}" if shares else ""


def _looks(rows: Sequence[str], done: dict[tuple[str, int], Entry]) -> list[str]:
    """Heads and recall of the trained models, where they were taken; means over seeds."""
    taken = {
        label: [
            done[label, seed]["final"]
            for seed in seeds_of(label, done)
            if done[label, seed]["final"].get("heads")
        ]
        for label in rows
    }
    if not any(taken.values()):
        return ["Heads and recall of these models were not taken.", ""]
    found = []
    for label, finals in taken.items():
        if not finals:
            continue
        layers = [layer for final in finals for layer in final["heads"]]
        cells = [
            label,
            f"{mean(entropy for layer in layers for entropy in layer['entropy']):.2f}",
            f"{mean(layer['divergence'] for layer in layers):.2f}",
            *(_accuracy(finals, task) for task in ("copying", "pairs", "needle")),
        ]
        found.append(cells)
    said = "What heads look at, and recall of random tokens; *~*: near chance."
    headings = ["attention", "entropy (nats)", "divergence (nats)", "copying, farthest"]
    headings += ["pairs, most", "needle, all depths"]
    return [said, "", *table(headings, found, numbers=True), ""]


def _accuracy(finals: list[Entry], task: str) -> str:
    """Accuracy in the hardest setting, of a needle over all of them."""
    scores = []
    for final in finals:
        mine = [score for score in final["recall"] if score["task"] == task]
        scores += mine if task == "needle" else mine[-1:]
    if not scores:
        return ""
    near = all(score["near_chance"] for score in scores)
    return f"{'~ ' if near else ''}{100 * mean(s['accuracy']['mean'] for s in scores):.1f} %"


def _verdicts(plan: Plan, done: dict[tuple[str, int], Entry]) -> list[str]:
    """Whether `shared_local` is on a par with dense attention, and better than each baseline of
    equal or higher cost, as was expected.
    """
    lines = []
    for label in dict.fromkeys(run.label for run in plan.runs):
        differences = _differences(label, done)
        if not label.startswith("shared_local") or not differences:
            continue
        seeds = [s for s in seeds_of(label, done) if (STOCK, s) in done]
        share = mean(differences) / mean(_loss(done[STOCK, s]) for s in seeds)
        verdict = "confirmed" if share <= ON_A_PAR else "refuted"
        known = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed, not settled"
        lines.append(
            f"- Expected of `{label}`: at most {100 * ON_A_PAR} % above dense. "
            f"{verdict.capitalize()} here: {100 * share:+.2f} % ({known})."
        )
        lines += _against_baselines(label, done)
    return [*lines, ""] if lines else []


def _against_baselines(label: str, done: dict[tuple[str, int], Entry]) -> list[str]:
    lines = []
    for other in dict.fromkeys(name for name, _ in done if name in BASELINES):
        differences = _differences(label, done, other)
        if not differences:
            continue
        ahead = sum(difference < 0 for difference in differences)
        found = (
            f"{_spread(differences)}, ahead in {ahead} of {len(differences)} "
            f"{'seeds' if len(differences) > 1 else 'seed, not settled'}."
        )
        if _pairs(other, done) < 0.99 * _pairs(label, done):
            lines.append(f"- `{label}` against `{other}`, which costs less: {found}")
        else:
            lines.append(
                f"- Expected of `{label}`: better than `{other}`, which costs as much or more. "
                f"Here {found}"
            )
    return lines


def _pairs(label: str, done: dict[tuple[str, int], Entry]) -> float:
    return done[label, seeds_of(label, done)[0]]["facts"]["pairs_per_token"]


def _missing(plan: Plan, entries: list[Entry]) -> list[str]:
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


@dataclass(frozen=True)
class Options:
    """Write the page of the evidence and its plots.

    Args:
        plans: Folder of the plans.
        ledger: Folder of the entries.
        page: The Markdown file to write; its plots go to `images` beside it.
        related: The Markdown file with the tables of the related systems.
    """

    plans: Path = PLANS
    ledger: Path = HERE
    page: Path = PAGE
    related: Path | None = ROOT / "docs" / "related.md"


if __name__ == "__main__":
    options = tyro.cli(Options)
    made = write(options.plans, options.ledger, options.page, ORDER, options.related)
    print(f"wrote {made}")
