"""Rows that are split over ranks: refused where attention would see a rank's own part alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import FIRST, HEADS, SPAN, banded, build, logits, tokens
from torch.distributed.tensor.experimental import context_parallel

import spattention as spa
from spattention import baselines

MATCH = r'attn_implementation="{}" must not run under `context_parallel` \(or Accelerate'


@pytest.fixture
def mesh(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def split(mesh, *rows):
    return context_parallel(mesh, buffers=list(rows), buffer_seq_dims=[1] * len(rows))


@pytest.mark.parametrize("name", ["spattention", "bigbird"])
def test_context_parallel_is_refused(name, mesh):
    chosen = baselines.BigBird(HEADS, SPAN)
    model = banded("llama") if name == "spattention" else baselines.apply(build("llama"), chosen)
    ids, positions = tokens(1, 16), torch.arange(16)[None]
    before = logits(model, ids)
    with split(mesh, ids, positions), pytest.raises(NotImplementedError, match=MATCH.format(name)):
        model(ids, position_ids=positions)
    assert torch.equal(logits(model, ids), before)


def test_context_parallel_is_refused_in_training(mesh):
    model, ids = banded("llama").train(), tokens(1, 16)
    with split(mesh, ids), pytest.raises(NotImplementedError, match=MATCH.format("spattention")):
        model(ids, labels=ids)


def test_a_compiled_model_refuses_context_parallel(mesh):
    """Compiled inside the context or before it: the graph is not run there."""
    torch._dynamo.reset()
    ids = tokens(1, 16)
    before, within = (torch.compile(banded("llama"), backend="eager") for _ in range(2))
    wanted = logits(before, ids)
    for model in (before, within):
        with split(mesh, ids), pytest.raises(NotImplementedError, match="`context_parallel`"):
            model(ids)
    assert torch.equal(logits(before, ids), wanted)


def test_a_loaded_model_refuses_context_parallel(mesh, tmp_path):
    banded("llama", (FIRST, None)).save_pretrained(tmp_path)
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens(1, 16)
    with split(mesh, ids), pytest.raises(NotImplementedError, match=MATCH.format("spattention")):
        model(ids)


def test_bands_split_rows_by_their_context_parallel(mesh):
    """The refusal names it; it serves the same model, and PyTorch's around it still raises."""
    model, ids = banded("llama"), tokens(1, 16)
    wanted = logits(model, ids)
    spa.hf.context_parallel(model, mesh)
    assert torch.equal(logits(model, ids), wanted)
    with (
        split(mesh, ids),
        pytest.raises(NotImplementedError, match=r"`spattention\.hf\.context_parallel`"),
    ):
        model(ids)
    spa.hf.context_parallel(model, None)
    assert torch.equal(logits(model, ids, use_cache=True), wanted)


def test_another_attention_of_torch_is_no_split(monkeypatch):
    """Libraries that replace `scaled_dot_product_attention` as a whole are no reason to refuse."""
    model, ids = banded("llama"), tokens(1, 16)
    wanted = logits(model, ids)
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: attend(*a, **k)
    )
    assert torch.equal(logits(model, ids), wanted)
