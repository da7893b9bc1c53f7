"""bfloat16 products on float32 masters: one step of AdamW, and exactly the same after loading."""

import copy

import torch

from spattention.training.precision import to_bfloat16

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    for _ in range(3):
        model(torch.randn(5, 8, dtype=torch.bfloat16)).float().square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    model.zero_grad()
    return found


def test_a_step_is_adamw_on_float32_weights():
    model, exact = network(), network()
    optimizer = to_bfloat16(model, 0.1, **OPTIONS)
    decayed = [p for p in exact.parameters() if p.dim() == 2]
    others = [p for p in exact.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, fused=True, **OPTIONS)
    for seed in range(3):
        gradients = step(model, optimizer, seed)
        for p, gradient in zip(exact.parameters(), gradients):
            assert gradient.dtype == torch.float32
            p.grad = gradient
        plain.step()
    masters = optimizer.state_dict()["masters"]
    for (name, rounded), p in zip(model.named_parameters(), exact.parameters()):
        assert torch.equal(masters[name], p)
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(rounded, p.bfloat16())


def test_small_updates_are_not_lost():
    """In bfloat16 alone 1 + 0.001 is 1."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizer = to_bfloat16(model, 0.0, lr=1e-3, betas=(0.0, 0.0), eps=1e-8)
    for _ in range(20):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        model.zero_grad()
    torch.testing.assert_close(model.weight.float(), torch.tensor([[0.98]]), atol=2e-3, rtol=0)


def test_gradients_add_up_in_float32():
    model = torch.nn.Linear(1, 1, bias=False)
    to_bfloat16(model, 0.0, **OPTIONS)
    for _ in range(300):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad.item() == 300, "bfloat16 counts to 256"


def test_a_saved_state_goes_on_exactly(tmp_path):
    model = network()
    optimizer = to_bfloat16(model, 0.1, **OPTIONS)
    step(model, optimizer, 0)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    weights = copy.deepcopy(model.state_dict())
    expected = [step(model, optimizer, seed) for seed in (1, 2)]

    again = network()
    other = to_bfloat16(again, 0.1, **OPTIONS)
    again.load_state_dict(weights)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    found = [step(again, other, seed) for seed in (1, 2)]
    for before, after in zip(expected, found):
        assert all(map(torch.equal, before, after))
    for name, p in again.state_dict().items():
        assert torch.equal(p, model.state_dict()[name])
