"""Tables and files of results, with all that is needed to make them again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..files import write_atomically
from ..markdown import table
from ..provenance import source_commit, source_version, spattention_command

Columns = Mapping[str, Callable[[Any], str]]  # heading -> the cell of a row
TEXT = ("B, H, N", "B, N", "mask", "by", "layout")  # columns that are not numbers


def run_header(options: Any) -> dict[str, Any]:
    """Machine, date and command that a file of results starts with. The options of the command are
    a dataclass with `commit` and `output`."""
    found = environment()
    found["commit"] = options.commit or found["commit"]
    return {
        "environment": found,
        "date": datetime.now(UTC).date().isoformat(),
        "command": spattention_command(),
        "options": asdict(replace(options, output=None)),
    }


def show(title: str, columns: Columns, rows: Iterable[Any]) -> None:
    """Print a table."""
    table = Table(title=title)
    for heading in columns:
        table.add_column(heading, justify="left" if heading in TEXT else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    Console(width=150).print(table)


def write_page(
    folder: Path,
    name: str,
    record: dict[str, Any],
    notes: Iterable[str],
    columns: Columns,
    rows: Iterable[Any],
) -> Path:
    """Write `<name>_<gpu>_<date>.json` and `.md`, each at once; returns the path without suffix.
    The record has what `run_header` gave, and the results; notes are the lines before the table."""
    gpu = record["environment"]["gpu"]
    stem = folder / f"{name}_{gpu.split()[-1].lower()}_{record['date']}"
    lines = [
        f"# {name.capitalize()} on {gpu}, {record['date']}",
        "",
        f"`{record['command']}`",
        "",
        *(f"- {name}: {value}" for name, value in record["environment"].items()),
        f"- options: {json.dumps(record['options'])}",
        *notes,
        "",
        *table(list(columns), ([cell(row) for cell in columns.values()] for row in rows)),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(stem.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), "\n".join(lines) + "\n")
    return stem


def environment() -> dict[str, str]:
    """GPU, versions, and the commit of this checkout."""
    found = {"gpu": torch.cuda.get_device_name(), "python": platform.python_version()}
    for package in ("torch", "triton", "spattention"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = str(torch.version.cuda)
    found["commit"] = source_version() or "unknown"
    return found


def processor() -> str:
    """The processor's model name where Linux tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_rows(
    output: Path,
    what: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    *,
    commit: str | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """Write rows of results to a JSON file, atomically, with machine, versions, commit, seed and
    command. `commit` is for where git cannot tell, `environment` says more about the machine."""
    commit = commit or source_commit()
    result = {
        "what": what,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **(environment or {}),
        "commit": commit,
        "seed": 0,
        "command": command_line(),
        "settings": settings,
        "rows": rows,
    }
    write_atomically(output, json.dumps(result, indent=1) + "\n")


def command_line() -> str:
    """The command of this process, `python -m ...` for a module of a package."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec is not None else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])
