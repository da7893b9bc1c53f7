"""Compiled layers stay compiled: one graph for each kind of layer and of pass."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import spattention as spa
from spattention.models import build, preset
from spattention.training.pretrain import compile_layers

KINDS = list(range(4, 14))  # windows


@pytest.fixture
def limit():
    """The process's limit of graphs, and nothing compiled before."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kinds", [KINDS[:1] * len(KINDS), KINDS], ids=["one", "ten"])
def test_every_kind_of_layer_has_its_graphs(limit, monkeypatch, kinds):
    """Beyond PyTorch's limit of 8 graphs a layer would run uncompiled."""
    chosen = preset("small-512", context=32, num_layers=len(kinds), vocab_size=64)
    model = build(chosen, pattern=None)
    bands = [spa.BandPattern.sliding_window(8, 32, window=window) for window in kinds]
    spa.hf.apply(model, bands)
    counted = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
    compile_layers(model)
    ids = torch.arange(64).reshape(2, 32)
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    assert counted.frame_count == 2 * len(set(kinds))
