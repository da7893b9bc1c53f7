"""Models under `hf.context_parallel` beside one that has whole rows; run by torchrun."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from spattention import BandPattern, hf
from spattention.parallel import Shards
from spattention.training.loss import defer_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
import tiny

STEPS = 200
LOSS = 2e-6  # Transformers computes losses in float32


def whole_and_parallel(family: str, **how):
    model = tiny.banded(family, how.pop("pattern", (tiny.FIRST, tiny.SECOND)), **how)
    parallel = copy.deepcopy(model)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    return model, hf.context_parallel(parallel, mesh)


def average(model) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def equal(family: str, inputs: dict, **how) -> None:
    """Loss and gradients of one step, and logits of this rank's tokens, in float64."""
    checkpoint = how.pop("checkpoint", False)
    models = whole_and_parallel(family, **how)
    if checkpoint:
        models[1].train().gradient_checkpointing_enable()
    losses, grads, logits = [], [], None
    for model in models:
        found = model(**inputs)
        found.loss.backward()
        if model is models[1]:
            average(model)
            rank, ranks = dist.get_rank(), dist.get_world_size()
            wanted = Shards.balanced(inputs["labels"].shape[1], ranks).split(logits, rank)
            torch.testing.assert_close(found.logits, wanted, rtol=0.0, atol=1e-10)
        logits = found.logits
        losses.append(found.loss.item())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert abs(losses[0] - losses[1]) < LOSS, (family, losses)
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][name], wanted, rtol=0.0, atol=LOSS, msg=name)


def chunked(inputs: dict) -> None:
    """A loss that makes no logits takes the shifted labels too; one that shifts is refused."""
    whole, parallel = whole_and_parallel("llama")
    defer_loss(parallel, "chunked")
    found = parallel(**inputs).loss.item()
    assert abs(found - whole(**inputs).loss.item()) < LOSS
    parallel.loss_function = lambda logits, labels, vocab_size, **others: logits.sum()
    with pytest.raises(ValueError, match="`model` must have a loss function with `shift_labels`"):
        parallel(**inputs)


def refused(model, inputs: dict) -> None:
    """Inputs that cannot be split, on every rank before anything is exchanged."""
    ids = inputs["input_ids"]
    far = torch.arange(ids.shape[1])[None] * 2
    for given, message in (
        ({"attention_mask": (ids > 9).long()}, "`attention_mask` must be None or all ones"),
        ({"position_ids": far}, "`position_ids` must go up by one, or restart .* got 0 then 2"),
        ({"logits_to_keep": 1}, "`logits_to_keep` must be 0"),
        ({"past_key_values": object()}, "`past_key_values` cannot be split over ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, **given)
    with pytest.raises(ValueError, match="`spattention_shards` must reach the attention layers"):
        model.model(ids)
    with pytest.raises(ValueError, match="`layout` must be one of"):
        hf.context_parallel(model, dist.group.WORLD, layout="striped")
    with pytest.raises(ValueError, match=r"pattern in every attention layer .* none in layer 1"):
        hf.context_parallel(tiny.banded("llama", (tiny.FIRST, None)), dist.group.WORLD)
    with pytest.raises(ValueError, match="`mesh` must be a one-dimensional DeviceMesh"):
        hf.context_parallel(model, 2)
    plain = hf.context_parallel(model, None)
    assert plain(ids).logits.shape[1] == ids.shape[1]


def train(model, rows: torch.Tensor, parallel: bool) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        part = rows[step % len(rows)][None]
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        if parallel:
            average(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def curve() -> None:
    """Losses of 200 steps in float32, of an odd number of tokens."""
    bands = BandPattern.shared_local(tiny.HEADS, tiny.SPAN, widths="geometric", local=4)
    models = whole_and_parallel("llama", pattern=bands)
    rows = tiny.tokens(4, 49, seed=3)
    found = [train(m.float().train(), rows, m is models[1]) for m in models]
    assert found[0][-1] < 0.5 * found[0][0], "the model must learn something"
    difference = max(abs(a - b) for a, b in zip(*found))
    assert difference < 1e-4, difference


def main() -> None:
    dist.init_process_group("gloo")
    ids = tiny.tokens(2, 23)
    labels = ids.masked_fill(tiny.tokens(2, 23, seed=1) % 5 == 0, -100)
    positions = torch.stack([torch.cat([torch.arange(9), torch.arange(14)]), torch.arange(23)])
    plain = {"input_ids": ids, "labels": labels}
    two = dist.get_world_size() == 2  # the rest does not depend on the number
    for family in ("llama", "qwen3", "olmoe") if two else ("llama",):
        equal(family, plain)
        equal(family, plain | {"attention_mask": torch.ones_like(ids)}, sinks=True)
        equal(family, plain | {"position_ids": positions})
    equal("llama", plain | {"position_ids": positions}, checkpoint=True)
    if two:
        chunked(plain)
        refused(whole_and_parallel("llama")[1], plain)
        curve()
    if dist.get_rank() == 0:
        print(f"context parallelism of {dist.get_world_size()} ranks equals one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
