"""The committed table of compiled kernels is of these sources; a check finds what is worse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import compile_table
import pytest
from compile_table import Compiled, code_of, differences

from spattention.impl.triton.hopper import planning

TABLE = json.loads(compile_table.TABLE.read_text())
REGISTERS = 65536  # of a multiprocessor of compute capability 9.0
SHARED = 228 * 1024  # bytes, of which every program takes 1 KiB more than it asks for


def test_table_is_of_these_sources() -> None:
    assert TABLE["sources"] == compile_table.digest(), (
        "kernels, launches or forms have changed: run `python -m tests.impl.triton.compile_table "
        "--update` with every version of Triton (CONTRIBUTING.md)"
    )


def test_table_has_every_tested_triton() -> None:
    versions = {version.rpartition(".")[0] for version in TABLE["tables"]}
    assert versions == set(planning.TRITON_VERSIONS)


@pytest.mark.parametrize("version", TABLE["tables"])
def test_hopper_kernels_share_multiprocessors(version: str) -> None:
    """Programs per multiprocessor that the block sizes were chosen for."""
    programs = {
        "D64, two bands: hopper.forward.forward_kernel": 4,
        "D128, two bands: hopper.forward.forward_kernel": 3,
        "D64, two bands: hopper.backward.backward_kernel": 2,
        "D128, two bands: hopper.backward.backward_kernel": 2,
        "D128, two bands, persistent, split: hopper.backward.backward_kernel": 2,
    }
    kernels = TABLE["tables"][version]["kernels"]
    for name, count in programs.items():
        registers, _, _, shared = kernels[f"hopper {name}"]
        by_registers = REGISTERS // (-(-registers // 8) * 8 * 128)
        assert min(by_registers, SHARED // (shared + 1024)) >= count, name


KERNEL = Compiled("form: kernel", 168, 16, 24, 65576, False)
EXPECTED = {"form: kernel": [168, 16, 24, 65576]}


def test_an_equal_or_better_kernel_passes() -> None:
    assert differences([KERNEL], EXPECTED, ["form"]) == []
    assert differences([replace(KERNEL, registers=160, spills=0)], EXPECTED, ["form"]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serialized": True}, "wgmma instructions are serialized"),
        ({"registers": 171}, "171 registers, 168 in the table"),
        ({"spills": 28}, "28 spills, 24 in the table"),
        ({"stack": 24}, "24 stack, 16 in the table"),
        ({"shared": 65580}, "65580 shared, 65576 in the table"),
        ({"name": "form: other"}, "form: other: not in the table"),
    ],
)
def test_a_worse_kernel_is_named(change: dict[str, Any], message: str) -> None:
    assert any(message in line for line in differences([replace(KERNEL, **change)], EXPECTED, []))


PLANTED = """
from dataclasses import replace
from spattention.impl.triton.hopper import planning
from tests.impl.triton.compile_table import check

launches = planning.LAUNCHES[128]
larger = replace(launches.forward, block_n=128)
planning.LAUNCHES[128] = replace(launches, forward=larger)
print(*check(["hopper D128, two bands"], newest=False), sep="\\n")
"""


@pytest.mark.slow
def test_a_planted_change_is_found() -> None:
    """Blocks of 128 keys want more registers than three programs on a multiprocessor have."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", PLANTED]
    done = subprocess.run(
        command, env=environment, cwd=compile_table.ROOT, capture_output=True, text=True, check=True
    )
    kernel = "hopper D128, two bands: hopper.forward.forward_kernel: "
    for what in ("are serialized", " stack, ", " spills, ", " shared, "):
        assert any(line.startswith(kernel) and what in line for line in done.stdout.splitlines()), (
            what
        )


def test_a_kernel_that_was_not_compiled_is_named() -> None:
    assert differences([], EXPECTED, ["form"]) == ["form: kernel: not compiled"]
    assert differences([], EXPECTED, ["another form"]) == []


def test_digest_is_of_the_code_alone() -> None:
    source = '"""What it is."""\n\nX = 1  # why\n\n\ndef f():\n    """Do it."""\n    return "#"\n'
    other = '"""Another."""\nX = 1\ndef f():\n    return "#"  # more\n'
    assert code_of(source) == code_of(other)
    assert code_of(source) != code_of(source.replace("X = 1", "X = 2"))
    assert code_of(source) != code_of(source.replace('"#"', '"##"'))
