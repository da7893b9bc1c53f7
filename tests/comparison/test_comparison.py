"""The folder of a comparison, its summary and its report, without training anything."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from spattention.cli.compare import shared_fields, show
from spattention.cli.options.compare import Options
from spattention.comparison.folder import ResultsFolder
from spattention.comparison.plan import Run, plan_of
from spattention.comparison.report import HEADER, Report
from spattention.comparison.summary import Result, check_equal_order, summarize
from spattention.data.prepare import CorpusFacts
from spattention.files import write_atomically
from spattention.training import lock
from spattention.training.lock import held

SETTINGS = {
    **shared_fields(Options(steps=4, context=64, layers=1), 320, Path("data")),
    "data": "abc",
}
FACTS = CorpusFacts("books", "byte-level BPE", 320, 9, 9000, 1, 1000, 5.0, "abc")


def result(attention="dense", seed=0, loss=4.0, **changes):
    made = Result(
        attention=attention,
        seed=seed,
        context=64,
        parameters=1000,
        validation_loss=loss,
        train_losses=[(2, 4.5), (4, 4.1)],
        validation_losses=[(2, 4.4), (4, loss)],
        tokens_per_second=1234.5,
        seconds=3.0,
        pairs=2080 if attention == "dense" else 520,
        memory_before=100 * 2**20,
        memory_peak=150 * 2**20,
        memory_kind="resident set",
        order="same",
        model=f"{attention}-seed{seed}",
        prompt="Alice was",
        continuation=" not here",
    )
    return replace(made, **changes)


def report(*results, missing=()):
    return Report(FACTS, SETTINGS, list(results), list(missing), "spattention compare")


def test_a_result_comes_back_as_it_was(tmp_path):
    folder = ResultsFolder(tmp_path / "out")
    job = Run("shared_local:widths=geometric", 3, {})
    assert folder.find(job) is None
    folder.add(job, result())
    assert folder.find(job) == result()
    assert job.name == "shared_local-widths-geometric-seed3"


def test_runs_bind_a_folder_to_its_settings(tmp_path):
    folder = ResultsFolder(tmp_path)
    folder.claim(SETTINGS | {"steps": 9})
    folder.claim(SETTINGS)  # nothing was run with the others
    folder.add(Run("dense", 0, {}), result())
    ResultsFolder(tmp_path).claim(SETTINGS)
    with pytest.raises(ValueError, match=r"other settings \(steps was 4, now 5\): name another"):
        folder.claim(SETTINGS | {"steps": 5})
    folder.claim(SETTINGS | {"steps": 5}, restart=True)
    assert not folder.runs.exists()


def test_prepared_data_replace_the_old_when_claimed(tmp_path):
    path = tmp_path / "new" / "out"
    folder = ResultsFolder(path)
    with held(folder.path), folder.preparing() as prepared:
        (prepared / "tokens").write_text("1 2 3")
    assert not path.parent.exists()
    for content in ("old", "new"):
        folder = ResultsFolder(path)
        with held(folder.path), folder.preparing() as prepared:
            (prepared / content).write_text(content)
            folder.claim(SETTINGS)
        assert [file.name for file in folder.data.iterdir()] == [content]
    assert {entry.name for entry in path.iterdir()} == {"comparison.json", "data"}


def test_leftovers_of_a_kill_are_in_nobodys_way(tmp_path):
    (tmp_path / ".preparing").mkdir()
    (tmp_path / ".preparing" / "tokens").write_text("1 2")
    with ResultsFolder(tmp_path).preparing() as prepared:
        assert list(prepared.iterdir()) == []


def test_two_processes_do_not_meet_in_one_folder(tmp_path):
    folder = ResultsFolder(tmp_path)
    other = (
        "import sys; from pathlib import Path; "
        "from spattention.training.lock import held\n"
        "with held(Path(sys.argv[1])): print('in')"
    )
    command = [sys.executable, "-c", other, str(tmp_path)]
    with held(folder.path), folder.preparing() as prepared:
        (prepared / "tokens").write_text("1 2")
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert "`--output` must be used by one process at a time" in refused.stderr
        assert (prepared / "tokens").read_text() == "1 2"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "in\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def acquire(self, timeout):
        raise NotImplementedError

    monkeypatch.setattr(lock.FileLock, "acquire", acquire)
    with pytest.warns(UserWarning, match="on a file system without locks"), held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="must be a new or empty folder, or hold an earlier"):
        ResultsFolder(tmp_path)
    with pytest.raises(ValueError, match="must be a folder"):
        ResultsFolder(tmp_path / "models" / "mine")
    assert (tmp_path / "models" / "mine").read_text() == "precious"


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new \ud800")
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_one_seed_leaves_the_spread_unknown():
    dense, bands = summarize([result(), result("exclusive", loss=4.2)])
    assert bands.difference == pytest.approx(0.2)
    assert (dense.verdict, bands.verdict) == ("", "seed spread unknown")


def test_differences_are_paired_by_seed():
    rows = summarize(
        [
            *(result(seed=k, loss=4.0 + k / 10) for k in range(3)),
            *(result("exclusive", seed=k, loss=4.15 + k / 10) for k in range(3)),
            *(result("gapped", seed=k, loss=4.5 + k / 10) for k in range(2)),
        ]
    )
    assert [row.verdict for row in rows] == ["", "within seed spread", "beyond seed spread"]
    assert rows[1].spread == pytest.approx(0.2)
    assert rows[1].difference == pytest.approx(0.15)
    assert rows[2].difference == pytest.approx(0.5)  # of seeds 0 and 1, which both have


def test_a_difference_equal_to_the_spread_is_within():
    losses = {"dense": (4.0, 4.5), "exclusive": (4.5, 5.0), "gapped": (4.5625, 5.0)}
    rows = summarize(
        [result(n, seed=k, loss=x) for n, pair in losses.items() for k, x in enumerate(pair)]
    )
    assert (rows[1].difference, rows[1].spread) == (0.5, 0.5)
    assert (rows[2].difference, rows[2].spread) == (0.53125, 0.5)
    assert [row.verdict for row in rows] == ["", "within seed spread", "beyond seed spread"]


def test_runs_of_one_seed_must_share_their_data():
    check_equal_order([result(), result("exclusive"), result(seed=1, order="other")])
    with pytest.raises(RuntimeError, match="exclusive with seed 0 trained on other data"):
        check_equal_order([result(), result("exclusive", order="other")])


def test_the_table():
    table = report(result(), result("exclusive", loss=4.2)).cells()
    assert [len(cells) for cells in table] == [len(HEADER)] * 3
    assert table[0] == ("dense", "4.000", "", "1.000", "1,234", "2,080", "150 MiB (+50)")
    assert table[1][2:6] == ("+0.200 ?", "0.800", "1,234", "520 (4.0x less)")
    assert table[2][:2] == ("unigram entropy", "5.000")
    costly = report(result(), result("reformer", pairs=3952)).cells()
    assert costly[1][5] == "3,952 (1.9x more)"


def test_a_narrow_terminal_cuts_no_number(tmp_path):
    long = result("shared_local:widths=0/16/32/64/64/128/128/256/256", loss=4.2, pairs=87_296)
    made = report(result(), long, result("published_longformer", pairs=116_296))
    console = Console(width=80, file=io.StringIO())
    show(made, tmp_path, console)
    shown = console.file.getvalue()
    assert "…" not in shown
    for cells in made.cells():
        for cell in cells[1:]:
            assert all(part in shown for part in cell.replace(" (", "\n(").split("\n"))


def test_json_and_markdown(tmp_path):
    made = report(result(), result("exclusive", loss=4.2), missing=["gapped-seed0"])
    made.write(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["model"] == "models/exclusive-seed0"
    assert found["missing"] == ["gapped-seed0"]
    assert found["settings"]["steps"] == 4
    assert found["data"]["unigram_entropy"] == 5.0
    assert found["machine"]["cores"] >= 1
    assert {"python", "torch", "transformers", "spattention"} <= set(found["versions"])
    assert [run["seed"] for run in found["runs"]] == [0, 0]
    assert found["table"][1]["verdict"] == "seed spread unknown"
    page = (tmp_path / "results.md").read_text()
    assert "| exclusive | 4.200 | +0.200 ? |" in page
    assert "Unigram entropy of the evaluated windows: 5.000 nats" in page
    assert "Not finished: gapped-seed0." in page
    assert "Alice was **not here**" in page
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_memory_that_a_system_does_not_tell():
    row = report(result(memory_peak=None, memory_before=None)).cells()[0]
    assert row[-1] == ""


def test_a_plan_is_of_seeds_first():
    """An interruption leaves whole comparisons; runs differ in attention and seed alone."""
    runs = plan_of("title", SETTINGS, ("dense", "exclusive"), (0, 3)).runs
    assert [(run.label, run.seed) for run in runs] == [
        ("dense", 0),
        ("exclusive", 0),
        ("dense", 3),
        ("exclusive", 3),
    ]
    different = {
        name for run in runs for name, value in run.fields.items() if SETTINGS.get(name) != value
    }
    assert different == {"attention", "seed"}


@pytest.mark.parametrize("name", ["context", "batch", "steps"])
def test_plans_refuse(name):
    fields = SETTINGS | {"data": ["data"], "attention": "dense"}
    with pytest.raises(ValueError, match=rf"`{name}` must be in \[\d, [\d,]+\], got 0"):
        _ = Run("dense", 0, fields | {name: 0}).recipe
    with pytest.raises(ValueError, match=r"`learning_rate` must be in \(0, 10\], got 0"):
        _ = Run("dense", 0, fields | {"learning_rate": 0}).recipe
    with pytest.raises(ValueError, match=r"`learning_rate` must be in \(0, 10\], got inf"):
        _ = Run("dense", 0, fields | {"learning_rate": float("inf")}).recipe


def test_other_settings_forget_unfinished_runs(tmp_path):
    """The state of a run that is not finished belongs to its settings, and to its result."""
    folder = ResultsFolder(tmp_path)
    folder.claim(SETTINGS)
    run = Run("dense", 0, {})
    state = folder.training / run.name
    state.mkdir(parents=True)
    ResultsFolder(tmp_path).claim(SETTINGS)
    assert state.is_dir()
    folder.claim(SETTINGS | {"steps": 5})
    assert not state.exists()
    state.mkdir(parents=True)
    folder.add(run, result())
    assert not state.exists()


def test_an_earlier_version_is_named(tmp_path):
    folder = ResultsFolder(tmp_path)
    folder.claim(SETTINGS)
    folder.add(Run("dense", 0, {}), result())
    mark = tmp_path / "comparison.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"version": 1}))
    with pytest.raises(ValueError, match=r"other settings \(version was 1, now 2\)"):
        ResultsFolder(tmp_path).claim(SETTINGS)


def test_damaged_results_of_a_comparison_are_named(tmp_path):
    results = ResultsFolder(tmp_path)
    results.claim(SETTINGS)
    job = Run("dense", 0, {})
    results.add(job, result())
    path = results.runs / "dense-seed0.json"
    good = path.read_text()
    for content in ("{}", "[]", "{", json.dumps(json.loads(good) | {"validation_loss": "low"})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"dense-seed0\.json must hold "):
            results.find(job)
    (tmp_path / "comparison.json").write_text('{"settings": 3}')
    with pytest.raises(ValueError, match=r"comparison\.json must hold `settings`, an object"):
        ResultsFolder(tmp_path).claim(SETTINGS)
