"""`benchmarks.jobs`: jobs of a file on pretended GPUs, and the committed file."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tyro

from benchmarks.conversion.rows import ROWS
from benchmarks.experiments.plan_files import chosen, read_plan
from benchmarks.jobs import ROOT, Job, fill, named, read_jobs, said

COMMITTED = read_jobs(ROOT / "benchmarks" / "jobs.toml")
TIMED = (
    "date +%s.%N > {output}/began; echo $CUDA_VISIBLE_DEVICES > {output}/gpus; "
    "sleep SECONDS; date +%s.%N > {output}/ended"
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Write a file of jobs and run some of them."""

    def call(jobs: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
        if jobs is not None:
            (tmp_path / "jobs.toml").write_text(jobs)
        return subprocess.run(
            command(tmp_path, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    return call


def command(folder: Path, *arguments: str) -> list[str]:
    places = {"--jobs": "jobs.toml", "--output": "out", "--data": "data"}
    given = [text for name, place in places.items() for text in (name, f"{folder / place}")]
    return [sys.executable, "-m", "benchmarks.jobs", "--gpus", "2", *given, *arguments]


def table(name: str, text: str, **fields: Any) -> str:
    """A job of a file; `SECONDS(x)` is one that sleeps and says when it ran."""
    text = re.sub(r"SECONDS\((.*)\)", lambda found: TIMED.replace("SECONDS", found[1]), text)
    fields = {"command": text, "seconds": 30, "why": "a test", **fields}
    return f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in fields.items())


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "jobs.json").read_text())


def times(folder: Path, name: str) -> tuple[float, float, list[str]]:
    began, ended, gpus = (
        (folder / "out" / name / each).read_text().strip() for each in ("began", "ended", "gpus")
    )
    return float(began), float(ended), gpus.split(",")


def test_gpus_are_shared_as_jobs_allow(run: Run, tmp_path: Path) -> None:
    """A job with `share = 1` overlaps no other on its GPU, and no GPU takes too many."""
    shares = {"a": 2, "b": 2, "c": 2, "alone-d": 1, "e": 3, "alone-f": 1, "g": 2, "h": 3}
    done = run("".join(table(name, "SECONDS(0.4)", share=k) for name, k in shares.items()))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: times(tmp_path, name) for name in shares}
    assert {gpu for _, _, gpus in found.values() for gpu in gpus} == {"0", "1"}
    for gpu in "01":
        for began, _, _ in found.values():
            beside = [n for n, (a, b, on) in found.items() if gpu in on and a <= began < b]
            assert sum(Fraction(1, shares[name]) for name in beside) <= 1, beside


def test_a_job_of_two_gpus_is_not_starved(run: Run, tmp_path: Path) -> None:
    """Later jobs start before it only where they end before its GPUs could be free."""
    jobs = [
        table("long", "SECONDS(1.5)", seconds=5),
        table("both", "SECONDS(0.2)", gpus=2),
        table("late", "SECONDS(0.2)", seconds=20),
        table("quick", "SECONDS(0.2)", seconds=2),
        table("processor", "SECONDS(0.2)", gpus=0),
    ]
    assert run("".join(jobs)).returncode == 0
    long, both, late, quick, processor = (
        times(tmp_path, name) for name in ("long", "both", "late", "quick", "processor")
    )
    assert both[2] == ["0", "1"]
    assert long[1] < both[0] < late[0]
    assert quick[1] < both[0]
    assert processor[2] == [""]
    assert processor[1] < long[1]


def test_cores_are_counted(run: Run, tmp_path: Path) -> None:
    """Jobs that want more cores than there are follow one another; others do not wait."""
    jobs = [table(name, "SECONDS(0.5)", cores=10**6) for name in ("first", "second")]
    assert run("".join([*jobs, table("beside", "SECONDS(0.1)")])).returncode == 0
    first, second, beside = (times(tmp_path, name) for name in ("first", "second", "beside"))
    assert beside[1] < second[0] > first[1]


def test_small_jobs_do_not_starve_one_of_many_cores(run: Run, tmp_path: Path) -> None:
    """They start only if they end before there are enough cores for it."""
    small = [table(f"small-{k}", "SECONDS(0.5)", gpus=0, cores=1, seconds=9) for k in range(4)]
    jobs = [
        table("first", "SECONDS(0.7)", gpus=0, cores=1, seconds=5),
        table("big", "SECONDS(0.1)", gpus=0, cores=10**6),
    ]
    assert run("".join([*jobs, *small])).returncode == 0
    big = times(tmp_path, "big")
    assert all(times(tmp_path, f"small-{k}")[0] > big[1] for k in range(4))


def test_jobs_run_in_the_root(tmp_path: Path) -> None:
    place = table("where", "test -d tests/gpu && test -d {output}")
    (tmp_path / "jobs.toml").write_text(place)
    relative = ["--jobs", "jobs.toml", "--output", "out", "--gpus", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.jobs", *relative], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    commit = os.environ.get("SPATTENTION_COMMIT") or said(
        "git", "-C", str(ROOT), "rev-parse", "HEAD"
    )
    assert state(tmp_path)["where"]["commit"] == (commit or "unknown")


def test_nothing_is_waited_for_that_cannot_come(run: Run) -> None:
    """GPUs do not come while jobs run, data may."""
    done = run(table("wide", "true", gpus=9) + table("one", "true"), "--stay", "--gpus", "1")
    assert done.returncode == 3
    assert run(table("late", "true"), "--minutes", "0").returncode == 3


def test_a_limit_ends_a_job_and_its_children(run: Run, tmp_path: Path) -> None:
    """Also children in sessions of their own, as torchrun's."""
    child = "sleep 60 & echo $! > {output}/child; setsid sleep 61 & sleep 62"
    done = run(table("stuck", child, seconds=0.5) + table("next", "SECONDS(0.1)"))
    assert done.returncode == 3
    assert state(tmp_path)["stuck"]["state"] == "limit"
    assert state(tmp_path)["next"]["state"] == "done"
    mark = b"SPATTENTION_JOB=stuck "
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if has(path, mark)]
    assert not left


def has(path: Path, mark: bytes) -> bool:
    try:
        return mark in path.read_bytes()
    except OSError:
        return False


def test_the_same_command_continues(run: Run, tmp_path: Path) -> None:
    """What is done is not run again; what failed comes last, and stops nothing."""
    count = "echo $SPATTENTION_COMMIT >> {output}/count; date +%s.%N > {output}/began; "
    jobs = [
        table("fails", count + "test -e {data}/there"),
        table("depends", count + "true", after=["fails"]),
        table("good", count + "true"),
    ]
    assert run("".join(jobs)).returncode == 3
    found = state(tmp_path)
    assert {name: each["state"] for name, each in found.items()} == {
        "fails": "failed",
        "depends": "waiting",
        "good": "done",
    }
    assert found["fails"]["exit"] == 1
    assert found["depends"]["why"] == "comes after fails"
    (tmp_path / "data" / "there").mkdir(parents=True)
    assert run("".join([*jobs, table("new", count + "sleep 0.5", gpus=2)])).returncode == 0
    out = tmp_path / "out"
    runs = {each.name: len((each / "count").read_text().split()) for each in out.glob("[a-v]*/")}
    assert runs == {"fails": 2, "depends": 1, "good": 1, "new": 1}
    assert (out / "new" / "began").read_text() < (out / "fails" / "began").read_text()


def test_what_is_missing_is_named_at_the_start(run: Run, tmp_path: Path) -> None:
    """Data that a job before it makes are not missing."""
    jobs = [
        table("reads", "true", data=["streams"]),
        table("newer", "true", packages=["triton-99.1", "pytest"]),
        table("larger", "true", gpus=3),
        table("makes", "mkdir -p {data}/made", makes=["made"]),
        table("takes", "test -d {data}/made", data=["made"], after=["makes"]),
        table("given", "echo {given} $PYTHONPATH > {output}/path", packages=["given"]),
    ]
    done = run("".join(jobs), "--package", f"given={tmp_path}")
    assert done.returncode == 3
    assert done.stdout.splitlines()[:3] == [
        f"reads needs {tmp_path}/data/streams",
        "newer needs triton-99.1",
        "larger needs 3 GPUs",
    ]
    assert [state(tmp_path)[name]["state"] for name in ("makes", "takes", "given")] == ["done"] * 3
    folder, path = (tmp_path / "out" / "given" / "path").read_text().split()
    assert folder == str(tmp_path)
    assert path.startswith(f"{tmp_path.resolve()}:{ROOT}/src:{ROOT}")


def test_data_may_come_later(run: Run, tmp_path: Path) -> None:
    """With `--stay`; it ends once nothing is missing."""
    late = tmp_path / "data" / "late"
    brings = subprocess.Popen(["bash", "-c", f"sleep 1.5; mkdir -p {late}"])
    done = run(table("reads", "test -d {data}/late", data=["late"]), "--stay")
    brings.wait()
    assert done.returncode == 0
    assert done.stdout.startswith(f"reads needs {late}")


def test_time_that_is_left_decides(run: Run, tmp_path: Path) -> None:
    """A job whose limit is no longer left starts only for `least` seconds, and is cut."""
    jobs = [
        table("whole", "sleep 60", seconds=60),
        table("short", "true", seconds=1),
        table("worth", "sleep 60", seconds=60, least=0.5),
    ]
    assert run("".join(jobs), "--minutes", str(12 / 60)).returncode == 3
    found = state(tmp_path)
    assert [found[name]["state"] for name in ("whole", "short", "worth")] == [
        "waiting",
        "done",
        "cut",
    ]
    assert found["whole"]["why"] == "too little time is left"


def test_an_interrupt_ends_all_and_files_are_reread(tmp_path: Path) -> None:
    """A job that is written into the file while others run is taken up."""
    file = tmp_path / "jobs.toml"
    file.write_text(table("first", "sleep 60", gpus=2) + table("group-second", "true", gpus=2))
    runner = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: state(tmp_path)["first"]["state"] == "running")
    file.write_text("no = [file")
    wait_for(lambda: "not taken" in (runner.stdout.readline() if runner.stdout else ""))
    file.write_text(table("first", "sleep 60", gpus=2) + table("added", "true", gpus=0))
    wait_for(lambda: state(tmp_path).get("added", {}).get("state") == "done")
    runner.send_signal(signal.SIGINT)
    assert runner.wait(20) == 3
    found = state(tmp_path)
    assert found["first"]["state"] == "cut"
    assert found["group-second"]["state"] == "waiting"


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail("waited for 20 s")


def test_names_give_the_order(run: Run) -> None:
    """Then the file does."""
    jobs = [table(name, "true", gpus=2) for name in ("a-1", "b", "a-2", "c")]
    done = run("".join(jobs), "c", "a")
    assert re.findall(r"^(\S+): done", done.stdout, re.M) == ["c", "a-1", "a-2"]


def test_jobs_come_by_names_and_groups() -> None:
    """With what they come after; a group is no prefix of a word."""
    jobs = {name: Job(name, "true", 1, "") for name in ("suite-a", "suite-b", "suites")}
    jobs["late"] = Job("late", "true", 1, "", after=["suite-b"])
    assert [job.name for job in named(jobs, ["suite"])] == ["suite-a", "suite-b"]
    assert [job.name for job in named(jobs, ["late"])] == ["suite-b", "late"]
    with pytest.raises(ValueError, match="'sui'"):
        named(jobs, ["sui"])


KNOWN = {"python": "PYTHON", "commit": "0" * 40, "data": "data", "output": "out", "work": "work"}


def python_commands(text: str) -> list[list[str]]:
    """Arguments of every `PYTHON` of a bash command, also of those that it hands on in quotes."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        words = list(lexer)
        ends = [k for k, word in enumerate(words) if re.fullmatch(r"[;|&<>]+", word)]
        for k, end in pairwise([-1, *ends, len(words)]):
            part = words[k + 1 : end]
            found += [each for word in part if " " in word for each in python_commands(word)]
            if "PYTHON" in part:
                found.append(part[part.index("PYTHON") + 1 :] + ["0"] * ("-n" in part[:6]))
    return found


def calls() -> dict[str, dict[str, list[str]]]:
    """Arguments that each module is called with, by the number and name of the job."""
    found: dict[str, dict[str, list[str]]] = {}
    for job in COMMITTED.values():
        known = KNOWN | {each: f"packages/{each}" for each in job.packages}
        for number, words in enumerate(
            python_commands(fill(job.command, known).replace("PART", "0"))
        ):
            if words[words.index("-m") + 1] == "torch.distributed.run":
                words = words[words.index("-m") + 2 :]
            at = words.index("-m") + 1
            found.setdefault(words[at], {})[f"{number} {job.name}"] = words[at + 1 :]
    return found


CALLS = calls()


class Parsed(Exception):
    """Ends a program where its options are known."""


@pytest.fixture
def options_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], Any]:
    """Run a module until it has parsed these arguments."""

    def stop(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*args: Any, **kwargs: Any) -> None:
            raise Parsed(parse(*args, **kwargs))

        return parsed

    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", stop(argparse.ArgumentParser.parse_args)
    )
    monkeypatch.setattr(tyro, "cli", stop(tyro.cli))

    def call(module: str, arguments: list[str]) -> Any:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with warnings.catch_warnings(action="ignore"), pytest.raises(Parsed) as found:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        return found.value.args[0]

    return call


@pytest.mark.parametrize("module", CALLS)
def test_committed_jobs_can_be_called(module: str, options_of: Callable[..., Any]) -> None:
    """A module has the options of its jobs, and their tests, files, rows and runs are there."""
    for name, arguments in CALLS[module].items():
        for word in arguments:
            if word.startswith(("tests/", "benchmarks/")):
                assert list(ROOT.glob(word)), f"{name}: {word}"
        if module == "pytest":
            continue
        options = options_of(module, arguments)
        if module == "benchmarks.experiments.run":
            plans = [read_plan(ROOT / path) for path in options.plans]
            assert len(chosen(plans, options.only)) == 1, name
        if module == "benchmarks.conversion":
            assert set(options.rows) <= set(ROWS), name


def test_committed_jobs_are_whole() -> None:
    """Every job has a command, nothing is left to fill in, and jobs come after those that exist."""
    assert {name.split("-")[0] for name in COMMITTED} == {
        *("prepare", "suite", "speed", "parallel", "evidence", "conversion", "serving")
    }
    for job in COMMITTED.values():
        assert python_commands(fill(job.command, KNOWN)), job.name
        left = set(re.findall(r"(?<!\$)\{([\w.-]+)\}", job.command)) - {*KNOWN, *job.packages}
        assert not left, f"{job.name} names {left}"
        assert job.share >= 1 <= job.seconds <= 1500, job.name
        assert job.why
        assert "\n" not in job.why
        assert named(COMMITTED, job.after) or not job.after
    head = (ROOT / "benchmarks" / "jobs.toml").read_text().split("[", 1)[0]
    made = re.findall(r"by the job `([\w-]+)`", head)
    assert len(made) == 2
    assert COMMITTED.keys() >= {*made}


def test_every_test_of_a_gpu_is_in_a_job() -> None:
    """Files of tests/gpu that no shard of the suite has, none or two times."""
    shards = {
        n: j.command for n, j in COMMITTED.items() if n.startswith(("suite-own", "parallel-tests"))
    }
    files = [
        file
        for command in shards.values()
        for file in re.findall(r"tests/gpu/test_\w+\.py", listed(command.partition("||")[0]))
    ]
    assert sorted(files) == sorted(
        str(f.relative_to(ROOT)) for f in ROOT.glob("tests/gpu/test_*.py")
    )


def listed(command: str) -> str:
    """What bash makes of a command's words."""
    words = command.partition("results.xml")[2]
    return subprocess.run(
        ["bash", "-c", f"echo {words}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
