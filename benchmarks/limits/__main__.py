"""Time attention in the shapes of models with grouped queries, beside its competitors.

Shapes `(B, H/Hkv, N, D)` are those of Llama-3.2-1B (D 64) and Qwen3-4B (D 128). Every shape is
measured plain, with learned sinks, with documents packed into one row and with a prefix of 4
tokens, with one band per query head and with one per key/value head. Competitors are PyTorch's
dense attention (documents with its FlashAttention-2 alone), compiled FlexAttention,
flash-sparse-attn and FlashAttention-4, on the same masks.

Output and gradients of every call are compared with float64 on a sample of query rows before it is
timed. Workers compile in parallel, then one measures at a time. The results are written after each
measurement, and a run continues what its output has:

    python -m benchmarks.grouped --output results.json
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spattention.files import write_atomically

HEADS, KEY_HEADS = 32, 8
SHAPES = ((1, 16384, 64), (4, 4096, 128), (1, 65536, 64))  # batch, tokens, head_dim
LONG = 16384  # longer sequences run other kernels, and are measured last
VARIANTS = ("plain", "sinks", "packed", "prefix")
BANDS = ("query head", "key/value head")
DENSE = ("dense, cuDNN", "dense, FlashAttention-2")
BY = ("spattention", *DENSE, "FlexAttention", "flash-sparse-attn", "FlashAttention-4")


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        by: implementation, one of `BY`.
        variant: one of `VARIANTS`.
        bands: heads that have a band each, one of `BANDS`; "-" for dense attention.
        batch: B.
        length: N; documents are packed into one row of `batch * length` tokens.
        head_dim: D.
    """

    by: str
    variant: str
    bands: str
    batch: int
    length: int
    head_dim: int

    def __str__(self) -> str:
        shape = f"{self.batch} x {HEADS}/{KEY_HEADS} x {self.length}, D {self.head_dim}"
        return f"{shape}, {self.variant}, band per {self.bands}, {self.by}"


def cases() -> list[Case]:
    """All measurements, those that say most first."""
    found = []
    for batch, length, head_dim in SHAPES:
        for variant in VARIANTS:
            for bands in BANDS:
                for by in BY:
                    case = Case(by, variant, bands, batch, length, head_dim)
                    if by in DENSE:  # has no bands, sinks or prefix; cuDNN's no documents here
                        variants = ("plain", "packed")[: 1 + (by == DENSE[1])]
                        if bands != BANDS[0] or variant not in variants:
                            continue
                        case = replace(case, bands="-")
                    elif by == "FlashAttention-4" and variant not in ("plain", "sinks"):
                        continue
                    elif by == "flash-sparse-attn" and bands != "key/value head":
                        continue  # its windows belong to key/value heads
                    found.append(case)
    return sorted(found, key=lambda case: (case.length > LONG, VARIANTS.index(case.variant)))


def worker_name(case: Case) -> tuple[Any, ...]:
    """Cases of the same name share a worker, and so what it compiled."""
    if case.by in DENSE:
        return ("dense", case.head_dim, case.length > LONG)
    if case.by == "spattention":
        return (case.by, case.variant, case.head_dim, case.length > LONG)
    if case.by == "FlexAttention":  # compiled for one shape
        return (case.by, case.variant, case.batch, case.length, case.head_dim)
    return (case.by, case.head_dim, "plain" if case.variant == "prefix" else case.variant)


class Worker:
    """A process that prepares cases, then measures each when it is told to."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self.ready = False
        self.failed: dict[Case, str] = {}
        # Every worker compiles in its own process: many at a time would compete for the cores.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.grouped_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.send([asdict(case) for case in cases])

    def send(self, message: Any) -> None:
        """Write a line to the process; a process that has ended is found by `receive`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None if the process has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # packages print to the same stream
                message: dict[str, Any] = json.loads(line)
                return message
        return None

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def prepare(workers: Iterable[Worker], seconds: float) -> None:
    """Wait until every worker is ready. Those that are not after `seconds` are stopped."""
    began = time.monotonic()
    selector = selectors.DefaultSelector()
    for worker in workers:
        assert worker.process.stdout is not None
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
    while selector.get_map():
        left = seconds - (time.monotonic() - began)
        ready = selector.select(max(left, 0.0))
        for key, _ in ready:
            worker = key.data
            message = worker.receive()
            selector.unregister(key.fileobj)
            passed = time.monotonic() - began
            if message is None:
                worker.failed = dict.fromkeys(worker.cases, "its worker ended")
            else:
                worker.ready = True
                worker.failed = {worker.cases[int(i)]: why for i, why in message["failed"].items()}
            first = worker.cases[0]
            print(f"[{passed:5.0f} s] ready: {first.by}, {first.variant} ...", flush=True)
            for case, why in worker.failed.items():
                print(f"  not measured: {case}: {why}", flush=True)
        if not ready and left <= 0:
            for key in list(selector.get_map().values()):
                worker = key.data
                worker.stop()
                reason = f"was not compiled after {seconds:.0f} s"
                worker.failed = dict.fromkeys(worker.cases, reason)
                print(f"  stopped: {worker.cases[0]} ... {reason}", flush=True)
            return


def measure(worker: Worker, case: Case) -> dict[str, Any]:
    """The numbers of a case, or `{"failed": reason}`."""
    if case in worker.failed:
        return {"failed": worker.failed[case]}
    worker.send(worker.cases.index(case))
    found = worker.receive()
    if found is None:
        worker.failed = dict.fromkeys(worker.cases, "its worker ended")
        return {"failed": "its worker ended"}
    return found


def key_of(row: dict[str, Any]) -> Case:
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every case: milliseconds forward / in total of each implementation."""
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        place = (row["batch"], row["length"], row["head_dim"], row["variant"])
        cell = f"{row['forward']:.2f} / {row['total']:.2f}" if "total" in row else "-"
        for bands in BANDS if row["by"] in DENSE else [row["bands"]]:
            found.setdefault((*place, bands), {})[row["by"]] = cell
    lines = [
        "| B x H/Hkv x N, D | | band per | " + " | ".join(BY) + " |",
        "|" + " --- |" * (3 + len(BY)),
    ]
    for (batch, length, head_dim, variant, bands), cells in found.items():
        shape = f"{batch} x {HEADS}/{KEY_HEADS} x {length:,}, {head_dim}"
        row_cells = " | ".join(cells.get(by, "-") for by in BY)
        lines.append(f"| {shape} | {variant} | {bands} | {row_cells} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file, continued if there")
    parser.add_argument("--by", nargs="*", default=BY, choices=BY)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--head-dims", nargs="*", type=int, default=(64, 128))
    parser.add_argument("--longest", type=int, default=65536, help="of the lengths")
    parser.add_argument("--prepare-seconds", type=float, default=240.0)
    parser.add_argument("--commit", help="to record where git cannot tell")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.output.exists():
        rows = [row for row in json.loads(options.output.read_text())["rows"] if "total" in row]
    done = {key_of(row) for row in rows}
    wanted = [
        case
        for case in cases()
        if case not in done
        and case.by in options.by
        and case.variant in options.variants
        and case.head_dim in options.head_dims
        and case.length <= options.longest
    ]
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in wanted:
        groups.setdefault(worker_name(case), []).append(case)
    workers = {name: Worker(members) for name, members in groups.items()}
    print(f"{len(wanted)} cases in {len(workers)} workers", flush=True)
    began = time.monotonic()
    try:
        prepare(workers.values(), options.prepare_seconds)
        for case in wanted:
            found = measure(workers[worker_name(case)], case)
            rows.append({**asdict(case), **found})
            passed = time.monotonic() - began
            numbers = {name: value for name, value in found.items() if name != "environment"}
            print(f"[{passed:5.0f} s] {case}: {json.dumps(numbers)}", flush=True)
            save(options.output, rows, options.commit)
    finally:
        for worker in workers.values():
            worker.stop()
    print("\n".join(table(rows)))


def save(output: Path, rows: list[dict[str, Any]], commit: str | None) -> None:
    """Write the rows; the machine's facts, which every measurement has, only once."""
    arguments = [output.name if each == str(output) else each for each in sys.argv[1:]]
    environments = [row["environment"] for row in rows if "environment" in row]
    record = {
        "what": "milliseconds of attention with grouped queries, medians of graph replays",
        "command": "python -m benchmarks.grouped " + shlex.join(arguments),
        "environment": {**(environments[-1] if environments else {})},
        "rows": [{name: v for name, v in row.items() if name != "environment"} for row in rows],
    }
    if commit is not None:
        record["environment"]["commit"] = commit
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
