"""Measure attention and its competitors against the hardware's limit, and write the page.

`run` measures the cases of `cases.py` on one GPU. Output and gradients of every call are compared
with float64 on a sample of query rows before it is timed. Workers compile and check at the same
time, then one measures at a time. The results are written after each measurement, and a run
continues what its output has. `page` fills the tables of docs/performance.md and draws its picture
from the newest results:

    python -m benchmarks.limits run --output benchmarks/results/limits_h100_2026-11-28.json
    python -m benchmarks.limits page
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spattention.files import write_atomically

from ..turns import turns
from . import page
from .cases import BY, Case, cases, worker_name
from .processes import measure, prepare


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("page", help="write the page and its picture from the newest results")
    run = commands.add_parser("run", help="measure")
    run.add_argument("--output", type=Path, required=True, help="JSON file, continued if there")
    run.add_argument("--by", nargs="*", default=BY, choices=BY)
    run.add_argument("--longest", type=int, default=131072, help="of the lengths")
    run.add_argument("--prepare-seconds", type=float, default=240.0)
    run.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    run.add_argument("--turns", type=Path, help="file to lock: one process times at a time")
    run.add_argument("--commit", help="to record where git cannot tell")
    options = parser.parse_args(arguments)
    if options.command == "page":
        page.main()
    else:
        with turns(options.turns) as alone:
            measure_all(options, alone)


def measure_all(options: argparse.Namespace, alone: Callable[[], None] = lambda: None) -> None:
    """Prepare all cases that the output does not have, call `alone`, and measure them."""
    rows: list[dict[str, Any]] = []
    environments: list[dict[str, str]] = []
    if options.output.exists():
        record = json.loads(options.output.read_text())
        rows, environments = record["rows"], record["environments"]
        rows = [row for row in rows if "failed" not in row]
    done = {case_of(row) for row in rows}
    run = len(environments)
    wanted = [
        case
        for case in cases()
        if case not in done and case.by in options.by and case.length <= options.longest
    ]
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in wanted:
        groups.setdefault(worker_name(case), []).append(case)
    print(f"{len(wanted)} cases in {len(groups)} workers", flush=True)
    began = time.monotonic()
    ready = prepare(list(groups.values()), options.prepare_seconds, options.processes)
    alone()
    workers = dict(zip(groups, ready))
    try:
        for case in wanted:
            found = measure(workers[worker_name(case)], case)
            facts = found.pop("environment", None)
            if facts is not None and len(environments) == run:
                environments.append(facts | ({"commit": options.commit} if options.commit else {}))
            rows.append({**asdict(case), **found, "run": run})
            passed = time.monotonic() - began
            print(f"[{passed:5.0f} s] {case}: {json.dumps(found)}", flush=True)
            save(options.output, rows, environments)
            if case == groups[worker_name(case)][-1]:
                workers[worker_name(case)].stop()  # others need its memory
    finally:
        for worker in ready:
            worker.stop()


def case_of(row: dict[str, Any]) -> Case:
    """The case of a row of results."""
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def save(output: Path, rows: list[dict[str, Any]], environments: list[dict[str, str]]) -> None:
    """Write the rows, and the environment of each run that measured some of them."""
    arguments = [output.name if each == str(output) else each for each in sys.argv[1:]]
    record = {
        "what": "milliseconds of attention, and the hardware's limit",
        "command": "python -m benchmarks.limits " + shlex.join(arguments),
        "environments": environments,
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
