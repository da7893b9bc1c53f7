"""Data, context and tensor parallelism in one model, and what measures them (gloo, CPU)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 8])
def test_three_ways_train_as_one_process(ranks, tmp_path):
    """Losses and weights of three steps of Llama, Qwen3 and OLMoE, with rows split and shared."""
    assert f"three ways on {ranks} ranks equal one" in launch(
        ranks, HERE / "three_ways.py", tmp_path
    )


@pytest.mark.slow
def test_the_example_of_many_gpus_trains():
    """The script of `examples/` on eight processes."""
    shown = launch(8, HERE.parents[1] / "examples" / "many_gpus.py")
    words = next(line for line in shown.splitlines() if line.startswith("loss ")).split()
    assert float(words[-4]) < float(words[1]) - 1


@pytest.mark.slow
def test_the_benchmark_of_several_gpus_runs(tmp_path):
    """Every part, in tiny sizes."""
    sizes = "--length 256 --check-length 256 --heads 4 --key-heads 4 --head-dim 16 --repetitions 1"
    sizes += " --context 64 --global-batch 4 --micro-batch 1 --steps 2 --hidden 256 --layers 2"
    sizes += " --prompt 64 --new-tokens 4 --curve-steps 3 --decoding-rows 1 2"
    output = tmp_path / "results.json"
    options = ["--device", "cpu", *sizes.split(), "--output", output]
    shown = launch(2, "-m", "benchmarks.parallel", *options)
    for part in ("correctness", "attention", "data-parallel", "tensor-parallel", "losses"):
        assert f"\n{part} " in "\n" + shown, shown[-2000:]


@pytest.mark.slow
def test_forms_of_the_exchange_take_turns(tmp_path):
    """The package as it is beside itself: every form agrees with one process, and is timed."""
    output = tmp_path / "turns.json"
    sizes = "--length 256 --heads 4 --key-heads 4 --head-dim 16 --repetitions 1 --rounds 1"
    package = HERE.parents[1] / "src" / "spattention" / "parallel"
    options = ["--device", "cpu", *sizes.split(), "--before", package, "--output", output]
    launch(2, "-m", "benchmarks.exchange_in_turns", *options)
    rows = json.loads(output.read_text())["rows"]
    ways = {row["way"] for row in rows if row["part"] == "median"}
    assert {"one GPU", "before", "now", "Ulysses, contiguous", "all-gather, balanced"} <= ways
    apart = [row["out"] for row in rows if row["part"] == "difference from one GPU"]
    assert max(apart) < 0.05


@pytest.mark.slow
def test_one_gpus_attention_has_one_gpus_gradients(tmp_path):
    """In context parallelism it is as far from one process as splits are; a few of its numbers off
    by one in the last bit put it farther, as attention on shards is."""
    output = tmp_path / "rounding.json"
    sizes = "--length 256 --heads 4 --context 64 --hidden 256 --layers 2 --seeds 1"
    options = ["--device", "cpu", *sizes.split(), "--output", output]
    launch(2, "-m", "benchmarks.parallel_rounding", *options)
    operator, *rows = json.loads(output.read_text())["rows"]
    assert operator["out"]["error_over_that_of_one"] < 1.01
    far = {row["way"]: row["q_proj"] for row in rows}
    splits = far["one GPU, splits"]
    assert 0.8 < far["both of one GPU"] / splits < 1.2
    for way in ("context parallelism", "one GPU, other kernels", "both, 20 numbers moved"):
        assert far[way] > 1.5 * splits, way
