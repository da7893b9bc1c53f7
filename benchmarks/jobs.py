"""Run the work that needs GPUs, `jobs.toml`, on the GPUs that there are and in limited time.

    python -m benchmarks.jobs --list
    python -m benchmarks.jobs suite evidence --minutes 28 --data data --output runs/jobs \
        --package triton-3.9.0=tritons/3.9.0

A name is that of a job or of a group: `suite` is every `suite-*`. What a job comes after is run
with it. Jobs start in the order of the names, then of the file. A GPU that the next job waits for
takes only jobs that end before it would be free.

OUTPUT/NAME has a job's results and its `log`, OUTPUT/work its caches and checkpoints.
OUTPUT/jobs.json is at any time the state of all: exit code, seconds, GPUs and commit, or why a job
does not run. The same command continues with what is not done; what failed before comes last. The
file of jobs is read again when it changes.

Only the standard library is needed, and `PYTHONPATH` is set for the jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOOK_EVERY = 0.3  # seconds
CORES = os.cpu_count() or 1
FAILED = ("failed", "limit")
GRACE = 10.0  # seconds that an interrupted job has to write what it knows


@dataclass(frozen=True)
class Job:
    """A table of jobs.toml. One with `each` is a job for every entry, `NAME-ENTRY`, and `{each}`
    in its fields is the entry, or its text.

    Attributes:
        command: bash, in the root of the repository. `{python}`, `{commit}`, `{data}`, `{output}`
            (the job's own folder), `{work}`, folders of `--package` by their names, and the texts
            at the head of jobs.toml are filled in.
        seconds: its limit.
        why: one line.
        gpus: number of GPUs; 0 for work of the processor.
        share: how many such jobs a GPU takes. With 1, as for timings, it is alone on its GPUs.
        cores: of the processor, that it keeps busy; 0 is not counted.
        least: seconds that it is worth starting for; all of its limit without it.
        after: jobs or groups that must have ended well.
        data: files and folders below `--data` that it reads.
        makes: those that it writes there.
        packages: must be installed or given by `--package`, as in `fla-core`, `triton-3.9.0`.
    """

    name: str
    command: str
    seconds: float
    why: str
    gpus: int = 1
    share: int = 1
    cores: int = 0
    least: float = inf
    after: Sequence[str] = ()
    data: Sequence[str] = ()
    makes: Sequence[str] = ()
    packages: Sequence[str] = ()


@dataclass
class Process:
    """A job that runs, in a process group of its own."""

    job: Job
    popen: subprocess.Popen[bytes]
    gpus: list[str]
    began: float
    deadline: float
    mark: str
    interrupted: bool = False


def read_jobs(path: Path) -> dict[str, Job]:
    """Jobs by name, in order."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    texts = {name: text for name, text in content.items() if isinstance(text, str)}
    jobs = {}
    for name, fields in content.items():
        if name in texts:
            continue
        entries = fields.pop("each", [""])
        for entry in entries:
            each = entries[entry] if isinstance(entries, dict) else entry
            full = f"{name}-{entry}" if entry else name
            jobs[full] = Job(full, **filled(filled(fields, {"each": each}), texts))
    return jobs


def fill(text: str, known: dict[str, str]) -> str:
    """Replace every `{name}` that is known. `${name}` is the shell's."""
    return re.sub(r"(?<!\$)\{([\w.-]+)\}", lambda found: known.get(found[1], found[0]), text)


def filled(fields: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """Fields with all of their texts filled in."""
    quoted = {name: json.dumps(text)[1:-1] for name, text in known.items()}
    return json.loads(fill(json.dumps(fields), quoted))


def named(jobs: dict[str, Job], names: Iterable[str]) -> list[Job]:
    """Jobs by their own names or those of groups, and what these come after."""
    wanted: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        found = {each for each in jobs if f"{each}-".startswith(f"{name}-")}
        if not found:
            raise ValueError(f"names must be of jobs or groups, see --list, got {name!r}")
        left += [after for each in found - wanted for after in jobs[each].after]
        wanted |= found
    return [job for name, job in jobs.items() if name in wanted]


def installed(package: str) -> bool:
    """Whether a package is there, of the version that its name ends with."""
    name, *number = re.split(r"-(?=\d)", package)
    with suppress(PackageNotFoundError):
        return number in ([], [version(name)])
    return False


def said(*command: str) -> str:
    """What a command prints; nothing if it is not there."""
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


class Runner:
    """Runs jobs, and keeps their state in jobs.json."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.commit = os.environ.get("SPATTENTION_COMMIT") or said(
            "git", "-C", str(ROOT), "rev-parse", "HEAD"
        )
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            re.findall(r"^GPU (\d+)", said("nvidia-smi", "-L"), re.M)
        )
        gpus = gpus if options.gpus is None else ",".join(map(str, range(options.gpus)))
        self.gpus = [gpu for gpu in gpus.split(",") if gpu]
        self.packages = dict(text.split("=", 1) for text in options.package)
        minutes = inf if options.minutes is None else options.minutes
        self.end = time.monotonic() + 60 * minutes - GRACE
        self.file = options.output / "jobs.json"
        self.state: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            self.state = json.loads(self.file.read_text())
        self.running: list[Process] = []
        self.tried: set[str] = set()
        self.changed = 0.0
        self.read()

    def read(self) -> None:
        """Read the jobs if their file has changed. Those that failed before come last."""
        try:
            changed = self.options.jobs.stat().st_mtime
            if changed == self.changed:
                return
            self.changed = changed
            every = read_jobs(self.options.jobs)
            names = self.options.names or every
            jobs = {job.name: job for name in names for job in named(every, [name])}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if not self.tried:
                raise
            return print(f"{self.options.jobs} is not taken: {error}", flush=True)
        self.every = every
        for name in jobs:
            self.state.setdefault(name, {"state": "waiting"})
        self.jobs = sorted(jobs.values(), key=lambda job: self.state[job.name]["state"] in FAILED)

    def done(self, job: Job) -> bool:
        """Whether it ended well, and what it made is still there."""
        made = all((self.options.data / each).exists() for each in job.makes)
        return made and self.state[job.name]["state"] == "done"

    def limit(self, job: Job) -> float:
        """Seconds that a job gets now."""
        return min(job.seconds, self.end - time.monotonic())

    def has(self, package: str) -> bool:
        """Whether a package is given or installed."""
        folder = self.packages.get(package)
        return Path(folder).is_dir() if folder else installed(package)

    def obstacle(self, job: Job) -> str:
        """Why a job cannot start, whatever the GPUs do."""
        before = named(self.every, job.after)
        made = {path for each in before for path in each.makes}
        missing = [str(self.options.data / each) for each in job.data if each not in made]
        missing = [path for path in missing if not Path(path).exists()]
        missing += [each for each in job.packages if not self.has(each)]
        if job.gpus > len(self.gpus):
            missing.append(f"{job.gpus} GPUs")
        if missing:
            return f"needs {', '.join(missing)}"
        if waits := [each.name for each in before if not self.done(each)]:
            return f"comes after {', '.join(waits)}"
        return "" if self.limit(job) >= min(job.seconds, job.least) else "too little time is left"

    def lacks(self) -> bool:
        """Whether a job could still run if what it needs came."""
        left = [job for job in self.jobs if job.name not in self.tried and not self.done(job)]
        left = [job for job in left if job.gpus <= len(self.gpus)]
        needs = any(self.obstacle(job).startswith("needs") for job in left)
        return needs and time.monotonic() < self.end

    def step(self) -> bool:
        """End and start what is due; whether anything runs."""
        self.read()
        before = list(self.running)
        for process in before:
            self.look(process)
        self.start()
        self.write()
        if self.running != before:
            self.show()
        return bool(self.running)

    def look(self, process: Process) -> None:
        """Record the end of a job; interrupt one that is over its limit, and then end it."""
        code, over = process.popen.poll(), time.monotonic() - process.deadline
        if code is None and over > 0 and not process.interrupted:
            process.interrupted = True
            with suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGINT)
        if code is not None or over > GRACE:
            limit = "cut" if process.deadline > self.end - 1 else "limit"
            self.finish(process, limit if process.interrupted else "failed" if code else "done")

    def finish(self, process: Process, state: str) -> None:
        """Leave nothing of a job on its GPU, and record how it ended."""
        with suppress(ProcessLookupError):
            os.killpg(process.popen.pid, signal.SIGKILL)
        for path in Path("/proc").glob("[0-9]*/environ"):  # other sessions, such as torchrun's
            with suppress(OSError):
                if process.mark.encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
        name, seconds = process.job.name, round(time.monotonic() - process.began, 1)
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs
            process.popen.wait(GRACE)
        code = process.popen.returncode
        self.state[name] |= {"state": state, "exit": code, "seconds": seconds}
        self.running.remove(process)
        print(f"{name}: {state} after {seconds:.0f} s, exit code {code}", flush=True)

    def start(self) -> None:
        """Start the jobs that fit, in order."""
        held: dict[str, float] = {}  # until when a GPU takes other jobs than one that waits for it
        quiet = inf  # until when jobs that count their cores may run beside one that waits for them
        for job in self.jobs:
            if job.name in self.tried or self.done(job):
                continue
            if why := self.obstacle(job):
                self.state[job.name]["why"] = why
                continue
            until = time.monotonic() + self.limit(job)
            enough = self.enough_cores(job)
            if enough or (job.cores and until > quiet):
                self.state[job.name]["why"] = "waits for cores"
                quiet = min(quiet, enough or quiet)
                continue
            load, free = dict.fromkeys(self.gpus, Fraction(0)), dict.fromkeys(self.gpus, 0.0) | held
            for each in self.running:
                for gpu in each.gpus:
                    load[gpu] += Fraction(1, each.job.share)
                    free[gpu] = max(free[gpu], each.deadline)
            fit = [g for g in self.gpus if load[g] + Fraction(1, job.share) <= 1]
            fit = [gpu for gpu in fit if until <= held.get(gpu, inf)]
            fit.sort(key=load.__getitem__, reverse=True)  # what is alone finds a GPU that is free
            if len(fit) >= job.gpus:
                self.launch(job, fit[: job.gpus])
                continue
            self.state[job.name]["why"] = "waits for a GPU"
            wanted = sorted(self.gpus, key=free.__getitem__)[: job.gpus]
            until = max(free[gpu] for gpu in wanted)
            held |= {gpu: min(until, held.get(gpu, inf)) for gpu in wanted}

    def enough_cores(self, job: Job) -> float:
        """When there are enough for a job, at the latest; 0 for now."""
        busy = [(each.deadline, each.job.cores) for each in self.running if each.job.cores]
        left = sum(cores for _, cores in busy)
        if not job.cores or not left or left + job.cores <= CORES:
            return 0.0
        for deadline, cores in sorted(busy):
            left -= cores
            if not left or left + job.cores <= CORES:
                return deadline
        raise AssertionError

    def launch(self, job: Job, gpus: list[str]) -> None:
        """Start a job on these GPUs."""
        data, home = self.options.data.resolve(), self.options.output.resolve()
        output, work = home / job.name, home / "work" / job.name
        output.mkdir(parents=True, exist_ok=True)
        (work / "triton").mkdir(parents=True, exist_ok=True)
        packages = {name: str(Path(each).resolve()) for name, each in self.packages.items()}
        known = {"python": sys.executable, "commit": self.commit or "unknown", **packages}
        known |= {"data": str(data), "output": str(output), "work": str(work)}
        command = fill(job.command, {name: shlex.quote(value) for name, value in known.items()})
        paths = [packages[name] for name in job.packages if name in packages]
        paths += [f"{ROOT}/src", f"{ROOT}", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        mark = f"{job.name} {os.getpid()} {time.time()}"
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "SPATTENTION_COMMIT": known["commit"],
            "SPATTENTION_JOB": mark,
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "TRITON_CACHE_DIR": str(work / "triton"),
        }  # fmt: skip
        with (output / "log").open("ab") as log:
            popen = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        now = time.monotonic()
        self.running.append(Process(job, popen, gpus, now, now + self.limit(job), mark))
        self.tried.add(job.name)
        self.state[job.name] = {"state": "running", "gpus": gpus, "commit": known["commit"]}

    def write(self) -> None:
        """Write the state, whole: somebody may read it at any time."""
        text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.state.items())
        self.file.with_suffix(".new").write_text(f"{{\n{text}\n}}\n")
        self.file.with_suffix(".new").replace(self.file)

    def show(self) -> None:
        """Print what runs, and how many jobs are in which state."""
        for each in self.running:
            spent, limit = time.monotonic() - each.began, each.deadline - each.began
            print(f"  {each.job.name:48} GPU {','.join(each.gpus):4} {spent:.0f} of {limit:.0f} s")
        states = [self.state[job.name]["state"] for job in self.jobs]
        print("  " + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """0 if all jobs that were asked for are done, else 3."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="of jobs or groups, all by default")
    parser.add_argument("--list", action="store_true", help="print the jobs and their state")
    parser.add_argument("--minutes", type=float, help="end after that time, whatever runs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="see jobs.toml")
    parser.add_argument("--output", type=Path, default=Path("runs/jobs"))
    parser.add_argument("--package", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--gpus", type=int, help="their number, where it is not to be asked for")
    parser.add_argument("--stay", action="store_true", help="wait for data that come later")
    parser.add_argument("--jobs", type=Path, default=Path(__file__).with_suffix(".toml"))
    options = parser.parse_args(arguments)
    try:
        runner = Runner(options)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        parser.error(str(error))
    for job in runner.jobs:
        state, why = runner.state[job.name]["state"], runner.obstacle(job)
        if options.list:
            print(f"{job.name:56} {state:8} {job.gpus} GPU {job.seconds:4} s  {job.why}")
        elif why.startswith("needs") and not runner.done(job):
            print(f"{job.name} {why}", flush=True)
    if options.list:
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background ignores the first
        signal.signal(number, signal.default_int_handler)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        while runner.step() or (options.stay and runner.lacks()):
            time.sleep(LOOK_EVERY)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        for process in list(runner.running):
            runner.finish(process, "cut")
        runner.write()
    return 0 if all(runner.done(job) for job in runner.jobs) else 3


if __name__ == "__main__":
    sys.exit(main())
