"""Convert a dense model to bands, and fine-tune it with Transformers' Trainer.

python examples/finetune_trainer.py        # a CPU, under a minute
"""

from __future__ import annotations

import tempfile

import small
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import spattention as spa


def train(
    model: PreTrainedModel, examples: list[dict[str, list[int]]], steps: int, folder: str
) -> None:
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=steps // 10,
        lr_scheduler_type="cosine",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=examples).train()


def main(steps: int = 120) -> dict[str, float]:
    examples = small.rows(400)
    held_out, training = examples[::20], [row for k, row in enumerate(examples) if k % 20]
    with tempfile.TemporaryDirectory() as folder:
        model = small.dense_model()
        train(model, training, steps, folder)  # a pretrained model has this behind it
        losses = {"dense": small.loss(model, held_out)}

        # One call, before the optimizer is made: a local window for every head, and its own band.
        pattern = spa.BandPattern.shared_local(
            small.HEADS, small.CONTEXT, widths="geometric", local=16
        )
        spa.hf.apply(model, pattern)
        losses["converted"] = small.loss(model, held_out)
        train(model, training, steps // 2, folder)
        losses["fine-tuned"] = small.loss(model, held_out)

        # The bands travel with the folder.
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        losses["opened again"] = small.loss(again, held_out)

    dense_pairs = small.HEADS * small.CONTEXT * (small.CONTEXT + 1) // 2
    share = sum(pattern.pairs(small.CONTEXT)) / dense_pairs
    print(f"{share:.2f} of dense attention's pairs; loss in nats per byte:")
    for name, value in losses.items():
        print(f"  {name:12} {value:.3f}")
    return losses


if __name__ == "__main__":
    main()
