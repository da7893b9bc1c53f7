"""Layers of one expert compute what Transformers' experts do."""

import copy
import json

import pytest
import torch

from spattention.models import build, preset
from spattention.training.experts import NAME, simplify_experts
from spattention.training.router import balance_loss


def test_one_expert_is_the_grouped_products(tmp_path):
    """Loss and gradients are equal, and what is saved names no implementation of ours."""
    torch.manual_seed(0)
    model = build(preset("small-512", context=32, num_layers=2, vocab_size=64))
    other = copy.deepcopy(model)
    simplify_experts(model)
    assert model.config._experts_implementation == NAME
    tokens = torch.randint(64, (2, 32))
    for each in (model, other):
        each(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(one.grad, two.grad, msg=name)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_several_experts_stay_grouped():
    model = build(preset("olmoe-tiny", context=32, num_layers=1, vocab_size=64))
    simplify_experts(model)
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("experts", [1, 5])
def test_shares_of_choices_are_counted(experts):
    """Probabilities of one expert alone, whatever the logits, balance perfectly."""
    chosen = torch.arange(20).reshape(10, 2) % experts
    assert balance_loss(torch.zeros(10, experts), chosen).item() == pytest.approx(1.0)
