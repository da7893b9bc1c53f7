"""The committed table of kernels for GPUs that no test here has: of these sources, and within what
each GPU has.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

import spattention as spa
from spattention.impl.triton import call as calls
from spattention.impl.triton import op
from spattention.impl.triton.config import launches
from spattention.impl.triton.decode.config import FEW_HALF, decode_launch
from tests.impl.triton import chip_table
from tests.impl.triton.chip_table import CHIPS, FORMS, NUMBERS, differences, forms_of
from tests.impl.triton.compile_table import Compiled, digest

TABLE = json.loads(chip_table.TABLE.read_text())
PASSES = ("portable.forward", "portable.query_gradient", "portable.key_gradient")


def test_table_is_of_these_sources() -> None:
    assert TABLE["sources"] == digest(chip_table.PORTABLE_SOURCES), (
        "kernels, launches or forms have changed: run `python -m tests.impl.triton.chip_table "
        "--update` (CONTRIBUTING.md)"
    )


@pytest.mark.parametrize("chip", CHIPS)
def test_every_form_fits_the_shared_memory(chip: str) -> None:
    kernels = TABLE["chips"][chip]
    for form in forms_of(chip, FORMS):
        assert any(name.startswith(f"{form}: ") for name in kernels), form
    shared = NUMBERS.index("shared")
    assert max(row[shared] for row in kernels.values()) <= CHIPS[chip].shared


@pytest.mark.parametrize("chip", CHIPS)
def test_docs_name_the_largest_kernel(chip: str) -> None:
    page = (Path(__file__).parents[3] / "docs" / "backends.md").read_text()
    (row,) = (line for line in page.splitlines() if f"({chip})" in line)
    largest = max(numbers[NUMBERS.index("shared")] for numbers in TABLE["chips"][chip].values())
    assert f"| {-(-largest // 1024)} of {CHIPS[chip].shared // 1024} KiB |" in row
    assert "compiled, not run" in row


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_half_precision_uses_tensor_cores(chip: str, head_dim: int) -> None:
    """B200 has its own instruction for products of at least 64 rows."""
    kernels = TABLE["chips"][chip]
    for each in PASSES:
        (products,) = (
            row[NUMBERS.index("products")]
            for name, row in kernels.items()
            if name.startswith(f"portable D{head_dim}: {each}.")
        )
        assert products > 0, each


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("chip", [name for name in CHIPS if name != "gfx942"])
def test_float32_keeps_its_gradients_in_registers(chip: str, head_dim: int) -> None:
    """With four warps dQ kept 1.5 to 5 KB per thread in memory; with eight about .3."""
    name = f"portable D{head_dim}, float32: portable.query_gradient.query_gradient_kernel"
    assert TABLE["chips"][chip][name][NUMBERS.index("stack")] <= 512


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rocm_runs_half_precision_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    inputs = [torch.zeros(1, 2, 8, 16, dtype=dtype) for _ in range(3)]
    pattern = spa.BandPattern.dense(2, 8)
    reason = op.refusal(inputs[0], inputs[2])
    if dtype == torch.float16:
        assert reason is None
        return
    assert reason == "computes float16 and bfloat16 on ROCm, got torch.float32"
    with pytest.raises(ValueError, match="float16 and bfloat16 on ROCm"):
        spa.band_attention(*inputs, pattern, impl="triton")


def test_rocm_gpus_are_not_taken_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's number for MI300, (9, 4), would choose blocks that exceed its shared memory."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    calls.compute_capability.cache_clear()
    try:
        capability = calls.compute_capability(torch.device("cuda", 7))
    finally:
        calls.compute_capability.cache_clear()
    assert capability == (0, 0)
    assert decode_launch(2, 128, 64, capability) == replace(FEW_HALF[128], block_m=64)
    assert launches(2, 128, capability) != launches(2, 128, (9, 0))


KERNEL = Compiled("form: kernel", 168, 0, 0, 65536, products=32)
EXPECTED = {"form: kernel": [168, 0, 0, 65536, 32]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": 65540}, "65540 bytes of shared memory, 65536 on MI300"),
        ({"products": 0}, r"no `v_mfma`, 32 in the table"),
        ({"registers": 170}, "170 registers, 168 in the table"),
    ],
)
def test_a_worse_kernel_is_named(change: dict[str, Any], message: str) -> None:
    chip = CHIPS["gfx942"]
    assert differences(chip, [KERNEL], EXPECTED, ["form"]) == []
    worse = differences(chip, [replace(KERNEL, **change)], EXPECTED, ["form"])
    assert any(message in line for line in worse)


def test_another_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    (line,) = chip_table.check(())
    assert line == f"Triton 9.9.9 is not that of the table, {TABLE['triton']}"
