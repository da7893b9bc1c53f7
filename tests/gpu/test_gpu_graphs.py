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
    "held_out": 0.1,
    "learning_rate": 1e-3,
}
TOLERANCE = 5e-3  # of a loss, where launches sum in any order


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "a.u16.xz"
    random = np.random.default_rng(0)
    documents = [np.append(random.integers(8, 320, 99), 7).astype(np.uint16) for _ in range(200)]
    write_token_file(path, TokenStream.from_documents(documents), 7)
    return path


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, True),
        ({"loss": "plain", "model": "small-512"}, True),
        ({"first_attention": "exclusive", "first_steps": 3}, True),
        ({"attention": "dense"}, False),
        ({"compile": True}, False),
        ({"compile": True, "attention": "dense"}, False),
        ({"compile": True, "model": "small-512", "across_documents": False}, True),
    ],
    ids=["experts", "plain loss", "switch", "dense", "compiled", "compiled dense", "documents"],
)
def test_replayed_passes_train_alike(
    data: Path, tmp_path: Path, changes: dict[str, Any], exact: bool
) -> None:
    """Accumulation, clipping, schedule, experts, validation and a run that goes on.

    Equal launches give equal bits. Dense attention's backward pass sums in any order, and so do the
    experts' in compiled layers.
    """
    notes: list[str] = []

    def train(name: str, graphs: bool, minutes: float | None = None) -> list[tuple[int, float]]:
        run = recipe(data, cuda_graphs=graphs, **SETTINGS | changes)
        folder = tmp_path / name
        pretrain(
            run, folder, minutes=minutes, send=lambda event: notes.append(event.get("text", ""))
        )
        return losses(folder)

    without, replayed = train("without", False), train("with", True)
    stopped, resumed = train("parts", True, minutes=0), train("parts", True)
    assert not [note for note in notes if "graph" in note]
    assert len(stopped) < len(resumed)
    for found in (replayed, resumed):
        assert [step for step, _ in found] == [step for step, _ in without]
        differences = [abs(a / b - 1) for (_, a), (_, b) in zip(found, without)]
        assert max(differences) <= (0 if exact else TOLERANCE), (found, without)


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
