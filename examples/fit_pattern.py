"""Measure what the heads of a dense model attend, and fit bands to it.

python examples/fit_pattern.py             # a CPU, under a minute
"""

from __future__ import annotations

import tempfile

import small
import torch
from finetune_trainer import train

import spattention as spa


def main(steps: int = 120) -> dict[str, float]:
    examples = small.rows(400)
    held_out, profiled, training = examples[:20], examples[20:28], examples[28:]
    model = small.dense_model()
    with tempfile.TemporaryDirectory() as folder:
        train(model, training, steps, folder)  # a pretrained model has this behind it
    losses = {"dense": small.loss(model, held_out)}

    batches = [torch.tensor([row["input_ids"]]) for row in profiled]
    profile = spa.hf.profile(model, batches, progress=False)
    patterns = spa.fit(profile, pairs=0.3)  # one pattern a layer, .3 of dense attention's pairs
    for layer, pattern in enumerate(patterns):
        print(f"layer {layer}: {pattern.intervals}")

    spa.hf.apply(model, patterns)
    losses["fitted"] = small.loss(model, held_out)

    # The same number of pairs without a look at the model: one window for all heads.
    window = next(
        w
        for w in range(small.CONTEXT, 0, -1)
        if sum(spa.BandPattern.sliding_window(1, small.CONTEXT, w).pairs(small.CONTEXT))
        <= 0.3 * small.CONTEXT * (small.CONTEXT + 1) / 2
    )
    spa.hf.apply(model, spa.BandPattern.sliding_window(small.HEADS, small.CONTEXT, window))
    losses["window"] = small.loss(model, held_out)
    print("loss in nats per byte before any training:")
    for name, value in losses.items():
        print(f"  {name:8} {value:.3f}")
    return losses


if __name__ == "__main__":
    main()
