"""The benchmark of limits: its yardstick, its competitors' masks, its processes and its page."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.limits import __main__ as limits
from benchmarks.limits import chart, page, processes, results, worker
from benchmarks.limits.cases import (
    ANY_ORDER,
    BANDS,
    DECODE,
    DENSE,
    FLASH_4,
    FLASH_SPARSE,
    FLEX,
    LONG_EAGER,
    LONG_GROUPED,
    MASKS,
    MULTI_HEAD,
    OURS,
    VARIANTS,
    Case,
    cases,
    worker_name,
)
from benchmarks.limits.check import Task, check, exact_by_head, sampled_rows
from benchmarks.limits.decoding import Decoding, in_pages
from benchmarks.limits.processes import Worker
from benchmarks.limits.results import Results, newest
from spattention import BandPattern, band_attention
from spattention.benchmarking import competitors, flex
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
    if variant == "empty rows":
        pattern = BandPattern.exclusive(4, 96)
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), d_out)
    sinks = tensor(4).requires_grad_() if variant == "sinks" else None
    offsets = torch.tensor([0, 60, 61, 192], dtype=torch.int32) if variant == "packed" else None
    return Task(inputs, pattern, sinks, offsets)


def exact(given: Task, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """All heads of `exact_by_head`, joined."""
    query, key = given.inputs[:2]
    group = query.shape[1] // key.shape[1]
    found = list(exact_by_head(given, rows))
    assert [(entry, head, heads) for entry, head, heads, _ in found] == [
        (entry, head, slice(head * group, head * group + group))
        for head in range(key.shape[1])
        for entry in range(query.shape[0])
    ]
    whole = {}
    for name in ("out", "d_query", "d_key", "d_value"):
        parts = [
            [each[3][name] for each in found if each[0] == entry] for entry in range(len(query))
        ]
        joined = torch.cat if name in ("out", "d_query") else torch.stack
        whole[name] = torch.stack([joined(part) for part in parts])
    if given.sinks is not None:
        whole["d_sinks"] = torch.cat(
            [
                sum(each[3]["d_sinks"] for each in found if each[1] == head)  # type: ignore[misc]
                for head in range(key.shape[1])
            ]
        )
    return whole


@pytest.mark.parametrize("variant", [*VARIANTS, "empty rows"])
def test_the_yardstick_is_exact(variant: str) -> None:
    """With all query rows it gives what the tests' oracle gives, zeros where a row sees no key."""
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
@pytest.mark.parametrize("variant", VARIANTS)
def test_flex_computes_the_same_masks(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    given = task(variant)
    rows = torch.arange(given.inputs[0].shape[2])
    expected = exact(given, rows)["out"]
    inputs = tuple(tensor.detach() for tensor in given.inputs)  # no backward pass on the CPU
    sinks = None if given.sinks is None else given.sinks.detach()
    competitor = Flex(tuple(torch.zeros_like(tensor) for tensor in inputs))
    competitor.take(inputs)
    out = competitor.on(given.pattern, sinks, given.offsets)()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_without_keys_are_not_compared() -> None:
    """An implementation may give NaN there, and still has the right gradients elsewhere."""
    given = task("empty rows")
    query, key, value, _ = given.inputs
    seen = given.pattern.mask(96).any(-1)

    def attend() -> torch.Tensor:
        out = band_attention(query, key, value, given.pattern, impl="reference")
        assert isinstance(out, torch.Tensor)
        return torch.where(seen[..., None], out, torch.nan)

    assert set(check(Attend(attend, given.inputs), given)) == {"out", "d_query", "d_key", "d_value"}


@pytest.mark.parametrize("queries", [640, 200, 1])
@pytest.mark.parametrize(
    "pattern",
    [
        PATTERN,
        BandPattern.exclusive(4, 640),
        BandPattern.dense(4, 640),
        BandPattern.shared_local(4, 640, prefix=4),
    ],
)
def test_blocks_are_those_of_the_mask(pattern: BandPattern, queries: int) -> None:
    """Partial and whole blocks, as FlexAttention finds them in the mask."""
    seen = flex.mask_function(pattern, 640, CPU)
    shifted = flex._of_last(seen, 640 - queries)
    expected = create_block_mask(shifted, None, 4, queries, 640, "cpu")
    found = flex.block_mask(pattern, 640, CPU, queries=queries)
    assert found.seq_lengths == expected.seq_lengths
    if pattern.prefix:  # a block that bands and prefix make whole counts as seen in part
        assert torch.equal(found.to_dense(), expected.to_dense())
        return
    for numbers, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        assert torch.equal(getattr(found, numbers), getattr(expected, numbers))
        same = getattr(found, indices) == getattr(expected, indices)
        used = torch.arange(same.shape[-1]) < getattr(expected, numbers)[..., None]
        assert bool(same[used].all())


def test_paged_keys_are_checked_in_their_order() -> None:
    """The blocks of 16 tokens that the paged calls of `layouts` read, request by request."""
    cache = torch.arange(2 * 16 * 32 * 2).view(2, 16, 32, 2, 1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).view(16, -1)
    text = in_pages(cache, [3, 15])
    assert text.shape == (2, 2, 32, 2, 1)
    blocks = cache.reshape(2, 32, 16, 2, 1)
    assert torch.equal(text[:, 1, 16:], blocks[:, order[15, 1]])
    assert torch.equal(text[:, 0, :16], blocks[:, order[3, 0]])


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

    monkeypatch.setattr(worker, "graph_milliseconds", milliseconds)
    monkeypatch.setattr(worker, "matrix_speed", lambda each, rest: 500.0)
    monkeypatch.setattr(worker, "copy_speed", lambda: 2.5)
    monkeypatch.setattr(worker, "dense", dense)
    monkeypatch.setattr(
        worker,
        "kernels",
        lambda task, order=True: (
            f"kernels of {'any' if task.inputs[0].shape[1] > 4 else 'no'}"
            if order
            else "kernels of any"
        ),
    )
    small = {"batch": 2, "heads": 4, "key_heads": 2, "length": 128, "head_dim": 16}
    chosen = [
        Case(OURS, mask, variant, **small)
        for variant in VARIANTS
        for mask in (*BANDS.values(), "exclusive")
    ]
    chosen += [Case(ANY_ORDER, "geometric", "plain", **small)]
    chosen += [Case(ANY_ORDER, "geometric", "plain", **small | {"heads": 8})]
    for members in (chosen, [Case(DENSE[0], "dense", "plain", **small)]):
        bench = worker.Bench(members, CPU)
        assert bench.prepare()["failed"] == {}
        rows = [bench.time(index) for index in range(len(members))]
        if members is chosen:
            assert rows.pop() == {"kernels": "kernels of any", "as": OURS}
            assert rows.pop().keys() == {"forward", "total", "kernels", "errors"}
            work = rows[0]["work"]
            query = 2 * 4 * 128 * 16 * 2  # bytes
            assert [each["moved"] for each in work] == [3 * query, 9 * query]
            pairs = 2 * sum(worker.pattern_of(members[0]).pairs(128))
            assert [each["flops"] for each in work] == [4 * 16 * pairs, 14 * 16 * pairs]
            assert (rows[0]["matrix"], rows[0]["copy"]) == ([500.0] * 2, 2.5)
        assert all(row["total"] == 2.0 and max(row["errors"].values()) < 0.02 for row in rows)
    failed = worker.Bench([Case(FLASH_4, "geometric", "plain", **small)], CPU)
    missing = "ModuleNotFoundError: No module named 'flash_attn'"
    assert failed.prepare()["failed"] == {0: missing}


def test_a_worker_waits_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes hold the GPU's memory while they prepare; other errors are final."""
    monkeypatch.setattr(worker, "PAUSE", 0.0)
    case = Case(OURS, "geometric", "plain", 1, 4, 2, 128, 16)
    bench = worker.Bench([case, case, case], CPU)
    errors: list[Exception | None] = [torch.OutOfMemoryError("full"), None, ValueError("no")]
    errors += [torch.OutOfMemoryError("full")] * worker.TRIES

    def prepare(case: Case) -> dict[str, Any]:
        error = errors.pop(0)
        if error is not None:
            raise error
        return {"errors": {}}

    monkeypatch.setattr(bench.part, "prepare", prepare)
    assert bench.prepare()["failed"] == {1: "ValueError: no", 2: "OutOfMemoryError: full"}
    assert not errors


def test_rows_to_check_have_all_edges() -> None:
    rows = sampled_rows(task("packed")).tolist()
    assert {0, 59, 60, 61, 191} <= set(rows)


def test_packed_documents_fill_the_row() -> None:
    for tokens in (16384, 65536):
        offsets = worker.offsets_of(tokens, CPU)
        assert offsets[-1] == tokens
        assert (offsets.diff() > 0).all()


def test_cases_leave_out_what_cannot_be_asked() -> None:
    every = cases()
    assert len(set(every)) == len(every)
    ours = [case for case in every if case.by == OURS]
    assert len(ours) == len(MASKS) * 6 + 3 * len(VARIANTS) * 2 + 4
    grouped = [case for case in every if case.heads == 32 and case.variant != DECODE]
    sparse = {case.mask for case in grouped if case.by == FLASH_SPARSE}
    assert sparse == {BANDS["key/value head"]}
    anyhow = Counter(case.variant for case in grouped if case.by == ANY_ORDER)
    assert anyhow == dict.fromkeys(("plain", "sinks"), 3 * len(BANDS))
    lengths = [case.length for case in every]
    assert lengths[0] == MULTI_HEAD[0][2]
    assert lengths.index(LONG_EAGER[2]) < len(every) - lengths[::-1].index(LONG_GROUPED[1])
    names = {worker_name(case) for case in every if case.by == FLEX}
    assert len(names) == len({case.place for case in every if case.variant != DECODE}) + 1


class FakeWorker:
    """A worker that fails at one implementation and counts what it measured."""

    measured: ClassVar[list[Case]] = []

    def __init__(self, members: list[Case]) -> None:
        self.cases = members
        failed = [case for case in members if case.by == FLASH_4]
        self.failed = dict.fromkeys(failed, "ImportError: no such package")
        self.seconds = dict.fromkeys(members, 1.5)

    def send(self, index: int) -> None:
        self.case = self.cases[index]
        FakeWorker.measured.append(self.case)

    def receive(self, seconds: float) -> dict[str, Any]:
        found: dict[str, Any] = {"forward": 1.0, "environment": FACTS}
        if self.case.variant != DECODE:
            found["total"] = 3.0 if self.case.by == OURS else 6.0
            if self.case.by == FLASH_SPARSE and self.case.mask == "exclusive":
                found["total"] = 2.0
        if self.case.by == OURS:
            work = [
                {"flops": 2 * 10**11, "moved": 10**9},
                {"flops": 7 * 10**11, "moved": 3 * 10**9},
            ]
            found |= {"work": work, "matrix": [500.0, 500.0], "copy": 2.5}
        return found

    def stop(self) -> None:
        pass


FACTS = {"gpu": "NVIDIA X1", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-28"}


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of a run with fake workers."""
    output = tmp_path / "limits_x1_2026-11-28.json"
    monkeypatch.setattr(
        limits, "prepare", lambda groups, *limits: [FakeWorker(group) for group in groups]
    )
    FakeWorker.measured.clear()
    monkeypatch.setattr(sys, "argv", ["limits", "run", "--output", str(output), "--commit", "abc"])
    limits.main()
    return output


def test_a_run_continues_what_its_output_has(finished: Path) -> None:
    first = len(FakeWorker.measured)
    written = json.loads(finished.read_text())
    assert written["command"].endswith("run --output limits_x1_2026-11-28.json --commit abc")
    assert written["environments"] == [FACTS | {"commit": "abc"}]
    rows = written["rows"]
    failed = [row["by"] for row in rows if "failed" in row]
    assert set(failed) == {FLASH_4}
    assert first == len(rows) - len(failed)
    assert all(row["prepared"] == 1.5 for row in rows if "failed" not in row)
    assert {row["run"] for row in rows} == {0}
    limits.main()
    assert len(FakeWorker.measured) == first  # only what failed is tried again
    again = [row for row in json.loads(finished.read_text())["rows"] if row["run"] == 1]
    assert [row["by"] for row in again] == failed


def test_the_page_shows_limits_and_losses(finished: Path) -> None:
    """Times, shares of the limit, who is faster, and what did not run."""
    parts = "".join(f"<!-- limits: {name} -->\nold\n<!-- end -->\n" for name in page.PARTS)
    text = page.render(parts, Results.read(finished), finished.name)
    assert "old" not in text
    assert page.render(text, Results.read(finished), finished.name) == text
    headings = {name: page.PARTS[name](Results.read(finished), "x").splitlines()[0]
                for name in ("grouped", "grouped-forward")}  # fmt: skip
    assert "| spattention | any order |" in headings["grouped"]
    assert "any order" not in headings["grouped-forward"]
    # 0.7 TFLOP at 500 TFLOP/s is 1.4 ms, and 3 GB at 2.5 TB/s 1.2 ms; dense attention is cuDNN's.
    assert "| 4, 16, 4,096 exclusive | 1.4 p | 3 (47%) | 6 (23%) | 6 (23%) |" in text
    assert "**2 (70%)**" in text
    assert "| 4, 16, 4,096 exclusive | forward + backward | FSA | 1.50 | 3.00 |" in text
    assert "| 4, 16, 4,096 shared_local | forward + backward |" not in text
    assert "spattention is the fastest in 36 of 42 cases" in text
    assert "geometric, 32 / 8 heads, 16 x | 400 p | **1000 (40%)**" in text
    assert "- FlashAttention-4: 1 x 65,536, D 128 (3); 1 x 16,384, D 128 (3); 4 x 4,096, D" in text
    assert "1 x 65,536, D 64 sinks (2): `ImportError: no such package`" in text
    assert "The run ended" not in text
    assert " runs, on GPUs" not in text
    record = json.loads(finished.read_text())
    text = page.run(Results(record | {"environments": [FACTS, FACTS]}), "x")
    assert " 2 runs, on GPUs of this name; each shape is of one." in text
    rows = [row | {"run": index % 2} for index, row in enumerate(record["rows"])]
    facts = record | {"environments": [FACTS, FACTS], "rows": rows}
    assert "of more than one: decode" in page.run(Results(facts), "x")
    text = page.missing(Results(record | {"rows": record["rows"][:-3]}), "x")
    assert "- The run ended before these, by number of calls: 1 x 65,536, D 64 prefix (3)" in text
    with pytest.raises(SystemExit, match="a part must be one of"):
        page.render("<!-- limits: unknown -->\n<!-- end -->", Results.read(finished), "x")


def test_the_picture_names_its_results(finished: Path, tmp_path: Path) -> None:
    picture = tmp_path / "limits.png"
    chart.draw(Results.read(finished), picture, chart.source_of(finished))
    assert Image.open(picture).text["Source"] == chart.source_of(finished)  # type: ignore[attr-defined]


def test_the_newest_results_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert newest() is None
    for name in ("limits_h200_2026-11-27.json", "limits_h100_2026-11-28.json"):
        (tmp_path / name).touch()
    found = newest()
    assert found is not None
    assert found.name == "limits_h100_2026-11-28.json"


def test_a_worker_that_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the worker fails, and its cases carry the reason."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (ended,) = processes.prepare([cases()[:2]], 20.0, 4)
    assert processes.measure(ended, cases()[0]) == {"failed": "its worker ended"}
    ended.stop()


def test_a_case_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run continues with other workers."""
    monkeypatch.setattr(processes, "MEASURE_SECONDS", 0.2)
    silent = Worker.__new__(Worker)
    silent.cases, silent.failed, silent.seconds = cases()[:2], {}, {}
    silent.process = subprocess.Popen(
        ["sleep", "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    reason = "its worker ended or took 0.2 s"
    assert processes.measure(silent, silent.cases[0]) == {"failed": reason}
    assert processes.measure(silent, silent.cases[1]) == {"failed": reason}
    assert silent.process.poll() is not None


class SlowWorker(Worker):
    """A worker that is ready after a number of seconds, the length of its first case."""

    started: ClassVar[list[float]] = []

    def __init__(self, members: list[Case]) -> None:
        self.cases, self.failed, self.seconds = members, {}, {}
        SlowWorker.started.append(time.monotonic())
        answer = json.dumps({"failed": {}, "seconds": {"0": 0.5}})
        self.process = subprocess.Popen(
            ["sh", "-c", f"sleep {members[0].length}; echo '{answer}'"],
            stdout=subprocess.PIPE,
            text=True,
        )


def test_few_workers_prepare_at_the_same_time() -> None:
    """The first ones first; those that are not ready in time are given up by name."""
    groups = [[Case(OURS, "dense", "plain", 1, 1, 1, seconds, 64)] for seconds in (0, 0, 90, 90)]
    groups += [[Case(FLEX, "dense", "plain", 1, 1, 1, 0, 64)]]
    ready = processes.prepare(groups, 1.0, 2, SlowWorker)
    assert [bool(each.failed) for each in ready] == [False, False, True, True, True]
    assert ready[0].seconds == {groups[0][0]: 0.5}
    assert set(ready[3].failed.values()) == {"was not compiled after 1 s"}
    assert set(ready[4].failed.values()) == {"was not compiled after 1 s, as others were first"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_decoding_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query at the end of the text, by FlexAttention's mask; a wrong output is refused."""
    bench = Decoding(CPU)
    bench.flex = flex_attention
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, 96, 16, generator=generator)
    case = Case(FLEX, "geometric", DECODE, 2, 4, 2, 96, 16)
    out = bench.by_flex(case, PATTERN, query, key, value)(slice(0, 2))
    assert bench.check(out, PATTERN, query, key, value) < 1e-5
    with pytest.raises(RuntimeError, match="out is off by"):
        bench.check(out + 0.1, PATTERN, query, key, value)


@pytest.mark.skipif(newest() is None, reason="no results of a run are committed")
def test_the_page_is_that_of_the_newest_results() -> None:
    """docs/performance.md and its picture: `python -m benchmarks.limits page` after a run."""
    file = newest()
    assert file is not None
    text = page.PAGE.read_text(encoding="utf-8")
    assert set(page.PARTS) == {found[2] for found in page.MARK.finditer(text)}
    assert page.render(text, Results.read(file), file.name) == text
    assert Image.open(page.PICTURE).text["Source"] == chart.source_of(file)  # type: ignore[attr-defined]


def test_the_readme_states_the_newest_results():
    """Its rows: over the fastest dense kernel, and over the fastest competitor on the same mask.
    Ours are times of the newest Triton where it was timed in turns with that of the run.
    """
    file = results.newest()
    assert file is not None
    totals: dict[tuple[int, ...], dict[str, dict[str, float]]] = {}
    for row in json.loads(file.read_text())["rows"]:
        if row["variant"] == "plain" and row.get("total"):
            shape = tuple(row[k] for k in ("batch", "heads", "key_heads", "length", "head_dim"))
            totals.setdefault(shape, {}).setdefault(row["mask"], {})[row["by"]] = row["total"]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    stated = [
        line for line in readme.splitlines() if re.match(r"\| \d+, \d+/\d+, \d+, \d+ \|", line)
    ]
    assert len(stated) == 5
    for line in stated:
        numbers = [float(number) for number in re.findall(r"\d*\.?\d+", line)]
        shape, said = tuple(int(n) for n in numbers[:5]), numbers[5:]
        dense, same = min(totals[shape]["dense"].values()), totals[shape]["geometric"]
        fastest = min(time for by, time in same.items() if by not in (OURS, ANY_ORDER))
        wanted = [base / (same[OURS] * newest_triton(*shape)) for base in (dense, fastest)]
        assert said == pytest.approx(wanted, rel=0.03), line


def newest_triton(batch: int, heads: int, key_heads: int, length: int, head_dim: int) -> float:
    """Time of the newest Triton over that of the run of all competitors; 1 if it was not timed."""
    files = sorted(results.FOLDER.glob("triton_newest_*.json"))
    if not files:
        return 1.0
    shape = f"{batch}x{heads}/{key_heads}x{length}x{head_dim}"
    medians = json.loads(files[-1].read_text())["medians"]
    first, last = medians[f"{shape} shared_local geometric, forward + backward"].values()
    return float(last / first)


def test_calls_without_a_capture_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures are tried twice; then calls are timed plainly, and the reason is kept."""
    outcomes: list[float | RuntimeError] = []

    def replays(call: Any, rest: float) -> float:
        found = outcomes.pop(0)
        if isinstance(found, RuntimeError):
            raise found
        return found

    monkeypatch.setattr(worker, "graph_milliseconds", replays)
    monkeypatch.setattr(worker, "eager_milliseconds", lambda call, rest: 9.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = (lambda: None, lambda: None)
    failed = RuntimeError("operation failed during capture\nmore")
    outcomes[:] = [1.0, 2.0]
    assert worker.milliseconds(calls) == ([1.0, 2.0], None)
    outcomes[:] = [failed, 1.0, 2.0]
    assert worker.milliseconds(calls) == ([1.0, 2.0], None)
    outcomes[:] = [1.0, failed, failed]
    assert worker.milliseconds(calls) == ([9.0, 9.0], "operation failed during capture")
    outcomes[:] = [torch.OutOfMemoryError("full")]
    with pytest.raises(torch.OutOfMemoryError):
        worker.milliseconds(calls)
