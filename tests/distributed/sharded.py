"""Two processes that shard a prepared model by hand, in the units that Accelerate makes, and train
it beside a whole one. Run by torchrun; fails if they differ.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from spattention.models import build, preset
from spattention.training.precision import sharded_precision
from spattention.training.pretrain import prepare_model
from spattention.training.recipe import recipe_from

WINDOWS, CONTEXT = 4, 32


def check(precision: str) -> None:
    """Three steps of both."""
    torch.manual_seed(0)
    recipe = recipe_from(
        {
            "model": "olmoe-tiny",
            "data": "random tokens",
            "context": CONTEXT,
            "steps": 3,
            "batch": WINDOWS,
            "learning_rate": 1e-2,
            "precision": precision,
            "parallel": "fsdp2",
            "loss": "chunked",
        }
    )
    whole = build(preset("olmoe-tiny", vocab_size=97, context=CONTEXT, num_layers=2))
    sharded = copy.deepcopy(whole)
    # The whole model makes a pass for each process, the sharded one a pass on each.
    whole_recipe = recipe_from(recipe.to_dict() | {"precision": "float32"})
    prepare_model(whole_recipe, whole, 2, torch.device("cpu"))
    assert prepare_model(recipe, sharded, 1, torch.device("cpu"), devices=2) is None
    low = precision == "bfloat16"
    policy = sharded_precision(precision)
    for layer in sharded.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(sharded.model.embed_tokens, mp_policy=policy)
    tail = [sharded.model.norm, sharded.lm_head]
    fully_shard(tail, mp_policy=policy, reshard_after_forward=False)
    fully_shard(sharded, mp_policy=policy)
    seen = set()
    sharded.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, arguments: seen.update((module.gate_up_proj.dtype, arguments[0].dtype))
    )
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=recipe.learning_rate) for m in (whole, sharded)
    ]
    items = torch.tensor(WINDOWS * (CONTEXT - 1))
    tolerance = 0.05 if low else 1e-5
    for step in range(3):
        tokens = torch.randint(
            97, (WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(step)
        )
        parts = tokens.chunk(2)
        expected = torch.zeros(())
        for part in parts:
            loss = loss_of(whole, part, items)
            loss.backward()
            expected += loss.detach()
        # Gradients are averaged over the processes, so each takes twice its share, as the Trainer.
        mine = 2 * loss_of(sharded, parts[dist.get_rank()], items)
        mine.backward()
        found = mine.detach().float()
        dist.all_reduce(found)
        torch.testing.assert_close(found / 2, expected, atol=tolerance, rtol=tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert seen == {torch.bfloat16 if low else torch.float32}, seen
    weights = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert parameter.dtype == torch.float32, "weights stay in float32"
        if not low:
            full = parameter.full_tensor()
            torch.testing.assert_close(full, weights[name], atol=1e-4, rtol=1e-3, msg=name)


def loss_of(model: torch.nn.Module, tokens: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    model.train()
    return model(input_ids=tokens, labels=tokens, use_cache=False, num_items_in_batch=items).loss


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for precision in ("float32", "bfloat16"):
        check(precision)
    dist.destroy_process_group()
