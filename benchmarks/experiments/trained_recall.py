"""Recall that models are trained for: small transformers learn multi-query associative recall
(Arora et al., 2023, arXiv:2312.04927) with dense attention and with bands.

    python -m benchmarks.experiments.trained_recall --jobs 2

A sequence is `k1 v1 k2 v2 ...` and then the keys again in another order, each with its value, which
is asked for: the questions of `spattention evaluate`, here fresh ones in every step. The language
models of the plans are near chance on them; here dense attention answers most, so that what a mask
cannot do, or learns late, is seen. Runs on a CPU; what is in the ledger is not made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from rich.progress import Progress
from torch.utils.data import IterableDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from spattention.evaluation.perplexity import Mean
from spattention.evaluation.recall import Question, pairs
from spattention.files import write_atomically
from spattention.provenance import machine, source_commit
from spattention.training.layers import recipe_attention

from .ledger import HERE

FORMAT = "spattention-trained-recall"
ENTRIES = "trained-recall"  # folder of the ledger
HEADS, HEAD_DIM, WIDTH, LAYERS = 8, 32, 128, 2
BATCH, LEARNING_RATE, WARMUP, LOG_EVERY = 64, 2e-3, 100, 25
ITEMS, HELD_OUT = 512, 1_000_000  # sequences that a model is asked, and their seed
SINKS = " with sinks"


@dataclass(frozen=True)
class Options:
    """Train every attention with every seed, and ask each model.

    Args:
        attention: as `spattention compare` names them; `with sinks` behind a pattern adds sinks.
        seeds: Of weights and questions.
        count: Keys of a sequence, which has four times as many tokens.
        steps: Steps of 64 sequences.
        jobs: Runs at a time, which share the CPU's cores.
        ledger: Folder of the entries' folder.
        commit: The commit to record, where git cannot tell.
    """

    attention: tuple[str, ...] = (
        "dense",
        "shared_local",
        "shared_local:widths=geometric,local=9",  # of this span, the default would be dense
        "shared_local:widths=geometric,local=9,kv_heads=4",  # each band in two heads
        "exclusive:widths=geometric with sinks",
        "exclusive:widths=geometric",
        "exclusive with sinks",
        "exclusive",
        "sliding_window:window=16",
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    count: int = 16
    steps: int = 1000
    jobs: int = 1
    ledger: Path = HERE
    commit: str | None = None


class Questions(IterableDataset[dict[str, torch.Tensor]]):
    """Sequences without end, other ones for every seed; only what is asked has a label."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        number = 0
        while True:
            question = pairs(4 * self.count, self.count, BATCH, self.seed * HELD_OUT + number)
            number += 1
            for ids, asked in zip(question.ids, question.asked):
                yield {"input_ids": ids, "labels": ids.masked_fill(~asked, -100)}


def main(options: Options) -> None:
    """Make the runs that are missing."""
    todo = [
        (name, seed)
        for seed in options.seeds
        for name in options.attention
        if not entry_path(options.ledger, name, seed).exists()
    ]
    with (
        Progress() as progress,
        ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool,
    ):
        bar = progress.add_task("runs", total=len(todo))
        runs = {pool.submit(run, options, name, seed): (name, seed) for name, seed in todo}
        for done in as_completed(runs):
            name, seed = runs[done]
            entry = done.result()
            path = entry_path(options.ledger, name, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(entry, indent=1) + "\n")
            progress.console.print(f"{name}, seed {seed}: accuracy {entry['accuracy']['mean']:.3f}")
            progress.advance(bar)


def entry_path(ledger: Path, attention: str, seed: int, folder: str = ENTRIES) -> Path:
    """Where the entry of a run lies."""
    name = "".join(c if c.isalnum() or c == "_" else "-" for c in attention)
    return ledger / folder / f"{name}-seed{seed}.json"


def run(options: Options, name: str, seed: int) -> dict[str, Any]:
    """Train a model and ask it; its entry."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4 * options.count,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=4 * options.count,
        )
    )
    attention = recipe_attention(
        name.removesuffix(SINKS), LAYERS, HEADS, 4 * options.count, sinks=name.endswith(SINKS)
    )
    attention.apply(model)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = Trainer(model, arguments, train_dataset=Questions(options.count, seed))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    question = pairs(4 * options.count, options.count, ITEMS, HELD_OUT - 1)
    right, distances = ask(model, question)
    everything = 4 * options.count * (4 * options.count + 1) // 2 * HEADS
    return {
        "format": FORMAT,
        "version": 1,
        "attention": name,
        "seed": seed,
        "count": options.count,
        "steps": options.steps,
        "accuracy": asdict(Mean.of(right.double().mean(1))),
        "chance": question.chance,
        "pairs": attention.pairs(4 * options.count) / everything,
        "by_distance": by_distance(right, distances),
        "loss": [
            {"step": line["step"], "loss": line["loss"]}
            for line in trainer.state.log_history
            if "loss" in line
        ],
        "model": {"layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM, "width": WIDTH},
        "training": {"batch": BATCH, "learning_rate": LEARNING_RATE, "warmup": WARMUP},
        "commit": options.commit or source_commit(),
        "machine": machine(),
    }


@torch.no_grad()
def ask(model: LlamaForCausalLM, question: Question) -> tuple[torch.Tensor, torch.Tensor]:
    """`(right, distances)`, both `[items, count]`: whether each value is predicted, and how far
    before the token that predicts it the value stands.
    """
    model.eval()
    ids = question.ids
    count = ids.shape[1] // 4
    guess = torch.cat([model(input_ids=each).logits.argmax(-1) for each in ids.split(BATCH)])
    asked = torch.arange(2 * count, 4 * count, 2)
    values, distances = answers(ids)
    return guess[:, asked] == values, distances


def answers(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(values, distances)`, both `[items, count]`: what follows each key the second time, and how
    far before that key the value stands; of sequences `[items, 4 * count]`.
    """
    count = ids.shape[1] // 4
    asked = torch.arange(2 * count, 4 * count, 2)  # the keys, the second time
    places = torch.full((ids.shape[0], int(ids.max()) + 1), 2 * count)
    first = torch.arange(0, 2 * count, 2).expand(ids.shape[0], -1)
    places.scatter_reduce_(1, ids[:, : 2 * count : 2], first, "amin")
    return ids[:, asked + 1], asked - (places.gather(1, ids[:, asked]) + 1)


def by_distance(right: torch.Tensor, distances: torch.Tensor) -> list[dict[str, float]]:
    """Accuracy for every distance that occurs."""
    found = []
    for distance in sorted(set(distances.flatten().tolist())):
        hits = right[distances == distance]
        found.append(
            {"distance": distance, "accuracy": hits.double().mean().item(), "asked": hits.numel()}
        )
    return found


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
