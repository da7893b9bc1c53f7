"""Tensor-parallel models beside one process; run by torchrun with a folder that both may use."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from spattention import BandPattern, hf

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
import tiny

CLOSE = {"rtol": 0.0, "atol": 1e-10}
# Dealing moves heads: the first two have most of the work.
UNEQUAL = BandPattern((((0, 24),), ((0, 20),), ((0, 5), (9, 15)), ((0, 2),)), tiny.SPAN)
GROUPS = {"num_key_value_heads": 4}


def saved(folder: Path, model) -> Path:
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def load(folder: Path, tp_plan: str | None = "auto"):
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(
        folder, tp_plan=tp_plan, dtype=torch.float64, experts_implementation="eager"
    ).eval()


def generated(model, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    cache = hf.BandCache(model.config)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits[:, -1:]
        second = model(first.argmax(-1), past_key_values=cache).logits
    return torch.cat([first, second], dim=1), cache.nbytes


def check(family: str, folder: Path) -> None:
    over = GROUPS if family != "olmoe" else {}
    pattern = (UNEQUAL, tiny.SECOND)
    ids, ranks = tiny.tokens(1, 31), dist.get_world_size()
    one = tiny.banded(family, pattern, sinks=True, **over)
    with torch.no_grad():
        for module in one.modules():
            if isinstance(getattr(module, "sinks", None), torch.Tensor):
                module.sinks.copy_(torch.arange(tiny.HEADS) / 2)
    before = load(saved(folder / f"{family}-bands", one))
    one = load(folder / f"{family}-bands", None)
    wanted, (steps, whole_bytes) = tiny.logits(one, ids), generated(one, ids)
    stock = load(saved(folder / f"{family}-stock", tiny.build(family, **over)))
    after = hf.apply(stock, pattern)
    plain = hf.apply(load(folder / f"{family}-stock", None), pattern)
    dealt = hf.deal(load(folder / f"{family}-bands"), ranks)
    if ranks == 2:
        assert dealt.model.layers[0].self_attn.spattention_order == (0, 3, 1, 2)
    # OLMoE has norms over all heads, in float32: another order of heads rounds otherwise.
    close = CLOSE if family != "olmoe" else {"rtol": 0.0, "atol": 2e-5}
    pairs = ((before, wanted), (dealt, wanted), (after, tiny.logits(plain, ids)))
    for model, expected in pairs:
        torch.testing.assert_close(tiny.logits(model, ids), expected, **close)
    for model in (before, dealt):
        found, size = generated(model, ids)
        torch.testing.assert_close(found, steps, **close)
        if family != "olmoe":  # which gathers its heads, because of norms over all of them
            total = torch.tensor(size)
            dist.all_reduce(total)
            assert size < whole_bytes
            assert total <= whole_bytes * 1.05, (total, whole_bytes)
        gradients(copy.deepcopy(one), model, ids)
    # What is saved has the natural order.
    dealt.save_pretrained(folder / f"{family}-again-{dist.get_rank()}")
    dist.barrier()
    again = load(folder / f"{family}-again-0", None)
    assert again.config.spattention == one.config.spattention
    torch.testing.assert_close(tiny.logits(again, ids), wanted, **close)


def gradients(one, model, ids: torch.Tensor) -> None:
    """Gradients of the sinks, of which each rank attends with its part."""
    for each in (one, model):
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    pairs = zip(one.named_parameters(), model.named_parameters())
    order = getattr(model.model.layers[0].self_attn, "spattention_order", None)
    for (name, wanted), (_, found) in pairs:
        if name.endswith("sinks") and order is None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=0.0, atol=1e-7, msg=name)
    model.zero_grad()


def main() -> None:
    dist.init_process_group("gloo")
    hf.register()
    folder = Path(sys.argv[1])
    for family in ("llama", "qwen3", "olmoe"):
        check(family, folder)
    if dist.get_rank() == 0:
        print(f"tensor parallelism of {dist.get_world_size()} ranks equals one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
