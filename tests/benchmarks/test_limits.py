"""The grouped-query benchmark: its yardstick, competitors' masks, and what a run continues."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import grouped, grouped_worker
from benchmarks.grouped import Case, Worker, cases
from benchmarks.grouped_worker import Task, check, exact, sampled_rows
from spattention import BandPattern, band_attention
from spattention.benchmarking import competitors
from spattention.benchmarking.attend import Attend
from spattention.benchmarking.flex import Flex
from spattention.testing import Case as Checked
from spattention.testing import exact as exact_everywhere

CPU = torch.device("cpu")
PATTERN = BandPattern.shared_local(4, 96, widths="geometric", local=7)


def task(variant: str) -> Task:
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    batch, tokens = (1, 192) if variant == "packed" else (2, 96)
    query, key, value, d_out = (tensor(batch, heads, tokens, 16) for heads in (4, 2, 2, 4))
    prefix = 3 if variant == "prefix" else 0
    pattern = BandPattern(PATTERN.intervals, 96, prefix=prefix)
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), d_out)
    sinks = tensor(4).requires_grad_() if variant == "sinks" else None
    offsets = torch.tensor([0, 60, 61, 192], dtype=torch.int32) if variant == "packed" else None
    return Task(inputs, pattern, sinks, offsets)


@pytest.mark.parametrize("variant", grouped.VARIANTS)
def test_the_yardstick_is_exact(variant: str) -> None:
    """With all query rows it gives what the tests' oracle gives."""
    given = task(variant)
    query, key, value, d_out = (tensor.detach() for tensor in given.inputs)
    options: dict[str, Any] = {}
    if given.sinks is not None:
        options["sinks"] = given.sinks.detach()
    d_lse = torch.zeros(query.shape[:3])
    if given.offsets is not None:
        query, key, value, d_out = (each[0].transpose(0, 1) for each in (query, key, value, d_out))
        options |= {"cu_seqlens_q": given.offsets, "cu_seqlens_k": given.offsets}
        options |= {"max_seqlen_q": 131, "max_seqlen_k": 131}
        d_lse = d_lse[0]
    truth = exact_everywhere(Checked(query, key, value, given.pattern, options), (d_out, d_lse))
    found = exact(given, torch.arange(given.inputs[0].shape[2]))
    for name, tensor in found.items():
        expected = truth[name]
        if given.offsets is not None and name != "d_sinks":
            expected = expected.transpose(0, 1)[None]
        torch.testing.assert_close(tensor, expected.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("variant", grouped.VARIANTS)
def test_flex_computes_the_same_masks(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    given = task(variant)
    rows = torch.arange(given.inputs[0].shape[2])
    expected = exact(given, rows)["out"]
    inputs = tuple(tensor.detach() for tensor in given.inputs)  # no backward pass on the CPU
    sinks = None if given.sinks is None else given.sinks.detach()
    out = Flex(inputs).on(given.pattern, sinks, given.offsets)()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_mask_is_not_timed() -> None:
    """A band that is one key longer differs by more than is allowed."""
    given = task("plain")
    query, key, value, _ = given.inputs
    longer = tuple(((0, intervals[0][1] + 1), *intervals[1:]) for intervals in PATTERN.intervals)
    other = BandPattern(longer, 96)

    def attend() -> torch.Tensor:
        out = band_attention(query, key, value, other, impl="reference")
        assert isinstance(out, torch.Tensor)
        return out

    with pytest.raises(RuntimeError, match="out is off by"):
        check(Attend(attend, given.inputs), given)


def test_a_worker_checks_and_times_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("band_attention", "band_attention_varlen"):
        operator = functools.partial(getattr(competitors, name))

        def on_cpu(*given: Any, impl: str, _operator: Any = operator, **options: Any) -> Any:
            return _operator(*given, impl="blockwise", **options)

        monkeypatch.setattr(competitors, name, on_cpu)

    def dense(inputs: Any) -> dict[str, Attend]:
        attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, *inputs[:3])
        return {"cuDNN": Attend(lambda: attend(is_causal=True, enable_gqa=True), inputs)}

    def milliseconds(call: Any, rest: float) -> float:
        call()
        return 2.0

    monkeypatch.setattr(grouped_worker, "graph_milliseconds", milliseconds)
    monkeypatch.setattr(grouped_worker, "kernels", lambda task: "kernels of a test")
    monkeypatch.setattr(grouped_worker, "dense", dense)
    chosen = [
        Case("spattention", variant, bands, 2, 128, 16)
        for variant in grouped.VARIANTS
        for bands in grouped.BANDS
    ]
    for members in (chosen, [Case("dense, cuDNN", "plain", "-", 2, 128, 16)]):
        bench = grouped_worker.Bench(members, CPU)
        assert bench.prepare() == {}
        found = [bench.time(index) for index in range(len(members))]
        assert all(row["total"] == 2.0 and max(row["errors"].values()) < 0.02 for row in found)
    failed = grouped_worker.Bench([Case("FlashAttention-4", "plain", "-", 2, 128, 16)], CPU)
    assert failed.prepare() == {0: "ModuleNotFoundError: No module named 'flash_attn'"}


def test_rows_to_check_have_all_edges() -> None:
    rows = sampled_rows(task("packed")).tolist()
    assert {0, 59, 60, 61, 191} <= set(rows)


def test_packed_documents_fill_the_row() -> None:
    for tokens in (16384, 65536):
        offsets = grouped_worker.offsets_of(tokens, CPU)
        assert offsets[-1] == tokens
        assert (offsets.diff() > 0).all()


def test_cases_leave_out_what_cannot_be_asked() -> None:
    every = cases()
    assert len(set(every)) == len(every)
    ours = [case for case in every if case.by == "spattention"]
    assert len(ours) == 3 * 4 * 2
    sparse = {case.bands for case in every if case.by == "flash-sparse-attn"}
    assert sparse == {"key/value head"}
    variants = [case.variant for case in every if case.length <= grouped.LONG]
    assert variants == sorted(variants, key=grouped.VARIANTS.index)
    assert [case.length for case in every[len(variants) :]] == [65536] * 27


class FakeWorker:
    """A worker that fails at one implementation and counts what it measured."""

    measured: ClassVar[list[Case]] = []

    def __init__(self, members: list[Case]) -> None:
        self.cases = members
        failed = [case for case in members if case.by == "FlashAttention-4"]
        self.failed = dict.fromkeys(failed, "ImportError: no such package")

    def send(self, index: int) -> None:
        self.case = self.cases[index]
        FakeWorker.measured.append(self.case)

    def receive(self) -> dict[str, Any]:
        return {"forward": 1.0, "total": 3.0, "environment": {"gpu": "X1"}}

    def stop(self) -> None:
        pass


def test_a_run_continues_what_its_output_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "grouped.json"
    monkeypatch.setattr(grouped, "Worker", FakeWorker)
    monkeypatch.setattr(grouped, "prepare", lambda workers, seconds: None)
    command = ["grouped", "--output", str(output), "--head-dims", "128", "--variants", "plain"]
    monkeypatch.setattr(sys, "argv", command)
    grouped.main()
    first = len(FakeWorker.measured)
    written = json.loads(output.read_text())
    assert "--output grouped.json --head-dims 128" in written["command"]
    assert written["environment"] == {"gpu": "X1"}
    rows = written["rows"]
    assert [row["by"] for row in rows if "failed" in row] == ["FlashAttention-4"] * 2
    assert first == len(rows) - 2
    printed = capsys.readouterr().out
    cells = "| 1.00 / 3.00 " * 4 + "| - | - |"
    assert f"| 4 x 32/8 x 4,096, 128 | plain | query head {cells}" in printed
    grouped.main()
    assert len(FakeWorker.measured) == first  # only what failed is tried again
    FakeWorker.measured.clear()


def test_a_worker_that_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the worker fails, and its cases carry the reason."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    worker = Worker(cases()[:2])
    grouped.prepare([worker], 20.0)
    assert not worker.ready
    assert grouped.measure(worker, cases()[0]) == {"failed": "its worker ended"}
    worker.stop()
