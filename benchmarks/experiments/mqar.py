"""Associative recall at full context: two layers of width 512 learn multi-query associative recall
(Arora et al., 2023, arXiv:2312.04927) over 2,048 or 8,192 tokens, on a GPU.

    python -m benchmarks.experiments.mqar mqar-2048 --jobs 4

The task is that of `trained_recall.py`. Training starts with sequences of 8 keys, 32 tokens, and
doubles them whenever the model has learned its length (`LEARNED`), at the latest after the
setting's `patience`. The first of these lengths takes longest, since the vocabulary is learned
there. It lies within a window of 32 tokens, so that bands with such a window are dense attention
there. Hence the variants of a setting with `start_steps` all start from the same weights, those of
dense attention that has learned this length.

Most variants differ from geometric bands in one thing, so that each says what that thing is worth.
An entry is written with every evaluation; what is finished is not made again. A run that finds
`SOLVED` of the values ends there.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)

from spattention.choice import STOCK
from spattention.evaluation.perplexity import Mean
from spattention.files import write_atomically
from spattention.provenance import machine, source_commit, versions
from spattention.training.layers import recipe_attention

from .ledger import HERE
from .trained_recall import FORMAT, HELD_OUT, SINKS, answers, entry_path

Row = dict[str, Any]
LIBRARIES = ("torch", "transformers", "triton")
FIRST = 8  # keys of the first sequences
LEARNED = 0.5  # nats per value, mean of the last `WINDOW` steps
WINDOW = 10
STARTED = 0.1  # nats per value, at which the shared start ends
SOLVED = 0.999
THEN = " then "  # between the attention of layers
BANDS = "shared_local:widths=geometric,local=32"


@dataclass(frozen=True)
class Setting:
    """An experiment; its name is the folder of its entries.

    Attributes:
        count: keys of the longest sequences, which have four times that number of tokens.
        tokens: of a step.
        duplicated: every head's intervals of the row whose heads all have one band, with the pairs
            of `BANDS`.
        window: of the sliding window with as many pairs.
        patience: share of the steps after which sequences have their full length.
        start_steps: most steps of the start that all variants share; 0 for none.
        variants: those that are run; without it all of `attention`.
    """

    count: int
    duplicated: str
    window: int
    tokens: int = 32_768
    steps: int = 1_500
    patience: float = 0.5
    start_steps: int = 4_000
    variants: tuple[str, ...] = ()
    width: int = 512
    layers: int = 2
    heads: int = 8
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    evaluate_every: int = 150
    items: int = 64

    @property
    def length(self) -> int:
        """Tokens of the longest sequences; also the entries of the vocabulary."""
        return 4 * self.count

    def attention(self) -> tuple[str, ...]:
        """The variants, in the order in which they are worth running."""
        return self.variants or (
            "dense",
            BANDS,
            f"intervals:heads={self.duplicated}",  # coverage: every head the same band
            "shared_local:local=32",  # uniform widths
            f"sliding_window:window=128{THEN}dense{SINKS}",  # practice's mix, one layer of each
            f"{BANDS}{THEN}dense",
            f"{BANDS},prefix=4{THEN}dense{SINKS}",  # bands in practice's place
            f"{BANDS},prefix=4",
            f"{BANDS}{SINKS}",
            f"{BANDS},prefix=4{SINKS}",
            f"{BANDS},kv_heads=4",  # each band in two heads
            f"sliding_window:window={self.window}",
            "exclusive:widths=geometric",  # no window
            "exclusive",
        )


SETTINGS = {
    "mqar-2048": Setting(512, "0-32+256-404", 162),
    "mqar-8192": Setting(2048, "0-32+1024-1630", 559),
    # Each variant from fresh weights: most of the steps go to the vocabulary.
    "mqar-2048-fresh": Setting(
        512,
        "0-32+256-404",
        162,
        steps=2_500,
        patience=0.6,
        start_steps=0,
        variants=("dense", BANDS),
        warmup=200,
        evaluate_every=250,
    ),
}


@dataclass(frozen=True)
class Options:
    """Train every variant with every seed, and ask each model.

    Args:
        setting: Name of the experiment.
        attention: Variants, as `spattention compare` names them; all of the setting's without it.
        seeds: Of weights and questions.
        jobs: Runs at a time, which share the GPU.
        steps: Steps, instead of the setting's.
        work: Folder of the weights that variants start from.
        ledger: Folder of the entries' folder.
        commit: The commit to record, where git cannot tell.
    """

    setting: tyro.conf.Positional[str]
    attention: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1
    steps: int | None = None
    work: Path = Path("runs/mqar")
    ledger: Path = HERE
    commit: str | None = None


def main(options: Options) -> None:
    """Make the runs that are missing."""
    if options.setting not in SETTINGS:
        raise ValueError(f"`setting` must be one of {list(SETTINGS)}, got {options.setting!r}")
    setting = SETTINGS[options.setting]
    if options.steps is not None:
        setting = Setting(**{**asdict(setting), "steps": options.steps})
    todo = [
        (name, seed)
        for seed in options.seeds
        for name in options.attention or setting.attention()
        if not is_finished(entry_path(options.ledger, name, seed, options.setting))
    ]
    commit = options.commit or source_commit()
    starts = {
        seed: options.work / f"{options.setting}-seed{seed}.pt" if setting.start_steps else None
        for seed in {seed for _, seed in todo}
    }
    for seed, path in starts.items():
        if path is not None and not path.exists():
            start(setting, seed, path)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        runs = {
            pool.submit(
                run, setting, name, seed, write_to(options, name, seed), commit, starts[seed]
            ): name
            for name, seed in todo
        }
        for done in as_completed(runs):
            entry = done.result()
            print(f"{runs[done]}: accuracy {entry['accuracy']['mean']:.3f}", flush=True)


@dataclass(frozen=True)
class write_to:
    """Writes an entry where it belongs, atomically; also says how far its run has come."""

    options: Options
    name: str
    seed: int

    @property
    def command(self) -> str:
        """What makes this run anywhere."""
        made = ["python", "-m", "benchmarks.experiments.mqar", self.options.setting]
        made += ["--attention", self.name, "--seeds", str(self.seed)]
        if self.options.steps is not None:
            made += ["--steps", str(self.options.steps)]
        return shlex.join(made)

    def __call__(self, entry: Row) -> None:
        folder = self.options.setting
        path = entry_path(self.options.ledger, self.name, self.seed, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = entry | {"command": self.command}
        write_atomically(path, json.dumps(content, indent=1) + "\n")
        print(
            f"{folder}/{path.stem}: step {entry['step']}, {entry['seconds']:.0f} s, loss "
            f"{entry['loss'][-1]['loss']:.3f}, accuracy {entry['accuracy']['mean']:.3f}",
            flush=True,
        )


def is_finished(path: Path) -> bool:
    """True if an entry is there and its run came to its end."""
    if not path.exists():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


def build(setting: Setting, name: str, seed: int, device: torch.device) -> tuple[Any, Any]:
    """A fresh model with its attention, and the attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=setting.length,
        hidden_size=setting.width,
        intermediate_size=2 * setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        max_position_embeddings=setting.length,
    )
    model = LlamaForCausalLM(config)
    layers = name.removesuffix(SINKS).split(THEN)
    attention = recipe_attention(
        layers if len(layers) > 1 else layers[0],
        setting.layers,
        setting.heads,
        setting.length,
        sinks=name.endswith(SINKS),
    )
    attention.apply(model)
    return model.to(device), attention


class Training:
    """A model in training: its optimizer, its questions, and the length that it has come to.

    Args:
        setting: of the experiment.
        name: of the attention.
        seed: of weights and questions.
        count: keys of the first sequences.
    """

    def __init__(self, setting: Setting, name: str, seed: int, count: int) -> None:
        self.setting, self.count = setting, min(count, setting.count)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        self.model, self.attention = build(setting, name, seed, self.device)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        plain = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": setting.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=setting.learning_rate,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        # Variants draw other questions than the start that they share.
        self.generator = torch.Generator(self.device).manual_seed(seed * HELD_OUT + self.count)

    @torch.no_grad()
    def take(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the model these weights; sinks, which dense attention lacks, stay at zero."""
        own = dict(self.model.named_parameters())
        for name, weight in weights.items():
            own.pop(name).copy_(weight)
        if others := [name for name in own if not name.endswith("sinks")]:
            raise RuntimeError(f"the start must have all weights but sinks, it lacks {others}")

    def step(self) -> torch.Tensor:
        """Make a step; its loss, on the device."""
        count = self.count
        ids = questions(self.setting, count, self.setting.tokens // (4 * count), self.generator)
        self.model.train()
        loss = F.cross_entropy(
            _logits(self.model, ids, count).float().flatten(0, 1),
            ids[:, 2 * count + 1 :: 2].flatten(),
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def start(setting: Setting, seed: int, path: Path) -> None:
    """Train dense attention on the shortest sequences until it has learned them; keep its weights.

    Raises:
        RuntimeError: if it has not learned them in `start_steps`.
    """
    began = time.monotonic()
    training = Training(setting, STOCK, seed, FIRST)
    schedule = get_constant_schedule_with_warmup(training.optimizer, 2 * setting.warmup)
    recent: list[torch.Tensor] = []
    for step in range(setting.start_steps):
        recent.append(training.step())
        schedule.step()
        if (step + 1) % WINDOW == 0:
            loss = torch.stack(recent[-WINDOW:]).mean().item()
            if (step + 1) % 100 == 0 or loss < STARTED:
                print(f"start, step {step + 1}: loss {loss:.3f}", flush=True)
            if loss < STARTED:
                path.parent.mkdir(parents=True, exist_ok=True)
                content = {
                    "weights": {k: v.cpu() for k, v in training.model.named_parameters()},
                    "facts": {
                        "steps": step + 1,
                        "loss": loss,
                        "seconds": time.monotonic() - began,
                    },
                }
                torch.save(content, path)
                return
    raise RuntimeError(f"the start has not learned {FIRST} keys in {setting.start_steps} steps")


def run(
    setting: Setting,
    name: str,
    seed: int,
    write: Callable[[Row], None],
    commit: str | None,
    begin: Path | None = None,
) -> Row:
    """Train a model and ask it.

    Args:
        setting: of the experiment.
        name: of the attention.
        seed: of weights and questions.
        write: called with the entry at every evaluation.
        commit: to record.
        begin: file of `start`, from whose weights the model is trained; None for fresh ones.

    Returns:
        The entry.
    """
    began = time.monotonic()
    training = Training(setting, name, seed, FIRST if begin is None else 2 * FIRST)
    shared = None
    if begin is not None:
        content = torch.load(begin, weights_only=True)
        shared = content["facts"]
        training.take(content["weights"])
    schedule = get_cosine_schedule_with_warmup(training.optimizer, setting.warmup, setting.steps)
    entry = _entry(setting, name, seed, training) | {"commit": commit, "start": shared}
    losses: list[torch.Tensor] = []
    recent: list[torch.Tensor] = []
    for step in range(setting.steps):
        if training.count < setting.count and has_grown(recent, step, setting):
            longer = (
                setting.count if step >= setting.patience * setting.steps else 2 * training.count
            )
            training.count, recent = min(longer, setting.count), []
            entry["grown"].append({"step": step, "count": training.count})
        losses.append(training.step())
        recent.append(losses[-1])
        schedule.step()
        last = step + 1 == setting.steps
        if last or (step + 1) % setting.evaluate_every == 0:
            right, distances = ask(training.model, setting, training.device)
            accuracy = Mean.of(right.double().mean(1))
            entry["loss"].append({"step": step + 1, "loss": torch.stack(losses).mean().item()})
            entry["accuracies"].append({"step": step + 1, "accuracy": accuracy.mean})
            losses.clear()
            solved = accuracy.mean >= SOLVED
            entry |= {
                "step": step + 1,
                "finished": last or solved,
                "seconds": time.monotonic() - began,
                "accuracy": asdict(accuracy),
                "by_distance": by_octave(right, distances),
            }
            write(entry)
            if solved:
                break
    return entry


def _entry(setting: Setting, name: str, seed: int, training: Training) -> Row:
    """What is known of a run when it begins."""
    everything = setting.heads * setting.length * (setting.length + 1) // 2
    return {
        "format": FORMAT,
        "version": 1,
        "attention": name,
        "seed": seed,
        "count": setting.count,
        "steps": setting.steps,
        "chance": 1 / setting.count,
        "pairs": training.attention.pairs(setting.length) / everything,
        "loss": [],
        "accuracies": [],
        "grown": [],
        "model": {
            "layers": setting.layers,
            "heads": setting.heads,
            "head_dim": setting.width // setting.heads,
            "width": setting.width,
        },
        "training": {
            "batch": setting.tokens // setting.length,
            "learning_rate": setting.learning_rate,
            "warmup": setting.warmup,
            "curriculum": [FIRST, LEARNED, WINDOW, setting.patience],
        },
        "machine": machine(),
        "versions": versions(LIBRARIES),
        "gpu": torch.cuda.get_device_name() if training.device.type == "cuda" else None,
    }


def has_grown(recent: Sequence[torch.Tensor], step: int, setting: Setting) -> bool:
    """True if the next step takes longer sequences."""
    if step >= setting.patience * setting.steps:
        return True
    # A look at the loss waits for the device.
    if len(recent) < WINDOW or len(recent) % WINDOW:
        return False
    return torch.stack(list(recent[-WINDOW:])).mean().item() < LEARNED


def questions(setting: Setting, count: int, items: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences as `spattention.evaluation.recall.pairs` makes them, int64 `[items, 4 * count]`,
    drawn on the generator's device.
    """
    device = generator.device
    draw = {"device": device, "generator": generator}
    order = torch.rand(items, setting.length, **draw).argsort(dim=1)  # type: ignore[call-overload]
    drawn = order[:, : 2 * count].view(items, count, 2)
    again = torch.rand(items, count, **draw).argsort(dim=1)  # type: ignore[call-overload]
    second = drawn.gather(1, again[:, :, None].expand(-1, -1, 2))
    return torch.cat([drawn.flatten(1), second.flatten(1)], dim=1)


def _logits(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Logits `[items, count, vocabulary]` of the values: at the keys, the second time."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, 2 * count :: 2])


@torch.no_grad()
def ask(model: Any, setting: Setting, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`(right, distances)`, both `[items, count]`, of sequences that no run is trained on."""
    model.eval()
    generator = torch.Generator().manual_seed(HELD_OUT)
    asked = questions(setting, setting.count, setting.items, generator)
    batch = max(1, setting.tokens // setting.length)
    guess = torch.cat(
        [
            _logits(model, ids.to(device), setting.count).argmax(-1).cpu()
            for ids in asked.split(batch)
        ]
    )
    wanted, distances = answers(asked)
    return guess == wanted, distances


def by_octave(right: torch.Tensor, distances: torch.Tensor) -> list[dict[str, float]]:
    """Accuracy by distance, in bins of half an octave; `distance` is where a bin starts."""
    edges: Sequence[int] = sorted({round(2 ** (k / 2)) for k in range(64)})
    found = []
    for near, far in zip(edges, edges[1:]):
        hits = right[(distances >= near) & (distances < far)]
        if hits.numel():
            found.append(
                {"distance": near, "accuracy": hits.double().mean().item(), "asked": hits.numel()}
            )
    return found


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
