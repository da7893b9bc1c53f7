"""Which calls the Hopper kernels cover, and the reason where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spattention import BandPattern
from spattention.impl.triton import call as calls
from spattention.impl.triton import hopper
from spattention.impl.triton.arguments import Positions
from spattention.impl.triton.call import Call
from spattention.impl.triton.hopper import planning

NOWHERE = Positions(None, None, None, None)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU as those of an H100 with a tested Triton."""
    monkeypatch.setattr(calls, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(planning, "triton_is_tested", lambda: True)


def make_call(
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    query_start: int = 0,
    positions: Positions = NOWHERE,
) -> tuple[Call, torch.Tensor]:
    query = torch.zeros(1, 2, 128, head_dim, dtype=dtype)
    bands = BandPattern.exclusive(2, 128).flat
    return Call(query, query, bands, 0.1, query_start, positions), query


def test_plan_covers_training() -> None:
    call, query = make_call()
    assert hopper.refusal(call) is None
    plan = hopper.plan(call, query)
    assert plan is not None
    assert plan.launches is planning.LAUNCHES[64]
    assert not plan.persistent


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 80}, "head_dim 64 and 128, got 80"),
        ({"dtype": torch.float32}, "float16 and bfloat16, got torch.float32"),
        ({"query_start": 1}, "position 0"),
        ({"positions": Positions(None, torch.zeros(1), None, None)}, "position 0"),
    ],
)
def test_refusal_names_the_reason(changes: dict[str, Any], reason: str) -> None:
    call, query = make_call(**changes)
    assert reason in (hopper.refusal(call) or "")
    assert hopper.plan(call, query) is None


def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 0), (10, 0), (12, 0), None):
        monkeypatch.setattr(calls, "compute_capability", lambda device, found=capability: found)
        call, query = make_call()
        assert "compute capability 9.0" in (hopper.refusal(call) or "")
        assert hopper.plan(call, query) is None


@pytest.mark.parametrize("capability", [(9, 0), (9, 4)])
def test_amd_gpus_are_refused(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm reports a device of type "cuda" and capability 9 for MI200 and MI300."""
    monkeypatch.setattr(calls, "compute_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    call, query = make_call()
    assert "AMD" in (hopper.refusal(call) or "")
    assert hopper.plan(call, query) is None


def test_tensors_that_tma_cannot_read_are_refused() -> None:
    call, query = make_call()
    shifted = torch.zeros(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape)
    expanded = query[:, :1].expand(1, 2, 128, 64)
    odd = torch.zeros(1, 2, 128, 65, dtype=query.dtype)[..., :64]
    for tensor in (shifted, expanded, odd):
        assert hopper.plan(call, query, tensor) is None
