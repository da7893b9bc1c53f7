"""Transformers' Trainer and Accelerate around a context-parallel model; run by torchrun."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader

from spattention import hf

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
import tiny

STEPS = 3


class SameRows(transformers.Trainer):
    """Every rank trains on the same rows, which `context_parallel` splits."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)


def one_process(model, rows) -> list[float]:
    """The losses of as many steps of Trainer's optimizer, without Trainer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        part = rows[2 * step : 2 * step + 2]
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    one = tiny.banded("llama").float().train()
    model = hf.context_parallel(copy.deepcopy(one), dist.group.WORLD)
    rows = tiny.tokens(2 * STEPS, 21)
    wanted = one_process(one, rows)
    arguments = transformers.TrainingArguments(
        sys.argv[1],
        max_steps=STEPS,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = SameRows(model, arguments, train_dataset=data)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS
    for ours, theirs in zip(found, wanted):
        assert abs(ours - theirs) < 1e-3, (found, wanted)  # Trainer rounds to four digits
    if dist.get_rank() == 0:
        print("Trainer's losses are those of one process")
    dist.destroy_process_group()  # a rank that leaves threads of gloo behind may abort


if __name__ == "__main__":
    main()
