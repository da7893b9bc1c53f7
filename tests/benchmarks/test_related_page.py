"""The tables and sentences of docs/related.md, from entries and costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import costs, evidence, ledger, related_page
from benchmarks.experiments.plan_files import read_plan
from spattention import BandPattern, hf, related
from spattention.data.token_file import write_token_file
from spattention.data.tokens import TokenStream
from spattention.models import build, preset

PLAN = read_plan(evidence.PLANS / "related-2048.toml")
BANDS = "shared_local:widths=geometric,local=64"
CCA = "cca:group=4,window=128,bands=exclusive:widths=geometric"


def finish(folder: Path, label: str, loss: float, seed: int = 0, cache: int | None = None) -> None:
    """Write the entry of a finished run."""
    run = next(run for run in PLAN.runs if run.label == label)
    final = {"loss": {"mean": loss, "error": 0.01}}
    made = {
        "plan": PLAN.name,
        "label": label,
        "seed": seed,
        "step": run.fields["steps"],
        "recipe": run.recipe.to_dict() | {"seed": seed},
        "data": "one",
        "facts": {"pairs_per_token": 8.0 if label == "dense" else 2.0},
        "final": final if cache is None else final | {"cache_bytes": cache},
    }
    name = run.name.replace("seed0", f"seed{seed}")
    ledger.write_entry(ledger.entry_path(folder, PLAN.name, name), made)


def cost(folder: Path, label: str, seconds: float, gpu: str = "one") -> None:
    """Write what a step of a row took."""
    content = {
        "format": costs.FORMAT,
        "version": 1,
        "label": label,
        "commit": "abcdefghij",
        "gpu": gpu,
        "tokens": 32_768,
        "seconds": seconds,
    }
    path = folder / PLAN.name / costs.COSTS / f"{re.sub('[^a-z0-9]', '-', label)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_related_systems_have_their_own_baselines():
    """Bands are what a system is combined with; the norm alone is what mixing adds to."""
    assert related_page.bands_of("cca:group=4,bands=exclusive:first=2") == "exclusive:first=2"
    assert [related_page.bands_of(n) for n in ("mea", "exclusive", "dense")] == [None] * 3
    assert related_page.norm_of("mea") == "mea:mix=0"
    assert related_page.norm_of("mea:bands=exclusive") == "mea:mix=0,bands=exclusive"
    assert [related_page.norm_of(n) for n in ("mea:mix=0", "mea:mix=0,bands=exclusive")] == [
        None,
        None,
    ]
    assert related_page.norm_of("cca:bands=exclusive") is None


def test_rows_have_time_cache_and_differences(tmp_path):
    """Each row has its differences, time and cache; what is not known says so."""
    finish(tmp_path, "dense", 3.0, cache=4000)
    finish(tmp_path, BANDS, 2.9, cache=1000)
    finish(tmp_path, f"mea:bands={BANDS}", 2.88, cache=4000)
    finish(tmp_path, f"mea:mix=0,bands={BANDS}", 2.85)
    for label, seconds in (("dense", 0.05), (BANDS, 0.04), ("recurrent_near", 0.2)):
        cost(tmp_path, label, seconds)
    text = related_page.section(PLAN, tmp_path)
    assert f"| {BANDS} | 2.9000 | -0.1000 |  |  | 0.80 | 0.25 | 0.25 | 1 |" in text
    assert f"| mea:bands={BANDS} | 2.8800 | -0.1200 | -0.0200 | +0.0300 | ? | 1.00 |" in text
    assert f"| mea:mix=0,bands={BANDS} | 2.8500 | -0.1500 | -0.0500 |  | ? | ? |" in text
    assert "| recurrent_near | not run |  |  |  | 4.00 |  |  | 0 |" in text
    assert "on one one that did nothing else (abcdefg)" in text
    assert "50.0 ms for 32,768 tokens" in text


def test_sentences_say_what_adds_to_bands(tmp_path):
    """Systems are better or worse than bands only where seeds tell them apart."""
    for seed, shift in ((0, 0.0), (1, 0.1)):
        finish(tmp_path, "dense", 3.0 + shift, seed)
        finish(tmp_path, BANDS, 2.9 + shift, seed)
        finish(tmp_path, f"mea:mix=0,bands={BANDS}", 2.88 + shift, seed)
        finish(tmp_path, f"mea:bands={BANDS}", 2.87 + shift * 1.3, seed)
    finish(tmp_path, "elementwise:order=2", 3.5)
    # Its own bands have no run, so that it stands beside the best ones.
    finish(tmp_path, CCA, 3.2)
    text = related_page.section(PLAN, tmp_path)
    better = f"- Better than its bands: `mea:mix=0,bands={BANDS}` (`{BANDS}`) -0.0200 ± 0.0000."
    assert better in text
    assert f"- Not told apart from its bands: `mea:bands={BANDS}` (`{BANDS}`) -0.0150 ±" in text
    worse = f"`{CCA}` +0.3000; `elementwise:order=2` +0.6000."
    assert f"- Worse than `{BANDS}`, the best bands: {worse}" in text
    assert f"- Not told apart from the head norm alone: `mea:bands={BANDS}` +0.0050 ±" in text


@pytest.mark.parametrize(
    ("gaps", "found"),
    [
        ([-0.02], "Better than"),
        ([-0.005], "Not told apart from"),
        ([0.02], "Worse than"),
        ([-0.005, -0.006], "Better than"),
        ([-0.005, 0.001], "Not told apart from"),
        ([-0.001, -0.009], "Not told apart from"),
    ],
)
def test_a_verdict_needs_seeds_that_agree(gaps, found):
    """One seed must differ by more than it may by chance, several by more than their spread."""
    assert related_page.verdict(gaps) == found


def test_tables_lie_between_the_marks(tmp_path):
    """Writing replaces what lies between the marks and nothing else, the same each time."""
    page = tmp_path / "related.md"
    page.write_text(f"before\n{related_page.BEGIN}\nold\n{related_page.END}\nafter\n")
    related_page.write(page, {PLAN.name: PLAN}, tmp_path)
    text = page.read_text()
    assert "nothing of this was run yet" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    related_page.write(page, {PLAN.name: PLAN}, tmp_path)
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must have the marks"):
        related_page.write(page, {}, tmp_path)


def test_the_committed_tables_are_those_of_the_ledger(tmp_path):
    """docs/related.md holds what the generator writes from the committed entries."""
    committed = evidence.ROOT / "docs" / "related.md"
    page = tmp_path / "related.md"
    page.write_text(committed.read_text())
    plans = {path.stem: read_plan(path) for path in evidence.PLANS.glob("*.toml")}
    related_page.write(page, plans, evidence.HERE)
    assert page.read_text() == committed.read_text()


def test_costs_of_two_gpus_raise(tmp_path):
    """Times of two kinds of GPU are never put into one table."""
    cost(tmp_path, "dense", 0.05)
    cost(tmp_path, BANDS, 0.04, gpu="two")
    with pytest.raises(ValueError, match=r"must be of one GPU, got \['one', 'two'\]"):
        costs.read_costs(tmp_path, PLAN.name)
    (tmp_path / PLAN.name / costs.COSTS / "other.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="must be of format spattention-costs, version 1"):
        costs.read_costs(tmp_path, PLAN.name)


def test_caches_are_those_of_generation():
    """Bytes of keys and values after a text: all of it, what bands reach, or a state."""
    chosen = preset("olmoe-tiny", vocab_size=64, context=64, num_layers=1)
    text = torch.arange(64)[None]
    whole = costs.cache_after(build(chosen, pattern=None), text)
    heads = chosen.config.num_attention_heads
    assert whole == 64 * 2 * chosen.config.hidden_size * 4
    model = build(chosen, pattern=None)
    hf.apply(model, BandPattern.sliding_window(heads, 64, 8))
    assert costs.cache_after(model, text) < whole  # the window, and room to take tokens back
    model = build(chosen, pattern=None)
    related.apply(model, related.Elementwise(heads, 64, order=2))
    assert costs.cache_after(model, text) == 6 * chosen.config.hidden_size * 4


def test_a_row_is_measured_once(tmp_path, monkeypatch):
    """A failing row keeps no other from being measured, and one that has a file is left alone."""
    plan = """
title = "tiny"
[recipe]
model = "olmoe-tiny"
layers = 1
vocabulary = 64
data = ["held.u16.xz"]
validation = ["held.u16.xz"]
context = 16
steps = 4
batch = 2
micro_batch = 1
learning_rate = 1e-2
warmup = 1
precision = "float32"
loss = "plain"
threads = 1
[[run]]
attention = "dense"
seeds = [0, 1]
[[run]]
attention = "mea"
"""
    (tmp_path / "tiny.toml").write_text(plan)
    documents = [np.arange(40, dtype=np.uint16) for _ in range(8)]
    write_token_file(tmp_path / "held.u16.xz", TokenStream.from_documents(documents), 39)
    options = costs.Options(
        plans=(tmp_path / "tiny.toml",), data=tmp_path, ledger=tmp_path, repeats=2, commit="abc"
    )
    measure = costs.measure

    def fails(recipe, *arguments):
        if recipe.attention == "dense":
            raise RuntimeError("no memory")
        return measure(recipe, *arguments)

    monkeypatch.setattr(costs, "measure", fails)
    assert not costs.main(options)
    assert sorted(costs.read_costs(tmp_path, "tiny")) == ["mea"]
    monkeypatch.setattr(costs, "measure", measure)
    before = (tmp_path / "tiny" / "costs" / "mea.json").stat().st_mtime_ns
    assert costs.main(options)
    found = costs.read_costs(tmp_path, "tiny")
    assert sorted(found) == ["dense", "mea"]
    assert before == (tmp_path / "tiny" / "costs" / "mea.json").stat().st_mtime_ns
    assert len(found["dense"]["all_seconds"]) == 2
    assert 0 < found["dense"]["seconds"] < 60
    assert found["dense"]["tokens"] == 32


def test_times_are_over_dense_of_their_sitting(tmp_path):
    """A GPU of the same name may be slower another day."""
    finish(tmp_path, "dense", 3.0, cache=4000)
    for label, seconds in (("dense", 0.05), ("mea", 0.06), ("dga", 0.4)):
        cost(tmp_path, label, seconds)
    folder = tmp_path / PLAN.name / costs.COSTS
    later = json.loads((folder / "dga.json").read_text()) | {"commit": "later"}
    (folder / "dga.json").write_text(json.dumps(later))
    assert costs.read_costs(tmp_path, PLAN.name)["dga"]["over_dense"] is None
    dense = json.loads((folder / "dense.json").read_text()) | {"commit": "later", "seconds": 0.1}
    (folder / "dense-later.json").write_text(json.dumps(dense))
    found = costs.read_costs(tmp_path, PLAN.name)
    assert found["dense"]["seconds"] == 0.05
    assert {label: round(each["over_dense"], 6) for label, each in found.items()} == {
        "dense": 1.0,
        "mea": 1.2,
        "dga": 4.0,
    }
