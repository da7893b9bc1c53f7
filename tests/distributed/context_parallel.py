"""Models under `hf.context_parallel` beside one that has whole rows; run by torchrun."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from spattention import BandPattern, hf
from spattention.parallel import Shards

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
    for family in ("llama", "qwen3", "olmoe"):
        equal(family, plain)
        equal(family, plain | {"attention_mask": torch.ones_like(ids)}, sinks=True)
        equal(family, plain | {"position_ids": positions})
    equal("llama", plain | {"position_ids": positions}, checkpoint=True)
    curve()
    if dist.get_rank() == 0:
        print(f"context parallelism of {dist.get_world_size()} ranks equals one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
