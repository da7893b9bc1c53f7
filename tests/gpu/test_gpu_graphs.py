"""Training whose passes are one CUDA graph: the losses of a run without it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spattention.data.token_file import write_token_file
from spattention.data.tokens import TokenStream
from spattention.training.graphs import WARM_UP, PassGraph
from spattention.training.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from small_run import losses, recipe

SETTINGS: dict[str, Any] = {
    "model": "olmoe-tiny",
    "layers": 2,
    "context": 256,
    "batch": 8,
    "micro_batch": 4,
    "precision": "bfloat16",
    "loss": "chunked",
    "attention": "shared_local:local=32",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "a.u16.xz"
    random = np.random.default_rng(0)
    documents = [np.append(random.integers(8, 320, 99), 7).astype(np.uint16) for _ in range(200)]
    write_token_file(path, TokenStream.from_documents(documents), 7)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "dense"},
        {"loss": "plain", "model": "small-512"},
        {"compile": True},
        {"compile": True, "across_documents": False, "attention": "exclusive"},
    ],
    ids=["experts", "dense", "plain loss", "compiled", "compiled documents"],
)
def test_replayed_passes_train_alike(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Accumulation, clipping, schedule, experts, validation and a run that goes on. Equal launches
    give equal bits; dense attention's backward pass sums in any order.
    """
    chosen = SETTINGS | changes
    notes: list[str] = []
    found = {}
    for name, graphs in (("without", False), ("with", True)):
        run = recipe(data, cuda_graphs=graphs, **chosen)
        pretrain(run, tmp_path / name, send=lambda event: notes.append(event.get("text", "")))
        found[name] = losses(tmp_path / name)
    assert not [note for note in notes if "graph" in note]
    steps = [step for step, _ in found["without"]]
    assert [step for step, _ in found["with"]] == steps
    for (_, one), (_, other) in zip(found["without"], found["with"]):
        assert abs(one - other) <= (1e-3 if chosen["attention"] == "dense" else 0.0) * one, found
    run = recipe(data, cuda_graphs=True, **chosen)
    assert not pretrain(run, tmp_path / "parts", minutes=0).finished
    pretrain(run, tmp_path / "parts")
    for (_, one), (_, other) in zip(losses(tmp_path / "parts"), found["with"]):
        assert abs(one - other) <= (1e-3 if chosen["attention"] == "dense" else 0.0) * one


def passes(run: Any, *parameters: torch.nn.Parameter) -> tuple[list[float], list[str], PassGraph]:
    """Losses of passes over 0, 1, ..., what was told, and the graph."""
    told: list[str] = []
    graph = PassGraph(run, parameters, told.append)
    inputs = [torch.full((1000,), float(k), device="cuda") for k in range(WARM_UP + 4)]
    return [float(graph({"x": x})) for x in inputs], told, graph


def test_a_pass_that_waits_is_named() -> None:
    weight = torch.nn.Parameter(torch.ones((), device="cuda"))

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = (inputs["x"] * weight).mean() * (1 + 0 * inputs["x"].sum().item())
        loss.backward()
        return loss.detach()

    found, told, graph = passes(run, weight)
    assert found == list(range(WARM_UP + 4))
    assert graph.replay is None
    assert len(told) == 1
    assert __file__ in told[0]


def test_random_numbers_go_on() -> None:
    """Each replay draws others, as passes without a graph do."""
    weight = torch.nn.Parameter(torch.ones((), device="cuda"))

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = (torch.rand_like(inputs["x"]) * weight).mean()
        loss.backward()
        return loss.detach()

    torch.manual_seed(0)
    found, told, graph = passes(run, weight)
    assert graph.replay is not None
    assert not told
    assert len(set(found)) == len(found)
    assert weight.grad is not None
    assert abs(float(weight.grad) - sum(found)) < 1e-4
