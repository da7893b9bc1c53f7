"""Which calls the Hopper kernels cover, and the reason where they do not."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spattention import BandPattern, explain
from spattention.impl import triton as kernels
from spattention.impl.triton import MAX_PORTABLE_TOKENS, hopper, op, reads_pages
from spattention.impl.triton import call as calls
from spattention.impl.triton.arguments import Positions
from spattention.impl.triton.call import Call, PagedKeys
from spattention.impl.triton.hopper import launch, planning

NOWHERE = Positions(None, None, None, None)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU as those of an H100 with a tested Triton."""
    for module in (calls, planning):
        monkeypatch.setattr(module, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(planning.triton, "__version__", "3.9.0")
    planning.warn_untested.cache_clear()


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


def test_a_part_leaves_multiprocessors_to_an_exchange() -> None:
    """Its programs come in turns, between which other kernels get a place."""
    query = torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16)
    bands = BandPattern.exclusive(2, 128).flat
    part = Call(query, query, bands, 0.1, 0, NOWHERE, has_all_keys=False)
    plans = [hopper.plan(call, query) for call in (part, make_call()[0])]
    assert [plan and plan.waves for plan in plans] == [planning.WAVES_OF_A_PART, 1]


@pytest.mark.parametrize(
    ("tokens", "has_all_keys", "persistent"),
    [(32768, True, False), (49152, True, True), (49152, False, False), (65536, False, True)],
)
def test_long_bands_draw_their_blocks(
    tokens: int, has_all_keys: bool, persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,024, 1,536 and 2,048 keys a query. A part's blocks are dealt to its programs, and need
    more keys.
    """
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
    )
    call = long_call(tokens, has_all_keys=has_all_keys)
    plan = planning._plan_of_shape(call)
    assert plan is not None
    assert plan.persistent == persistent
    launched = launch._forward_launch(call, plan, has_sinks=False)
    assert launched.draws == (persistent and has_all_keys)
    assert launched.constants.get("launch_pdl", False) == launched.draws
    if persistent:
        assert launched.programs == 132 * plan.waves


@pytest.mark.parametrize(
    ("batch", "tokens", "options", "covered"),
    [
        (1, 40, {}, True),
        (1, 40, {"query_start": 88}, True),
        (1, 40, {"query_start": 80}, False),
        (1, 40, {"query_start": torch.tensor(88, dtype=torch.int32)}, False),
        (1, 40, {"key_start": torch.tensor([3], dtype=torch.int32)}, False),
        (2, 40, {}, False),
        (2, 128, {}, True),
    ],
)
def test_the_last_queries_of_a_row_are_covered(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    tokens: int,
    options: dict[str, Any],
    covered: bool,
) -> None:
    """A chunk of a prompt runs as a packed document."""
    monkeypatch.setattr(op, "INTERPRETED", True)
    monkeypatch.setattr(op, "compute_capability", lambda device: (9, 0))
    query, key = (torch.zeros(batch, 2, n, 64, dtype=torch.bfloat16) for n in (tokens, 128))
    pattern = replace(BandPattern.exclusive(2, 128), prefix=2)
    found = explain(query, key, key, pattern, impl="triton", **options)
    assert found.kernels.startswith("Hopper") == covered
    assert covered or "position 0" in found.reasons[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 80}, "head_dim 64 or 128, got 80"),
        ({"dtype": torch.float32}, "float16 or bfloat16, got torch.float32"),
        ({"query_start": 1}, "position 0"),
        ({"positions": Positions(torch.zeros(1), None, None, None)}, "position 0"),
        (
            {"query_start": 1, "positions": Positions(None, torch.zeros(1, 128), None, None)},
            "position 0",
        ),
    ],
)
def test_refusal_names_the_reason(changes: dict[str, Any], reason: str) -> None:
    call, query = make_call(**changes)
    assert reason in (hopper.refusal(call) or "")
    assert hopper.plan(call, query) is None


def long_call(tokens: int = 65536, heads: int = 16, head_dim: int = 128, **options: Any) -> Call:
    """A call of long exclusive bands, without memory for its tokens."""
    query = torch.zeros(1).to(torch.bfloat16).expand(1, heads, tokens, head_dim)
    positions = options.pop("positions", NOWHERE)
    bands = BandPattern.exclusive(heads, tokens).flat
    prefix = options.pop("prefix", 0)
    return Call(query, query, bands, 0.1, 0, positions, prefix, **options)


def paged_call(page: int) -> Call:
    """A call of packed documents whose keys are in pages, without memory for its tokens."""
    one = torch.zeros(1).to(torch.bfloat16)
    query, keys = (one.expand(1, 16, rows, 128) for rows in (8192, 131072))
    offsets = torch.zeros(2, dtype=torch.int32)
    positions = Positions(None, None, offsets, None, pages=offsets, seq_lens=offsets)
    bands = BandPattern.exclusive(16, 65536).flat
    return Call(query, keys, bands, 0.1, 0, positions, paged=PagedKeys(page, 65536))


def test_documents_in_pages_run_blocks_of_64() -> None:
    plan = planning._plan_of_shape(paged_call(16))
    assert plan is not None
    assert not plan.persistent


@pytest.mark.parametrize(("page", "covered"), [(16, True), (48, True), (256, True), (8, False)])
def test_pages_hold_whole_boxes(page: int, covered: bool) -> None:
    """TMA copies 16 tokens at once; the engine gathers the keys of other pages."""
    refusal = planning._refusal_of_shape(paged_call(page))
    assert covered == (refusal is None)
    assert covered or f"multiple of 16 tokens, got {page}" in (refusal or "")
    query = torch.zeros(1, 128, dtype=torch.bfloat16)
    assert reads_pages(query, page, 8192) == covered


@pytest.mark.parametrize(
    ("pattern", "new_tokens", "longest", "copied"),
    [
        (BandPattern.dense(8, 65536), 8192, 8192, True),
        (BandPattern.dense(8, 65536), 8192, 65536, True),
        (BandPattern.dense(8, 65536), 2048, 65536, False),  # a copy serves few queries
        (BandPattern.shared_local(8, 65536, local=2048), 8192, 65536, False),
        (BandPattern.sliding_window(8, 65536, 2048), 8192, 65536, False),
        (BandPattern(((),) * 8, 65536), 8192, 65536, False),
    ],
)
def test_copies_serve_many_queries(
    pattern: BandPattern, new_tokens: int, longest: int, copied: bool
) -> None:
    assert kernels.prefers_copies(pattern, new_tokens, longest) == copied


@pytest.mark.parametrize("other", [torch.zeros(1, 128), torch.zeros(1, 80).bfloat16()])
def test_portable_kernels_copy_for_many_queries(other: torch.Tensor) -> None:
    """They read pages of any size in place, where requests have few new tokens."""
    assert reads_pages(other, 1, MAX_PORTABLE_TOKENS)
    assert not reads_pages(other, 16, MAX_PORTABLE_TOKENS + 1)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("has_all_keys", [True, False])
def test_long_bands_take_five_products(
    head_dim: int, deterministic: bool, has_all_keys: bool
) -> None:
    """A part of the keys, whose places are others than the queries', too."""
    call = long_call(head_dim=head_dim, deterministic=deterministic, has_all_keys=has_all_keys)
    plan = planning._plan_of_shape(call)
    assert plan is not None
    assert plan.fused_backward
    assert "five products" in str(plan)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 16384},  # short bands
        {"heads": 1, "tokens": 16384},  # few blocks of keys
        {"head_dim": 64, "tokens": 16384},
        {"prefix": 4},
        {"positions": Positions(None, torch.zeros(1, dtype=torch.int32), None, None)},
        {"tokens": 16384, "deterministic": False},
    ],
    ids=str,
)
def test_other_calls_keep_seven_products(options: dict[str, Any]) -> None:
    plan = planning._plan_of_shape(long_call(**options))
    assert plan is not None
    assert not plan.fused_backward


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
    assert hopper.refusal(call) == "an NVIDIA GPU, got ROCm 6.4"
    assert hopper.plan(call, query) is None
    assert not reads_pages(query, 16, MAX_PORTABLE_TOKENS + 1)


def test_tensors_that_tma_cannot_read_are_refused() -> None:
    call, query = make_call()
    shifted = torch.zeros(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape)
    expanded = query[:, :1].expand(1, 2, 128, 64)
    odd = torch.zeros(1, 2, 128, 65, dtype=query.dtype)[..., :64]
    for tensor in (shifted, expanded, odd):
        assert hopper.plan(call, query, tensor) is None


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.3", "3.9.0+git1234", "3.9.0rc1"])
def test_tested_tritons_run_hopper_kernels(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.triton, "__version__", version)
    call, query = make_call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper.plan(call, query) is not None


@pytest.mark.parametrize("version", ["3.10.0", "3.5.1", "4.0.0", "3.60.0"])
def test_untested_tritons_warn_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.triton, "__version__", version)
    call, query = make_call()
    with pytest.warns(UserWarning, match=rf"Triton {version} .*3\.6, 3\.7, 3\.8, 3\.9.*2 times"):
        assert hopper.plan(call, query) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper.plan(call, query) is None


def test_no_warning_where_another_need_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.triton, "__version__", "3.10.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for changes in ({"head_dim": 80}, {"query_start": 1}, {"dtype": torch.float32}):
            call, query = make_call(**changes)
            assert hopper.plan(call, query) is None
