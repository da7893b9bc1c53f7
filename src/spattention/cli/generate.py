"""`spattention generate`: a saved model and a text in, more text out."""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer, logging, set_seed

from .. import hf
from ..benchmarking.timing import cache_bytes
from ..compat.huggingface import attention_name
from ..data.text import check_text
from ..hf.decoder import OWN_IMPLEMENTATIONS
from ..loading import model_folder, named_errors, open_model, open_tokenizer
from .bounds import LARGEST, LARGEST_SEED, check_range
from .options.generate import Options

COOLEST, HOTTEST = 0.01, 100.0  # beyond them logits leave the range of bfloat16 or all are alike
LARGEST_PROMPT = 2**26  # bytes of a text file


@dataclass(frozen=True)
class Run:
    """Measurements of one generation.

    Attributes:
        tokens: the number of tokens added.
        prefill: seconds to the first of them.
        speed: tokens per second after it, by the median time of a token.
        cache: bytes of keys and values at the end.
    """

    tokens: int
    prefill: float
    speed: float
    cache: int


def main(options: Options) -> None:
    """Open the model, generate, and print the speed."""
    _check(options)
    prompt = _prompt(options)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = model_folder(options.folder)
    tokenizer = open_tokenizer(folder)
    model = open_model(folder)
    attention = attention_name(model.config.get_text_config())
    if options.compare and attention != hf.NAME:
        found = "dense attention" if attention in OWN_IMPLEMENTATIONS else f"`{attention}`"
        raise ValueError(f"`--compare dense` needs a model with bands, {folder} has {found}")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("the prompt must hold at least one token, got none")
    config = model.config.get_text_config()
    if inputs["input_ids"].max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} must be the model's, which has {config.vocab_size} "
            f"entries, got token {inputs['input_ids'].max()}"
        )
    longest = getattr(config, "max_position_embeddings", None)  # some models have none
    room = math.inf if longest is None else longest - length
    if room < 1:
        raise ValueError(
            f"the prompt must be shorter than the model's context of {longest} tokens, got {length}"
        )
    new = int(min(options.max_new_tokens, room))
    if options.compare is None:
        run = _generate(options, model, tokenizer, prompt, inputs, new)
        print(
            f"\n{run.tokens} tokens after a prompt of {length}, {run.speed:.1f} tokens/s, "
            f"cache {run.cache / 2**20:.2f} MiB ({folder})",
            file=sys.stderr,
        )
        if run.tokens == room:
            print(f"the model's context of {longest} tokens is full", file=sys.stderr)
        return
    runs = {}
    for name in ("bands", options.compare):
        if name == "dense":
            del model  # one copy of the weights at a time
            model = open_model(folder, dense=True)
        print(f"--- {name} ---", flush=True)
        runs[name] = _generate(options, model, tokenizer, prompt, inputs, new)
        print()
    _show(runs, length, folder)


def _generate(
    options: Options, model: Any, tokenizer: Any, prompt: str, inputs: Any, new: int
) -> Run:
    """Continue the prompt on standard output, with the cache that suits the model."""
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling |= {"temperature": options.temperature, "top_k": options.top_k}
    if getattr(model.config.get_text_config(), "spattention", None) is not None:
        sampling["past_key_values"] = hf.BandCache(model.config)
    set_seed(options.seed)
    print(prompt, end="", flush=True)
    streamer = _Clock(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = model.generate(
        **inputs,
        max_new_tokens=new,
        streamer=streamer,
        return_dict_in_generate=True,
        disable_compile=not options.compile,
        logits_processor=LogitsProcessorList([_Finite(model.name_or_path)]),
        **special_tokens(model, tokenizer),
        **sampling,
    )
    prefill, *gaps = streamer.gaps()
    return Run(
        result.sequences.shape[1] - inputs["input_ids"].shape[1],
        prefill,
        1 / statistics.median(gaps or [prefill]),
        cache_bytes(result.past_key_values),
    )


class _Finite(LogitsProcessor):
    """A check of the logits: from NaN a draw fails, and the likeliest token is any."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.isfinite().all():
            raise ValueError(
                f"{self.model} must give finite logits, got NaN or infinity after "
                f"{input_ids.shape[1]} tokens"
            )
        return scores


class _Clock(TextStreamer):
    """A streamer that prints text as it comes, and records the times."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then every token."""
        self.times.append(time.perf_counter())
        super().put(value)

    def gaps(self) -> list[float]:
        """Seconds from one call to the next: to the first token, to the second, ..."""
        return [after - before for before, after in zip(self.times, self.times[1:])]


def _show(runs: dict[str, Run], length: int, folder: Path) -> None:
    table = Table(title=f"{length} tokens of prompt, {folder.name or folder}")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for heading, cells in (
        ("tokens added", [str(run.tokens) for run in runs.values()]),
        ("seconds to the first", [f"{run.prefill:.2f}" for run in runs.values()]),
        ("tokens/s after it", [f"{run.speed:.1f}" for run in runs.values()]),
        ("cache, MiB", [f"{run.cache / 2**20:.2f}" for run in runs.values()]),
    ):
        table.add_row(heading, *cells)
    console = Console(stderr=True)
    console.print(table)
    if runs["bands"].speed < runs["dense"].speed:
        console.print(
            f"Dense attention is faster here: after {length + runs['dense'].tokens:,} tokens its "
            "cache is still short. Bands gain with texts of several thousand tokens.",
            highlight=False,
        )


def special_tokens(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Tokens that end a text and that pad one: the model's own, or else the tokenizer's.

    A token may be 0.
    """
    found = {}
    for name in ("eos_token_id", "pad_token_id"):
        own = getattr(model.generation_config, name)
        found[name] = getattr(tokenizer, name) if own is None else own
    if found["pad_token_id"] is None:
        ends = found["eos_token_id"]
        found["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return found


def _check(options: Options) -> None:
    check_range(
        options,
        max_new_tokens=(1, LARGEST),
        top_k=(1, LARGEST),
        seed=(0, LARGEST_SEED),
        temperature=(0, HOTTEST),
    )
    if 0 < options.temperature < COOLEST:
        raise ValueError(
            f"`--temperature` must be 0 or at least {COOLEST}, got {options.temperature}"
        )


def _prompt(options: Options) -> str:
    if options.prompt is not None:
        check_text(options.prompt, "the prompt")
        return options.prompt
    assert options.file is not None
    if not options.file.is_file():
        raise ValueError(f"`--file` must be a text file, {options.file} is none")
    if (size := options.file.stat().st_size) > LARGEST_PROMPT:
        raise ValueError(
            f"`--file` must have at most {LARGEST_PROMPT:,} bytes, {options.file} has {size:,}"
        )
    with named_errors(options.file, "must be UTF-8 text"):
        return options.file.read_text(encoding="utf-8")
