"""Convert a pretrained dense model in many ways, train each, and measure all of them.

    python -m benchmarks.conversion --model MODEL --text TEXT --output results.json

A row is a way to convert the model, measured before any training and after each number of tokens;
every number of tokens is a run of its own, with its own decay of the learning rate. The results are
written, whole, after each measurement; a second call with the same settings continues where the
first stopped, also after it was killed. The profile is kept beside the results.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import spattention as spa
from spattention.bands import BandPattern
from spattention.benchmarking.results import environment, write_rows
from spattention.files import write_atomically
from spattention.fitting import Profile, captured, explain
from spattention.fitting.sinks import starting_sinks
from spattention.hf.needles import plant

from . import choices, flex
from .measure import PARTS, Sizes, measure
from .rows import ROWS, Budget, Row
from .text import Text, digests, read_text
from .train import Schedule, Teacher, to_bfloat16_weights, train, with_lora

MILLION = 1_000_000


@dataclass(frozen=True)
class Options:
    """Convert, train and measure a pretrained model.

    Args:
        model: folder of a dense model of Llama's kind, with its tokenizer.
        text: folder of tokens, see text.py.
        output: JSON of results; the profile and the patterns are written beside it.
        items: folder of zero-shot tasks as JSON lines; without it they are left out.
        rows: which rows; default all.
        tokens: numbers of training tokens in millions; 0 is before any training.
        untrained: which rows before any training, where they differ from `rows`.
        seeds: of the order of the text.
        attention: "bands" is the library's operator, "flex" FlexAttention with the same masks.
        pairs: budget of bands, as a share of dense attention's pairs.
        context: tokens of a window.
        profile_rows: windows to profile.
        sensitivity_rows: windows whose gradients are profiled.
        needles: passkeys to find heads that fetch with.
        needle_length: tokens of the rows that they are planted in; default those of a window.
        windows: held-out windows of each source.
        parts: what to measure.
        passkey_lengths: tokens per passkey's text.
        trials: passkeys per length and depth.
        ruler_lengths: tokens per prompt.
        ruler_items: prompts per length and task.
        task_items: questions per zero-shot task.
        speed_lengths: tokens of a text that is read at once; while decoding, of the longest.
        speed_rows: texts that are decoded together.
        batch: windows per step.
        micro_batch: windows at a time.
        rate: peak learning rate.
        lora_rate: peak learning rate of adapters.
        rank: of adapters.
        compile: compile the layers and the loss while training.
        profile: JSON of a profile to take instead of making one; made if it is not there.
        patterns: JSON of patterns, such as `fitted_*.json` of the results; the rows that it names
            at this context take theirs, and no other row is fitted.
        weights: folder for the weights of each trained run; what lies there is measured, not
            trained again, so that calls with other parts measure the same model.
        minutes: begin no further run after this time.
        commit: to record, where git cannot tell.
    """

    model: Path
    text: Path
    output: Path
    items: Path | None = None
    rows: tuple[str, ...] = tuple(ROWS)
    tokens: tuple[float, ...] = (0, 1, 3, 10)
    untrained: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    attention: Literal["bands", "flex"] = "bands"
    pairs: float = 0.35
    context: int = 2048
    profile_rows: int = 16
    sensitivity_rows: int = 16
    needles: int = 20
    needle_length: int | None = None
    windows: int = 128
    parts: tuple[str, ...] = ("loss", "passkeys", "tasks")
    passkey_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    trials: int = 20
    ruler_lengths: tuple[int, ...] = (2048,)
    ruler_items: int = 200
    task_items: int = 1000
    speed_lengths: tuple[int, ...] = (2048, 8192)
    speed_rows: int = 32
    batch: int = 16
    micro_batch: int = 8
    rate: float = 6e-4
    lora_rate: float = 1e-3
    rank: int = 16
    compile: bool = False
    profile: Path | None = None
    patterns: Path | None = None
    weights: Path | None = None
    minutes: float = 1e9
    commit: Annotated[str | None, tyro.conf.arg(metavar="COMMIT")] = None


FREE = (
    *("rows", "untrained", "tokens", "seeds", "minutes", "output", "commit", "model", "text"),
    *("items", "profile", "patterns", "weights"),
)


def main(options: Options) -> None:
    """Profile, then every run that is not there yet."""
    began = time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name, known in (("rows", tuple(ROWS)), ("untrained", tuple(ROWS)), ("parts", PARTS)):
        if unknown := sorted({*getattr(options, name)} - {*known}):
            raise SystemExit(f"`--{name}` must be of {list(known)}, got {unknown}")
    if {"speed", "memory"} & {*options.parts} and options.attention != "bands":
        raise SystemExit(
            f"`--attention` must be bands for speed and memory, got {options.attention}"
        )
    settings = {k: v for k, v in asdict(options).items() if k not in FREE}
    settings = json.loads(json.dumps(settings, default=str)) | {"text": digests(options.text)}
    results = _earlier(options.output, settings)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    longest = max(options.context, *options.passkey_lengths, *options.ruler_lengths)
    if "speed" in options.parts:
        longest = max(longest, *options.speed_lengths)
    text = read_text(options.text, options.context, longest, options.windows)
    profile = _profile(options, text, tokenizer)
    tasks = {}
    if "tasks" in options.parts and options.items is not None:
        tasks = choices.prepare(options.items, options.task_items, tokenizer)
    sizes = Sizes(
        options.parts, options.passkey_lengths, options.trials, options.ruler_lengths,
        options.ruler_items, tasks, options.speed_lengths, options.speed_rows,
    )  # fmt: skip
    for name, seed, tokens in _runs(options, results):
        if time.monotonic() - began > 60 * options.minutes:
            print("out of time; call again to continue", flush=True)
            return
        start = time.perf_counter()
        results.append(_run(options, profile, text, tokenizer, sizes, (name, seed, tokens)))
        results[-1]["total_seconds"] = time.perf_counter() - start
        where = environment() if torch.cuda.is_available() else {}
        write_rows(
            options.output, "conversion", settings, results, commit=options.commit,
            environment=where,
        )  # fmt: skip
        _say(results[-1])


def _runs(options: Options, results: list[dict[str, Any]]) -> Iterator[tuple[str, int, float]]:
    """Runs that are not there yet: those of few tokens first. The seed does not matter at 0."""
    done = {(row["row"], row["seed"], row["million_tokens"]) for row in results}
    for tokens in sorted(options.tokens):
        for seed in options.seeds if tokens else options.seeds[:1]:
            for name in options.rows if tokens else options.untrained or options.rows:
                if tokens or not (ROWS[name].lora or ROWS[name].teacher):
                    run = (name, seed, tokens)
                    known = (
                        any(d[0] == name and d[2] == 0 for d in done) if not tokens else run in done
                    )
                    if not known:
                        yield run


def _earlier(output: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if not output.exists():
        return []
    found = json.loads(output.read_text())
    if found["settings"] != settings:
        different = {
            k: (found["settings"].get(k), v)
            for k, v in settings.items()
            if found["settings"].get(k) != v
        }
        raise SystemExit(f"`--output` must be of the same settings, {output} differs: {different}")
    return found["rows"]


def _open(options: Options) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)


def _teacher(options: Options, row: Row) -> Teacher | None:
    """The model before it is converted, where it has a share in the row's loss."""
    if not row.teacher:
        return None
    model = _open(options).eval()
    on_gpu = model.device.type == "cuda"
    return Teacher(to_bfloat16_weights(model) if on_gpu else model, row.teacher)


def _profile(options: Options, text: Text, tokenizer: Any) -> Profile:
    """The profile that was given or lies beside the results, made if it is not there."""
    path = options.profile or options.output.with_suffix(".profile.json")
    if path.exists():
        return Profile.load(path)
    count = options.profile_rows
    rows = [text.train[k * len(text.train) // count] for k in range(count)]
    length = options.needle_length or options.context
    windows = -(-length // options.context)
    last = len(text.train) - windows
    starts = [k * last // options.needles for k in range(options.needles)]
    long = [text.train[start : start + windows].flatten()[:length] for start in starts]
    start = time.perf_counter()
    found = spa.hf.profile(
        _open(options), rows, needles=plant(long, options.needles, tokenizer),
        sensitivity=options.sensitivity_rows, progress=False,
    )  # fmt: skip
    found.save(path)
    print(f"profiled in {time.perf_counter() - start:.0f} s: {found}", flush=True)
    return found


def _run(
    options: Options,
    profile: Profile,
    text: Text,
    tokenizer: Any,
    sizes: Sizes,
    run: tuple[str, int, float],
) -> dict[str, Any]:
    name, seed, tokens = run
    row = ROWS[name]
    model = _open(options)
    facts = _convert(model, row, profile, options, name)
    schedule = Schedule(
        options.batch, options.micro_batch, options.rate, options.lora_rate, options.rank,
        options.compile,
    )  # fmt: skip
    on_gpu = model.device.type == "cuda"
    if row.lora:
        model = with_lora(to_bfloat16_weights(model) if on_gpu else model, schedule)
    if tokens:
        count = round(tokens * MILLION)
        kept = options.weights and options.weights / f"{name}-{seed}-{tokens:g}.pt"
        if kept and kept.exists():
            facts["train"] = _take(model, kept)
        else:
            facts["train"] = train(
                model, text.train, count, schedule, seed=seed, lora=row.lora,
                teacher=_teacher(options, row),
            )  # fmt: skip
            if kept:
                _give(model, facts["train"], kept)
        if on_gpu:  # what training used, for other processes on the same GPU
            torch.cuda.empty_cache()
    elif on_gpu:
        to_bfloat16_weights(model)
    facts |= measure(model, tokenizer, text, sizes)
    if row.sinks:
        facts["sinks"] = {
            key: [round(value, 3) for value in sinks.float().tolist()]
            for key, sinks in model.named_parameters()
            if key.endswith("sinks")
        }
    return {"row": name, "seed": seed, "million_tokens": tokens, **facts}


def _give(model: Any, facts: dict[str, Any], path: Path) -> None:
    """Save trained weights with the facts of their training, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"weights": model.state_dict(), "train": facts}, part)
    part.replace(path)


def _take(model: Any, path: Path) -> dict[str, Any]:
    """Load weights that `_give` saved, in their dtypes, and return the facts of their training."""
    found = torch.load(path, map_location=model.device)
    model.load_state_dict(found["weights"], assign=True)
    model.tie_weights()
    return dict(found["train"])


def _convert(model: Any, row: Row, profile: Profile, options: Options, name: str) -> dict[str, Any]:
    """Give the model its bands; what they cost, beside what they capture."""
    if row.patterns is None:
        return {"attention": "sdpa", "pairs": 1.0, "cache": 1.0, "captured": 1.0}
    span = model.config.max_position_embeddings
    budget = Budget(options.pairs, options.context, span)
    given = options.patterns and _given(options.patterns, row.like or name, options.context)
    patterns = given or list(row.patterns(profile, budget))
    sinks = starting_sinks(profile, patterns) if row.sinks else None
    if options.attention == "flex":
        flex.attend(model, patterns, sinks)
    else:
        spa.hf.apply(model, patterns, sinks=False if sinks is None else sinks)
    table = explain(profile, patterns)
    _keep(options.output.with_suffix(".patterns.json"), name, patterns, table.markdown())
    return {
        "attention": options.attention,
        **({"patterns": options.patterns.name} if given and options.patterns else {}),
        "profile": hashlib.sha256(json.dumps(profile.to_dict()).encode()).hexdigest()[:16],
        "pairs": table.pairs,
        "cache": table.cache,
        "captured": float(captured(profile, patterns).mean()),
    }


def _given(path: Path, name: str, context: int) -> list[BandPattern] | None:
    """The patterns of a row in a file of fitted ones; None for a row that needs no fit."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = rows.get(f"{name} at {context}")
    if found is None and name.startswith("fitted"):
        raise SystemExit(
            f"`--patterns` must hold {name} at {context}, {path} holds only {list(rows)}"
        )
    found = found["patterns"] if isinstance(found, dict) else found
    return found and [BandPattern.from_dict(each) for each in found]


def _keep(path: Path, name: str, patterns: list[BandPattern], table: str) -> None:
    """Write the patterns of a row, and why they are such, beside those of other rows."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {"patterns": [each.to_dict() for each in patterns], "table": table.split("\n")}
    write_atomically(path, json.dumps(known) + "\n")


def _say(row: dict[str, Any]) -> None:
    losses = {k: round(v["mean"], 4) for k, v in row.get("loss", {}).items()}
    keys = {
        length: " ".join(f"{v:.2f}" for v in found.values())
        for length, found in row.get("passkeys", {}).items()
    }
    ruler = {
        length: {task: round(s["mean"], 2) for task, s in found.items()}
        for length, found in row.get("ruler", {}).items()
    }
    tasks = [v["mean"] for v in row.get("tasks", {}).values()]
    print(
        f"{row['row']:20s} {row['million_tokens']:>4} M seed {row['seed']} pairs {row['pairs']:.3f}"
        f" cache {row['cache']:.2f} loss {losses} passkeys {keys} ruler {ruler} tasks "
        f"{sum(tasks) / len(tasks) if tasks else math.nan:.3f} in {row['total_seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
