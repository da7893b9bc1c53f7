"""Losses by position against a loop over windows and tokens."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spattention.evaluation.perplexity import (
    Mean,
    position_edges,
    token_losses,
    validation_loss,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def windows(count, length):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 31, (count, length), generator=generator)
    return [{"input_ids": row} for row in ids]


def test_losses_are_those_of_a_loop(model):
    data = windows(5, 20)
    found = validation_loss(model, data, batch=2, edges=(1, 2, 7, 20))
    wanted = []
    for window in data:
        ids = window["input_ids"]
        row = []
        for p in range(1, 20):
            with torch.no_grad():
                logits = model(ids[None, :p]).logits[0, -1].double()
            row.append(float(logits.logsumexp(0) - logits[ids[p]]))
        wanted.append(row)
    by_window = [sum(row) / 19 for row in wanted]
    mean = sum(by_window) / 5
    error = math.sqrt(sum((x - mean) ** 2 for x in by_window) / 4 / 5)
    assert found.loss.mean == pytest.approx(mean, abs=1e-5)
    assert found.loss.error == pytest.approx(error, rel=1e-3)
    assert found.loss.items == 5
    for part, (near, far) in zip(found.parts, ((1, 2), (2, 7), (7, 20))):
        values = [sum(row[near - 1 : far - 1]) / (far - near) for row in wanted]
        assert part.mean == pytest.approx(sum(values) / 5, abs=1e-5)


def test_separate_documents_and_ignored_labels(model):
    """As each document by itself, whose first token nobody predicts."""
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(0, 31, (n,), generator=generator) for n in (9, 4, 7)]
    documents += [torch.randint(0, 31, (n,), generator=generator) for n in (1, 18, 1)]
    data = []
    for parts in (documents[:3], documents[3:]):
        ids = torch.cat(parts)
        positions = torch.cat([torch.arange(len(part)) for part in parts])
        labels = ids.where(positions > 0, -100)
        data.append({"input_ids": ids, "position_ids": positions, "labels": labels})
    found = validation_loss(model, data, batch=2, edges=(1, 2, 20))
    alone = [token_losses(model, part[None])[0] for part in documents if len(part) > 1]
    wanted = torch.cat(alone)
    assert found.loss.mean == pytest.approx(float(wanted.double().mean()), abs=1e-5)
    assert found.loss.items == 2
    assert found.parts[0].mean == pytest.approx(float(alone[0][0]), abs=1e-5)
    assert found.parts[0].items == 1, "the second window's second token begins a document"


def test_a_loss_that_is_no_number_is_seen(model):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = torch.nan
    assert math.isnan(validation_loss(broken, windows(2, 8)).loss.mean)


def test_the_batch_does_not_matter(model):
    data = windows(5, 20)
    first, second = (validation_loss(model, data, batch=batch) for batch in (1, 5))
    assert first.loss.mean == pytest.approx(second.loss.mean, abs=1e-6)
    done = []
    validation_loss(model, data, batch=2, on_window=done.append)
    assert done == [2, 4, 5]


def test_the_mean_of_the_trainers_loss_is_the_same(model):
    ids = torch.stack([w["input_ids"] for w in windows(3, 20)])
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss
    torch.testing.assert_close(token_losses(model, ids).mean(), wanted)


@pytest.mark.parametrize("context", [2, 3, 31, 32, 33, 1000, 1024, 16384])
def test_edges_cover_every_predicted_position(context):
    edges = position_edges(context)
    assert edges[0] == 1
    assert edges[-1] == context
    assert list(edges) == sorted(set(edges))
    assert len(edges) <= 48


def test_edges_double_and_then_go_on_evenly():
    assert position_edges(1024, 4) == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024)


def test_one_item_has_no_error():
    assert Mean.of(torch.tensor([2.0])) == Mean(2.0, math.inf, 1)


def test_wrong_arguments_raise(model):
    with pytest.raises(ValueError, match="`windows` must hold at least one window, got none"):
        validation_loss(model, [])
    for edges in ((0, 20), (1, 19), (1, 5, 5, 20)):
        with pytest.raises(ValueError, match="`edges` must increase from 1 to 20"):
            validation_loss(model, windows(1, 20), edges=edges)
