"""The chunked loss and the routers' losses: values and gradients of the plain computation."""

import copy

import pytest
import torch
from torch.nn import functional as F

from spattention.models import build, preset
from spattention.training import loss as chunks
from spattention.training.loss import DeferredHead, chunked_cross_entropy, defer_loss
from spattention.training.router import (
    BalancedRouter,
    balance_loss,
    balance_routers,
    router_losses,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(preset("olmoe-tiny", vocab_size=97, context=32, num_layers=2))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("items", [None, 50])
def test_a_chunked_loss_is_the_models_own(model, monkeypatch, items):
    monkeypatch.setattr(chunks, "ROWS", 7)  # does not divide the 64 rows
    tokens = torch.randint(97, (2, 32))
    labels = tokens.masked_fill(torch.rand(2, 32) < 0.2, -100)
    keywords = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    plain = copy.deepcopy(model)
    expected = plain(input_ids=tokens, labels=labels, use_cache=False, **keywords).loss
    expected.backward()
    defer_loss(model, "chunked")
    found = model(input_ids=tokens, labels=labels, use_cache=False, **keywords)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected, atol=1e-6, rtol=1e-6)
    assert found.logits.shape == (2, 32, model.config.hidden_size), "hidden states, not logits"
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-6, rtol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(model.lm_head, DeferredHead)


def test_compiled_chunks_are_the_same(monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 16)
    hidden = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (40,)).masked_fill(torch.rand(40) < 0.2, -100)
    results = []
    for compiled in (False, True):
        total = chunked_cross_entropy(hidden, weight, targets, compiled=compiled)
        results.append((total, *torch.autograd.grad(0.3 * total, (hidden, weight))))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_compiled_chunks_leave_a_frozen_head(monkeypatch):
    """Hidden states alone have a gradient then, the same."""
    monkeypatch.setattr(chunks, "_compiled_with_gradient", chunks._with_gradient)
    hidden = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(50, 8)
    targets = torch.randint(50, (40,))
    chunked_cross_entropy(hidden, weight, targets, compiled=True).backward()
    found, hidden.grad = hidden.grad, None
    F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    torch.testing.assert_close(found, hidden.grad, atol=1e-5, rtol=1e-5)
    assert weight.grad is None


def test_bfloat16_heads_get_float32_gradients(monkeypatch):
    """The sum over chunks is float32, for parameters whose gradients are."""
    monkeypatch.setattr(chunks, "ROWS", 16)
    monkeypatch.setattr(chunks, "_compiled_with_gradient", chunks._with_gradient)
    hidden = torch.randn(64, 8).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(torch.randn(50, 8).bfloat16())
    weight.grad_dtype = torch.float32
    targets = torch.randint(50, (64,))
    chunked_cross_entropy(hidden, weight, targets, compiled=True).backward()
    exact = weight.detach().float().requires_grad_()
    F.cross_entropy(hidden.detach().float() @ exact.T, targets, reduction="sum").backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, exact.grad, atol=0.03, rtol=0.03)


def test_no_more_logits_than_a_chunk_at_once(monkeypatch):
    sizes = []

    def spy(input, weight, bias=None):
        sizes.append(input.shape[0] * weight.shape[0])
        return input @ weight.T

    monkeypatch.setattr(chunks, "ROWS", 16)
    monkeypatch.setattr(chunks.F, "linear", spy)
    hidden = torch.randn(100, 8, requires_grad=True)
    chunked_cross_entropy(hidden, torch.randn(50, 8), torch.randint(50, (100,))).backward()
    assert len(sizes) == 14, "seven chunks, each made again in the backward pass"
    assert max(sizes) == 16 * 50


def test_a_head_with_bias_is_refused(model):
    model.lm_head = torch.nn.Linear(128, 97)
    with pytest.raises(ValueError, match='`loss` must be "plain" for Linear with bias'):
        defer_loss(model, "chunked")


@pytest.mark.parametrize(
    "name", ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"]
)
def test_a_model_that_caps_its_logits_is_refused(model, name):
    """Made of hidden states, its cap would not be that of the logits."""
    setattr(model.config, name, 30.0)
    defer_loss(model, "plain")
    with pytest.raises(
        ValueError, match=rf'"plain" for a model that caps its logits \({name} = 30'
    ):
        defer_loss(model, "chunked")
    assert type(model.lm_head) is torch.nn.Linear


def test_the_balance_loss_by_its_formula():
    logits = torch.randn(40, 8)
    chosen = logits.topk(2).indices
    shares = F.one_hot(chosen, 8).sum((0, 1)) / 80
    expected = 8 * (shares * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(balance_loss(logits, chosen), expected)
    even = torch.arange(8).repeat(10).view(40, 2)
    torch.testing.assert_close(balance_loss(torch.zeros(40, 8), even), torch.tensor(1.0))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_send_the_gradients_of_their_losses(model, checkpointing):
    """Against the sum written out with the logits that hooks collect."""
    tokens = torch.randint(97, (2, 32))
    plain = copy.deepcopy(model)
    logits = []
    for layer in plain.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, a, out: logits.append((out[0], out[2])))
    loss = plain(input_ids=tokens, labels=tokens, use_cache=False).loss
    balance = torch.stack([balance_loss(*entry) for entry in logits]).mean()
    z = torch.stack([entry[0].logsumexp(-1).square().mean() for entry in logits]).mean()
    (loss + 0.3 * balance + 0.2 * z).backward()

    balance_routers(model, 0.6, 0.4, passes=2)  # half of it per pass
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    torch.testing.assert_close(out.loss, loss, msg="the reported loss is the cross-entropy alone")
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-6, rtol=1e-4)
    expected = {"balance_loss": balance.item(), "z_loss": z.item()}
    assert router_losses(model) == pytest.approx(expected, rel=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_routers_are_silent_in_evaluation(model):
    balance_routers(model, 1.0, 1.0, passes=1)
    model.eval()
    model(input_ids=torch.randint(97, (1, 8)))
    assert router_losses(model) == {"balance_loss": 0.0, "z_loss": 0.0}
    assert sum(isinstance(m, BalancedRouter) for m in model.modules()) == 2
