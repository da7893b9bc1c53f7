"""`explain` tells the kernels that a call then runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from small_cases import int32

import spattention as spa
from spattention.binding import bind
from spattention.impl.triton import call as calls
from spattention.impl.triton import describe, op
from spattention.impl.triton.hopper import planning

pytestmark = pytest.mark.skipif(not op.INTERPRETED, reason="tensors of the CPU are taken")
PATTERN = spa.BandPattern.exclusive(2, 256)
NOTHING = dict.fromkeys(("scale", "sinks", "query_start", "key_start"))
VERSION = f"(Triton {triton.__version__})"


def explain(
    queries: int = 256, head_dim: int = 64, keys: int = 256, **options: Any
) -> spa.Explanation:
    query, key, value = (
        torch.zeros(1, 2, tokens, head_dim, dtype=torch.bfloat16)
        for tokens in (queries, keys, keys)
    )
    return spa.explain(query, key, value, PATTERN, impl="triton", **options)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(planning, "triton_is_tested", lambda: True)


def test_portable_kernels_and_the_need_of_faster_ones() -> None:
    found = explain()
    assert (found.implementation, found.kernels) == ("triton", f"portable kernels {VERSION}")
    assert found.reasons == (
        "The Hopper kernels need a GPU of compute capability 9.0 (Hopper), got None.",
    )


@pytest.mark.usefixtures("on_hopper")
def test_hopper_kernels_and_their_plan() -> None:
    found = explain()
    assert found.kernels.startswith(f"Hopper kernels {VERSION}: forward; dQ, dK and dV in one")
    assert found.reasons == ()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("deterministic", "order"), [(True, "turn"), (False, "any order")])
def test_sums_of_long_bands_name_their_order(deterministic: bool, order: str) -> None:
    """Both take five products per tile, by kernels that are not the same."""
    query = torch.zeros(1, 16, 16384, 64, dtype=torch.bfloat16)
    call = bind(query, query, query, spa.BandPattern.dense(16, 16384), **NOTHING)
    name, _ = describe(call._replace(deterministic=deterministic))
    assert name.endswith(f"; sums of dQ in {order}")


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("prefix", "both"), [(4, False), (16, False), (17, True)])
def test_long_prefixes_name_both_suites(prefix: int, both: bool) -> None:
    query = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    pattern = spa.BandPattern.exclusive(2, 256, prefix=prefix)
    found = spa.explain(query, query, query, pattern, impl="triton")
    assert found.kernels.startswith(f"Hopper kernels {VERSION}: forward; dQ, dK and dV in one")
    assert found.kernels.endswith("; dK and dV of the prefix by the portable kernels") is both


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("options", "need"),
    [
        ({"head_dim": 96}, "head_dim 64 or 128, got 96"),
        ({"queries": 200}, planning.NEEDS["positions"]),
        ({"key_start": int32([[3] * 256])}, planning.NEEDS["positions"]),
    ],
)
def test_need_that_is_not_met(options: dict[str, Any], need: str) -> None:
    found = explain(**options)
    assert found.kernels == f"portable kernels {VERSION}"
    assert found.reasons == (f"The Hopper kernels need {need}.",)


@pytest.mark.usefixtures("on_hopper")
def test_left_padding_on_the_hopper_kernels() -> None:
    assert explain(key_start=int32([3])).kernels.startswith(f"Hopper kernels {VERSION}")


@pytest.mark.usefixtures("on_hopper")
def test_first_keys_of_queries_name_both_suites() -> None:
    """The host does not know whether they describe documents."""
    found = explain(1 << 14, keys=1 << 14, key_start=int32([[3] * (1 << 14)]))
    assert found.kernels.startswith(f"Hopper kernels {VERSION}")
    assert found.kernels.endswith("; portable kernels for rows that are no documents")


def test_decoding_kernels_without_gradients() -> None:
    assert explain(queries=1).kernels == f"decoding kernels {VERSION}"
    query = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    key = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    assert "portable" in spa.explain(query, key, key, PATTERN, impl="triton").kernels
    with torch.no_grad():
        assert "decoding" in spa.explain(query, key, key, PATTERN, impl="triton").kernels


@pytest.mark.usefixtures("on_hopper")
def test_packed_documents_and_autocast() -> None:
    packed = torch.zeros(256, 2, 64, dtype=torch.bfloat16)
    offsets = int32(0, 100, 256)
    documents = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    longest = {"max_seqlen_q": 156, "max_seqlen_k": 156}
    found = spa.explain(packed, packed, packed, PATTERN, **documents, **longest, impl="triton")
    assert found.kernels.startswith(f"Hopper kernels {VERSION}")
    assert found.reasons == ()
    single = torch.zeros(1, 2, 256, 64)
    assert "torch.float32" in spa.explain(single, single, single, PATTERN, impl="triton").reasons[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = spa.explain(single, single, single, PATTERN, impl="triton")
    assert "Hopper" in found.kernels


def test_refused_calls_raise() -> None:
    query = torch.zeros(1, 2, 256, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        spa.explain(query, query, query, PATTERN, impl="triton")


@pytest.mark.parametrize("need", planning.NEEDS.values())
def test_the_docs_list_every_need(need: str) -> None:
    page = Path(__file__).parents[3] / "docs" / "backends.md"
    assert need in " ".join(page.read_text().split())
