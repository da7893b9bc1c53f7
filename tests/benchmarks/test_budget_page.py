"""The page's first table, the fits of gaps, and entries that other plans lend."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import (
    budget_page,
    costs,
    evidence,
    figures,
    gaps,
    ledger,
)
from benchmarks.experiments.plan_files import read_plan
from spattention.comparison.plan import Plan, Run
from spattention.training.graphs import asks_for_graphs, refusal

PLANS = {path.stem: read_plan(path) for path in evidence.PLANS.glob("budget-*.toml")}


def entry(plan: str, run: Run, loss: float, needles: float | None = None) -> dict:
    """A finished entry of a run whose gap halves its distance to `loss` in each quarter."""
    found = {
        "plan": plan,
        "label": run.label,
        "seed": run.seed,
        "step": run.fields["steps"],
        "tokens": run.fields["steps"] * 100,
        "recipe": run.recipe.to_dict(),
        "data": "one",
        "diverged": None,
        "validation": [],
        "final": {"loss": {"mean": loss, "error": 0.01}},
    }
    if needles is not None:
        task = {"mean": needles, "error": 0.0}
        found["final"]["retrieval"] = {
            "passkeys": {"0.1": 1.0, "0.9": 0.5},
            "ruler": {"single": task, "multikey": task, "multivalue": task, "tracking": task},
        }
    return found


def run_of(plan: Plan, label: str) -> Run:
    return next(run for run in plan.runs if run.label == label)


def curve(points: dict[float, float], step: int = 8) -> dict:
    """An entry with these gaps over tokens, in millions, beside `dense`'s zero."""
    return {
        "tokens": step * 1e6,
        "step": step,
        "validation": [{"step": at, "eval_loss": 3.0 + gap} for at, gap in points.items()],
    }


@pytest.fixture
def halves():
    """Dense attention and a pattern whose gap is a line in the logarithm of tokens, twice."""
    steps = [1, 2, 3, 4, 5, 6, 7, 8]
    done = {("dense", seed): curve(dict.fromkeys(steps, 0.0)) for seed in (0, 1)}
    for seed, level in ((0, -0.02), (1, -0.04)):
        line = {at: level + 0.02 * math.log2(at / 8) for at in steps}
        # What comes before the last three quarters is no part of the fit.
        done["bands", seed] = curve(line | {1: 9.0})
    return done


def test_a_gap_is_fitted_over_the_last_quarters(halves):
    """Level, slope and end are those of the line, and seeds say how far to believe them."""
    found = gaps.fit("bands", halves)
    assert found.last == 8.0
    assert found.levels == pytest.approx((-0.02, -0.04))
    assert found.slopes == pytest.approx((0.02, 0.02))
    assert found.end(found.level, found.slope) == pytest.approx(8 * 2**1.5)
    assert gaps.ends(found) == "23 (16 to 32)"
    (line,) = gaps.table(["dense", "bands"], halves)[-2:-1]
    one_seed = {("dense", 0): halves["dense", 0], ("one", 0): halves["bands", 0]}
    assert gaps.table(["one"], one_seed) == []
    assert line == "| bands | -0.0300 ± 0.0141 | +0.0200 ± 0.0000 | 23 (16 to 32) | 2 |"


def test_gaps_that_do_not_shrink_have_no_end(halves):
    """A gap that grows, or one that would end very far away, ends nowhere in sight."""
    found = gaps.fit("bands", halves)
    assert found.end(-0.03, -0.02) is None
    assert found.end(0.03, 0.02) is None
    assert found.end(-0.03, 0.001) is None
    assert gaps.fit("other", halves) is None


def test_gaps_are_drawn_over_the_logarithm(halves):
    figure = figures.tokens_figure(["dense", "bands"], halves)
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    fitted = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert fitted[0].get_xdata()[-1] == pytest.approx(figures.AHEAD * 8)
    assert np.isfinite(fitted[0].get_ydata()).all()


def test_every_planned_row_stands_in_the_first_table(tmp_path):
    """Rows without runs say so, and there are at most ten."""
    text = budget_page.section(PLANS, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [
        run.label for run in PLANS["budget-2048"].runs
    ]
    assert len(rows) <= 10
    assert all(row.count(budget_page.ABSENT) == 7 for row in rows)
    assert "36 of 36 planned runs are not made" in text
    assert "1. **Loss.** No pattern was run." in text


def test_the_first_table_has_losses_and_retrieval(tmp_path):
    """Losses are minus dense's; sentences name the lowest and what finds most."""
    plan = PLANS["budget-25m-8192"]
    for label, loss, needles in (("dense", 3.0, 0.5), ("geometric bands", 2.9, 0.25)):
        run = run_of(plan, label)
        path = ledger.entry_path(tmp_path, plan.name, run.name)
        ledger.write_entry(path, entry(plan.name, run, loss, needles))
    text = budget_page.section(PLANS, tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| geometric bands |")]
    assert "| -0.1000 | 75 | 25 | 25 | not run |" in row
    (row,) = [line for line in text.splitlines() if line.startswith("| dense |")]
    assert "| 3.0000 | 75 | 50 | 50 | not run |" in row
    lowest = "the lowest loss is that of geometric bands, 0.1000 below dense attention (one seed"
    assert lowest in text
    assert "the pattern that finds most needles is geometric bands, 25 %; dense" in text


def test_scores_at_chance_name_no_pattern(tmp_path):
    """Where no model retrieves, none is called the best; the table shows the plan that has scores,
    and geometric bands stand beside a better pattern.
    """
    plan = PLANS["budget-25m-2048"]
    rows = (("dense", 3.0, 0.0), ("geometric bands", 3.03, 0.01), ("uniform bands", 3.02, 0.0))
    for label, loss, needles in rows:
        run = run_of(plan, label)
        path = ledger.entry_path(tmp_path, plan.name, run.name)
        ledger.write_entry(path, entry(plan.name, run, loss, needles))
    text = budget_page.section(PLANS, tmp_path)
    assert "no model finds more than 1 % of the needles, dense included" in text
    assert "no pattern is below dense attention; nearest is uniform bands, 0.0200 above it" in text
    assert "(one seed, not settled); geometric bands +0.0300." in text
    assert "variables are of 28 M parameters, context 2,048, 692 M tokens" in text


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            (3.011, 3.019, 3.012),
            "0.0123 ± 0.0025 above it (3 seeds); not told apart from 5:1 window 128 "
            "with sinks: 5:1 geometric bands +0.0140 ± 0.0044; geometric bands +0.0300 "
            "(one seed); dense after bands -0.1000 (one seed).",
        ),
        (
            (3.021, 3.024, 3.021),
            "0.0123 ± 0.0025 above it (3 seeds); geometric bands +0.0300 "
            "(one seed); dense after bands -0.1000 (one seed).",
        ),
        (
            (2.985, 3.016, 2.993),
            "0.0020 ± 0.0161 below dense attention (3 seeds, not told apart from it); not told "
            "apart from 5:1 geometric bands: 5:1 window 128 with sinks +0.0123 ± 0.0025; geometric",
        ),
    ],
)
def test_seeds_say_what_is_told_apart(tmp_path, others, said):
    """With seeds the best pattern has its spread, beside dense attention and whatever differs from
    it by less than seeds do; a row of one seed says so.
    """
    plan = PLANS["budget-25m-2048"]
    rows = {
        "dense": (3.0, 3.0, 3.0),
        "5:1 window 128 with sinks": (3.012, 3.015, 3.010),
        "5:1 geometric bands": others,
        "geometric bands": (3.03,),
        "dense after bands": (2.9,),  # a control, never the best pattern
    }
    for label, losses in rows.items():
        run = run_of(plan, label)
        for seed, loss in enumerate(losses):
            made = entry(plan.name, run, loss, 0.25 * seed) | {"seed": seed}
            name = run.name.replace("seed0", f"seed{seed}")
            ledger.write_entry(ledger.entry_path(tmp_path, plan.name, name), made)
    text = budget_page.section(PLANS, tmp_path)
    assert said in text
    assert (
        "| 5:1 window 128 with sinks | not run | +0.0123 ± 0.0025 | not run | 75 ± 0 | 25 ± 25"
        in text
    )
    assert "| geometric bands | not run | +0.0300 | not run | 75 | 0 | 0 |" in text


def test_plans_lend_runs_of_the_same_recipe(tmp_path):
    """A finished run of another plan with equal recipe, data and seed is taken, no other."""
    plan = PLANS["budget-2048"]
    dense, bands = run_of(plan, "dense"), run_of(plan, "geometric bands")
    lent = entry("elsewhere", dense, 3.0) | {"label": "as it was called there"}
    other = entry("elsewhere", bands, 2.9)
    other["recipe"] |= {"learning_rate": 2e-3}
    for name, found in (("dense", lent), ("bands", other)):
        ledger.write_entry(tmp_path / "elsewhere" / f"{name}.json", found)
    mine = [entry(plan.name, run_of(plan, "uniform bands"), 2.8)]
    (found,) = ledger.same_runs(tmp_path, [dense, bands], mine)
    assert (found["label"], found["plan"]) == ("dense", "elsewhere")
    assert ledger.same_runs(tmp_path, [dense], [mine[0] | {"data": "two"}]) == []
    # Fields that do not change what is computed, and those that did not exist, do not count.
    lent["recipe"] |= {"workers": 3}
    del lent["recipe"]["first_attention"]
    (tmp_path / "elsewhere" / "dense.json").write_text(
        json.dumps({"format": ledger.FORMAT, "version": 1, **lent})
    )
    assert len(ledger.same_runs(tmp_path, [dense], mine)) == 1


@pytest.mark.parametrize("name", sorted(PLANS))
def test_rows_of_a_budget_have_equal_pairs(name):
    """Window and duplicated band are those with the pairs of the geometric bands."""
    from spattention.choice import attention_choice

    plan = PLANS[name]
    context = plan.runs[0].fields["context"]
    pairs = {
        run.label: attention_choice(run.fields["attention"], 8, context).pairs(context)
        for run in plan.runs
        if isinstance(run.fields["attention"], str) and not run.fields.get("sinks")
    }
    for label in ("sliding window of equal pairs", "duplicated bands"):
        assert pairs[label] == pytest.approx(pairs["geometric bands"], rel=2e-3)


def test_a_budget_fits_one_stay():
    """At the speeds that the plans name, a run has at most 25 minutes with its evaluation."""
    speeds = {"budget-2048": 600e3, "budget-25m-2048": 900e3, "budget-25m-8192": 750e3}
    for name, speed in speeds.items():
        fields = PLANS[name].runs[0].fields
        tokens = fields["steps"] * fields["batch"] * fields["context"]
        assert tokens >= 650e6
        assert tokens / speed < 22 * 60
        assert len({json.dumps(run.fields["data"]) for run in PLANS[name].runs}) == 1


def test_the_largest_budget_takes_what_its_plan_says():
    """Its model's step, as measured for another plan of the same model, times its steps."""
    step = costs.read_costs(ledger.HERE, "related-2048")["dense"]
    recipe = PLANS["budget-2048"].runs[0].recipe
    assert step["tokens"] == recipe.batch * recipe.context
    assert 13 * 60 < recipe.steps * step["seconds"] < 14 * 60


@pytest.mark.parametrize("name", sorted(PLANS))
def test_steps_of_a_budget_do_not_wait(name):
    """Every run's passes are recorded as a CUDA graph on one GPU, and it is evaluated seldom."""
    for run in PLANS[name].runs:
        assert asks_for_graphs(run.recipe)
        assert refusal(run.recipe, torch.device("cuda"), 1) is None
        assert run.recipe.steps / run.recipe.evaluate_every < 30


def test_the_page_starts_with_its_sentences():
    """The committed page is written by the generator, first table first."""
    text = (Path(evidence.PAGE)).read_text()
    found = {path.stem: read_plan(path) for path in evidence.PLANS.glob("*.toml")}
    assert text.startswith(f"{evidence.TITLE}\n{budget_page.section(found, evidence.HERE)}")
