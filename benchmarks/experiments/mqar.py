"""Associative recall at full context: two layers of width 512 learn multi-query associative recall
(Arora et al., 2023, arXiv:2312.04927) over 2,048 or 8,192 tokens, on a GPU.

    python -m benchmarks.experiments.mqar mqar-2048 --jobs 3

The task is that of `trained_recall.py`. Training starts with short sequences, which are learned
first, and doubles them whenever the model has learned its length (`LEARNED`), at the latest after
`PATIENCE` of the steps: a model that learns a length sooner has more steps for the longest one.
Most variants differ from geometric bands in one thing, so that each says what that thing is worth.
An entry is written with every evaluation; what is finished is not made again.
"""

from __future__ import annotations

import json
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
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

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
PATIENCE = 0.6  # share of the steps after which sequences have their full length
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
    """

    count: int
    duplicated: str
    window: int
    tokens: int = 32_768
    steps: int = 2_500
    width: int = 512
    layers: int = 2
    heads: int = 8
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.1
    evaluate_every: int = 250
    items: int = 64

    @property
    def length(self) -> int:
        """Tokens of the longest sequences; also the entries of the vocabulary."""
        return 4 * self.count

    def attention(self) -> tuple[str, ...]:
        """The variants, in the order in which they are worth running."""
        return (
            "dense",
            BANDS,
            f"intervals:heads={self.duplicated}",  # coverage: every head the same band
            "shared_local:local=32",  # uniform widths
            f"{BANDS},prefix=4",
            f"{BANDS}{SINKS}",
            f"{BANDS},kv_heads=4",  # each band in two heads
            f"sliding_window:window={self.window}",
            "exclusive:widths=geometric",  # no window
            "exclusive",
        )


SETTINGS = {
    "mqar-2048": Setting(512, "0-32+256-404", 162),
    "mqar-8192": Setting(2048, "0-32+1024-1630", 559),
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
        ledger: Folder of the entries' folder.
        commit: The commit to record, where git cannot tell.
    """

    setting: tyro.conf.Positional[str]
    attention: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1
    steps: int | None = None
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
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        runs = {
            pool.submit(run, setting, name, seed, write_to(options, name, seed), commit): name
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

    def __call__(self, entry: Row) -> None:
        folder = self.options.setting
        path = entry_path(self.options.ledger, self.name, self.seed, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(entry, indent=1) + "\n")
        print(
            f"{folder}/{path.stem}: step {entry['step']}, {entry['seconds']:.0f} s, loss "
            f"{entry['loss'][-1]['loss']:.3f}, accuracy {entry['accuracy']['mean']:.3f}",
            flush=True,
        )


def is_finished(path: Path) -> bool:
    """True if an entry is there and its run came to its end."""
    if not path.exists():
        return False
    entry = json.loads(path.read_text(encoding="utf-8"))
    return entry["step"] == entry["steps"]


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
    attention = recipe_attention(
        name.removesuffix(SINKS),
        setting.layers,
        setting.heads,
        setting.length,
        sinks=name.endswith(SINKS),
    )
    attention.apply(model)
    return model.to(device), attention


def run(
    setting: Setting, name: str, seed: int, write: Callable[[Row], None], commit: str | None
) -> Row:
    """Train a model and ask it; its entry, which `write` gets at every evaluation too."""
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    model, attention = build(setting, name, seed, device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": setting.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=setting.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, setting.warmup, setting.steps)
    everything = setting.heads * setting.length * (setting.length + 1) // 2
    entry: Row = {
        "format": FORMAT,
        "version": 1,
        "attention": name,
        "seed": seed,
        "count": setting.count,
        "steps": setting.steps,
        "chance": 1 / setting.count,
        "pairs": attention.pairs(setting.length) / everything,
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
            "curriculum": [FIRST, LEARNED, WINDOW, PATIENCE],
        },
        "commit": commit,
        "machine": machine(),
        "versions": versions(LIBRARIES),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
    }
    losses: list[torch.Tensor] = []
    generator = torch.Generator(device).manual_seed(seed)
    count, recent = min(FIRST, setting.count), []
    for step in range(setting.steps):
        if count < setting.count and has_grown(recent, step, setting):
            count, recent = min(2 * count, setting.count), []
            if step >= PATIENCE * setting.steps:
                count = setting.count
            entry["grown"].append({"step": step, "count": count})
        ids = questions(setting, count, setting.tokens // (4 * count), generator)
        model.train()
        loss = F.cross_entropy(
            _logits(model, ids, count).float().flatten(0, 1), ids[:, 2 * count + 1 :: 2].flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        recent.append(losses[-1])
        last = step + 1 == setting.steps
        if last or (step + 1) % setting.evaluate_every == 0:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            right, distances = ask(model, setting, device)
            accuracy = Mean.of(right.double().mean(1))
            entry["loss"].append({"step": step + 1, "loss": mean})
            entry["accuracies"].append({"step": step + 1, "accuracy": accuracy.mean})
            entry |= {
                "step": step + 1,
                "seconds": time.monotonic() - began,
                "accuracy": asdict(accuracy),
                "by_distance": by_octave(right, distances),
            }
            write(entry)
    return entry


def has_grown(recent: Sequence[torch.Tensor], step: int, setting: Setting) -> bool:
    """True if the next step takes longer sequences."""
    if step >= PATIENCE * setting.steps:
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
