"""Training whose passes are one CUDA graph, with a recorder that needs no GPU."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import masking_utils

from spattention.choice import attention_choice
from spattention.compat.huggingface import packing_known
from spattention.models import build, preset
from spattention.training import graphs, pretrain
from spattention.training.graphs import WARM_UP, PassGraph, asks_for_graphs, refusal

sys.path.insert(0, str(Path(__file__).parent))
from cpu_recorder import Recorder
from small_run import losses, recipe, write_data

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), documents=40)


@pytest.fixture
def recorder(monkeypatch):
    """Every run records its passes, by this recorder."""
    found = Recorder()
    monkeypatch.setattr(graphs, "Recorder", lambda: found)
    monkeypatch.setattr(pretrain, "refusal", lambda *_: None)
    monkeypatch.setattr(pretrain, "asks_for_graphs", lambda recipe: recipe.cuda_graphs is True)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"across_documents": False},
        {"attention": "dense", "batch": 1},
        {"precision": "bfloat16", "loss": "chunked", "clip": 0.01},
    ],
    ids=["bands", "documents", "one pass", "bfloat16"],
)
def test_replayed_passes_train_alike(data, recorder, tmp_path, changes):
    """Accumulation, clipping, schedule and validation: losses are those without a graph."""
    changes = {"batch": 4} | changes
    pretrain.pretrain(recipe(data, cuda_graphs=False, **changes), tmp_path / "without")
    assert recorder.replays == 0
    pretrain.pretrain(recipe(data, cuda_graphs=True, **changes), tmp_path / "with")
    assert recorder.replays == 8 * changes["batch"] - WARM_UP
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_a_run_goes_on_with_its_losses(data, recorder, tmp_path):
    """A run that stops and goes on records again, and ends with the losses of one that does not."""
    whole = recipe(data, batch=4, cuda_graphs=True)
    pretrain.pretrain(whole, tmp_path / "whole")
    assert not pretrain.pretrain(whole, tmp_path / "parts", minutes=0).finished
    assert pretrain.pretrain(whole, tmp_path / "parts").finished
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_changed_attention_is_recorded_again(data, recorder, tmp_path):
    """A graph of the first steps would go on with their attention."""
    switch = {"first_attention": "exclusive", "first_steps": 3, "batch": 4}
    pretrain.pretrain(recipe(data, cuda_graphs=False, **switch), tmp_path / "without")
    pretrain.pretrain(recipe(data, cuda_graphs=True, **switch), tmp_path / "with")
    assert recorder.records == 2
    assert recorder.replays == 8 * 4 - 2 * WARM_UP
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("name", ["dense", "exclusive"])
def test_a_recording_compiles_nothing(monkeypatch, name, documents):
    """While a graph is recorded, layers get the masks of the passes before it. Transformers would
    make others, for which they would be compiled again.
    """
    torch._dynamo.reset()
    counted = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
    model = build(preset("small-512", context=32, num_layers=1, vocab_size=64), pattern=None)
    attention_choice(name, 8, 32).apply(model)
    pretrain.compile_layers(model)

    def run(inputs):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach()

    graph = PassGraph(run, model.parameters(), lambda reason: None, Recorder())
    tokens = torch.arange(64).reshape(2, 32)
    inputs = {"input_ids": tokens, "labels": tokens}
    if documents:
        inputs["position_ids"] = torch.arange(32).remainder(20).expand(2, -1)
    graph(inputs)
    compiled = counted.frame_count
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    graph(inputs)
    torch._dynamo.reset()
    assert counted.frame_count == compiled > 0


class Small:
    """A pass of a model with a parameter that it does not use."""

    def __init__(self, recorder: Recorder) -> None:
        self.used = torch.nn.Parameter(torch.ones(3))
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.told: list[str] = []
        parameters = (self.used, self.unused)
        self.graph = PassGraph(self.run, parameters, self.told.append, recorder)

    def run(self, inputs):
        loss = (self.used * inputs["x"]).sum()
        loss.backward()
        return loss.detach()

    def __call__(self, *values: float) -> float:
        return float(self.graph({"x": torch.tensor(values)}))


def test_gradients_stay_in_place_and_add_up():
    """A step that sets gradients to None starts from zero, in the same memory."""
    small = Small(Recorder())
    for _ in range(WARM_UP):
        small(1, 2, 3)
    kept = small.used.grad
    assert small(1, 2, 3) == 6
    assert kept.tolist() == [WARM_UP + 1, 2 * (WARM_UP + 1), 3 * (WARM_UP + 1)]
    small.used.grad = None
    assert (small(2, 0, 0), small(0, 0, 5)) == (2, 5)
    assert small.used.grad is kept
    assert kept.tolist() == [2, 0, 5]
    assert small.unused.grad is None
    assert small.told == []


def test_a_loss_outlives_the_next_pass():
    """The result of a replay is not where the next replay writes."""
    small = Small(Recorder())
    found = [small.graph({"x": torch.full((3,), float(k))}) for k in range(WARM_UP + 3)]
    assert [float(each) for each in found] == [3.0 * k for k in range(WARM_UP + 3)]


def test_other_inputs_run_without_the_graph():
    """Inputs of another shape are computed rightly, add to the same gradients, and are named."""
    small = Small(recorder := Recorder())
    for _ in range(WARM_UP + 1):
        small(1, 1, 1)
    small.used.grad = None
    assert (small(7), small(7), small(1, 2, 3)) == (21, 21, 6)
    assert small.used.grad.tolist() == [15, 16, 17]
    assert recorder.replays == 2
    assert len(small.told) == 1
    assert "(1,)" in small.told[0]


def test_a_pass_that_waits_is_not_recorded():
    small = Small(recorder := Recorder(waits="model.py:3"))
    assert [small(1, 1, 1) for _ in range(WARM_UP + 3)] == [3] * (WARM_UP + 3)
    assert recorder.replays == 0
    assert small.told == ["a pass waits for the GPU at model.py:3"]


def test_a_failed_recording_says_what_to_do(monkeypatch):
    small = Small(recorder := Recorder())
    monkeypatch.setattr(recorder, "record", lambda _: (_ for _ in ()).throw(RuntimeError("no")))
    for _ in range(WARM_UP):
        small(1, 1, 1)
    with pytest.raises(RuntimeError, match=r"`cuda_graphs` must be false .* no"):
        small(1, 1, 1)


REFUSED = [
    ({}, torch.device("cpu"), 1, "training runs on cpu"),
    ({}, CUDA, 2, "2 devices under `parallel` = 'ddp' exchange"),
    ({"parallel": "fsdp2"}, CUDA, 1, "1 devices under `parallel` = 'fsdp2' exchange"),
    ({"loss": "liger"}, CUDA, 1, 'the loss "liger" waits'),
    ({"checkpointing": True}, CUDA, 1, "`checkpointing` reads the state"),
]


@pytest.mark.parametrize(("changes", "device", "devices", "reason"), REFUSED)
def test_what_has_no_graph_says_why(changes, device, devices, reason):
    found = refusal(recipe(Path("a"), **changes), device, devices)
    assert found is not None
    assert found.startswith(reason)
    with pytest.raises(ValueError, match='`cuda_graphs` must be false or "auto" here, got true: '):
        refusal(recipe(Path("a"), cuda_graphs=True, **changes), device, devices)


def test_other_attention_has_a_graph_on_demand():
    """Of a baseline nobody knows whether it can be recorded: it is tried where a recipe insists."""
    found = [
        refusal(recipe(Path("a"), attention=attention, cuda_graphs=wanted), CUDA, 1)
        for attention in ("longformer:wide=4", ["dense", "exclusive"])
        for wanted in ("auto", True)
    ]
    assert found[1:] == [None] * 3
    assert found[0] == "recorded passes were tested with dense attention and bands alone"


def test_compiled_runs_ask_for_graphs():
    """With "auto" a compiled run asks, and every other does not; by default none does."""
    asked = [
        asks_for_graphs(recipe(Path("a"), compile=compiled, cuda_graphs=wanted))
        for compiled in (False, True)
        for wanted in ("auto", False, True)
    ]
    assert asked == [False, False, True, True, False, True]
    assert not asks_for_graphs(recipe(Path("a"), compile=True))
    assert refusal(recipe(Path("a"), compile=True), CUDA, 1) is None


def test_a_run_without_its_graph_says_so_once(data, tmp_path, monkeypatch):
    """On the CPU, where `compile = true` would have one on a GPU."""
    monkeypatch.setattr(pretrain, "asks_for_graphs", lambda recipe: True)
    events = []
    pretrain.pretrain(recipe(data), tmp_path / "run", send=events.append)
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert notes == ["passes run without a CUDA graph: training runs on cpu"]


@pytest.mark.parametrize("value", [1, 0, "on", 1.0])
def test_a_number_is_no_answer(value):
    with pytest.raises(ValueError, match="`cuda_graphs` must be one of"):
        recipe(Path("a"), cuda_graphs=value)


def test_known_packing_is_not_read():
    """Packed rows are split as Transformers splits them, and rows of one text are not looked at."""
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]])
    theirs = masking_utils.find_packed_sequence_indices
    wanted = theirs(positions)
    with packing_known(True):
        assert torch.equal(masking_utils.find_packed_sequence_indices(positions), wanted)
    with packing_known(False):
        assert masking_utils.find_packed_sequence_indices(positions) is None
    assert masking_utils.find_packed_sequence_indices is theirs
