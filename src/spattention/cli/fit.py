"""`spattention fit`: a pretrained dense model becomes a model with bands fitted to it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

from .. import baselines, hf, related
from ..bands import BandPattern
from ..data.model_text import check_same_tokenizer, open_tokens, tokenize_text
from ..data.text import sample_path
from ..data.token_file import SUFFIX
from ..evaluation.perplexity import token_losses
from ..files import make_folder, remove_empty, sync_tree
from ..fitting import Profile, captured, explain
from ..fitting import fit as fit_patterns
from ..fitting.fit import check_budget
from ..fitting.picture import fit_figure, profile_figure
from ..fitting.sinks import starting_sinks
from ..hf.adapter_files import refuse_adapter
from ..hf.profile import identity
from ..loading import refuse_run
from ..plots import picture_of
from ..provenance import spattention_command
from .options.fit import Options

ENOUGH = 8  # times the tokens that are used: rows are spread over so much text at most
FORMAT = "spattention-fit"
SECTIONS = (hf.NAME, *(kind.kind for kind in (*baselines.KINDS, *related.KINDS)))
PREFIX_MAX = 16  # first tokens that a profile counts one by one

LEGEND = """\
`[0, 64)` is the token itself and the 63 before it. *Pairs* is a head's work and *captured* what it
still attends, both as shares of the dense head's. A head *fetches* if it goes back to a passkey
that the answer repeats, or if the answer minds that it does. *Half within* is the distance up to
which half of its attention lies, beside the first tokens. *Minded* says how much the loss depends
on where the head looks; the mean head has 1.
"""


def main(options: Options) -> None:
    """Open, profile, fit, check, save."""
    _check(options)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    measured = None if options.profile is None else Profile.load(options.profile)
    most = PREFIX_MAX if measured is None else measured.prefix_max
    if options.prefix > most:
        raise ValueError(
            f"`--prefix` must be at most {most}, the first tokens that are measured, got "
            f"{options.prefix}"
        )
    with _appearing(options.output) as folder:
        model, tokenizer = _open(options)
        config = model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        context = options.context or min(2048, longest or 2048)
        if longest is not None and context > longest:
            raise ValueError(f"`--context` must be at most the model's {longest}, got {context}")
        if measured is not None:
            measured.check_model(identity(model))
            if not options.sensitivity:
                measured = replace(measured, sensitivity=None, sensitivity_rows=0)
            elif measured.sensitivity is None:
                console.print("the profile has no gradients: most attention captured decides")
        length = context if measured is None else measured.length
        wanted: dict[str, Any] = {
            "pairs": options.pairs,
            "span": options.span or max(longest or 0, length),
            "prefix": options.prefix,
            "local": options.local,
            "kv_heads": identity(model).kv_heads if options.share else None,
            "dense_layers": options.dense_layers,
            "retrieval": options.retrieval,
        }
        check_budget(identity(model), length, min(most, length), **wanted)
        rows = _rows(options, tokenizer, context)
        held_out, kept = rows[: options.check], rows[options.check :]
        if measured is None:
            measured = hf.profile(
                model,
                kept,
                needles=options.needles or None,
                tokenizer=tokenizer,
                prefix_max=PREFIX_MAX,
                sensitivity=min(options.sensitivity, len(kept)),
            )
        patterns = fit_patterns(measured, **wanted)
        facts = _convert(model, measured, patterns, held_out, options)
        _save(folder, model, tokenizer, measured, patterns, facts)
    _say(console, options, facts)


def _check(options: Options) -> None:
    for name, least in (
        ("rows", 1), ("check", 1), ("needles", 0), ("sensitivity", 0), ("prefix", 0), ("local", 1),
        ("context", 2), ("span", 1),
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not least <= value < 2**31:
            raise ValueError(f"`--{name}` must be from {least} to {2**31 - 1}, got {value}")
    if not 0 < options.pairs <= 1:
        raise ValueError(f"`--pairs` must be above 0 and at most 1, got {options.pairs}")
    if not 0 <= options.retrieval <= 1:
        raise ValueError(f"`--retrieval` must be from 0 to 1, got {options.retrieval}")
    if options.output.exists() or options.output.is_symlink():
        raise ValueError(f"`--output` must not exist, {options.output} does")


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place at the end, and is removed if anything fails.

    It is made before the work, so that a place where nothing can be written is named at once.
    """
    made = make_folder(output.parent)
    folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        with _ending_on_request():
            yield folder
        folder.chmod(0o755)  # mkdtemp's own mode would hide it from other users
        sync_tree(folder)
        if output.exists():
            raise ValueError(f"`--output` must not exist, {output} was made meanwhile")
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        remove_empty(made)
        raise


@contextmanager
def _ending_on_request() -> Iterator[None]:
    """Turn a request to end (SIGTERM: `kill`, a scheduler) into SystemExit, so that what was begun
    is cleared up. Python's default ends the process at once.
    """

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _open(options: Options) -> tuple[Any, Any]:
    """The dense model, ready to be profiled, and its tokenizer."""
    name = options.model
    refuse_run("`MODEL`", Path(name))
    refuse_adapter(Path(name))
    if os.path.exists(name) and not (Path(name) / "config.json").is_file():
        raise ValueError(f"`MODEL` must be a folder with a config.json, {name} has none")
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        text = config.get_text_config()
        section = next((kind for kind in SECTIONS if getattr(text, kind, None) is not None), None)
        if section is None:
            model = AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=dtype, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # libraries raise exceptions of many types for damaged files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"`MODEL` must be a saved causal language model with its tokenizer, or the name of one "
            f"on the hub, got {name}: {reason}"
        ) from error
    if section is not None:
        found = "bands" if section == hf.NAME else f"the attention `{section}`"
        raise ValueError(f"`MODEL` must be dense, {name} has {found} already")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"`MODEL` must have a tokenizer, {name} has none with words")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _rows(options: Options, tokenizer: Any, context: int) -> list[Tensor]:
    """Rows of the data, int64 `[context]`: those to check on first, spread as the others are."""
    count = options.rows + options.check
    ids = _tokens(options.data, tokenizer, ENOUGH * count * context)
    found = len(ids) // context
    if found < count:
        raise ValueError(
            f"`--data` must hold at least {count * context} tokens for {options.rows} + "
            f"{options.check} rows of {context}, got {len(ids)}"
        )
    at = [k * found // count for k in range(count)]
    rows = [torch.from_numpy(ids[k * context : (k + 1) * context].astype(np.int64)) for k in at]
    checked = {int((k + 0.5) * count / options.check) for k in range(options.check)}
    return [rows[k] for k in sorted(checked)] + [
        row for k, row in enumerate(rows) if k not in checked
    ]


def _tokens(data: Path | None, tokenizer: Any, enough: int) -> np.ndarray:
    """Tokens of the data, those of text not many more than enough."""
    if data is not None and (data.name.endswith(SUFFIX) or (data / "facts.json").is_file()):
        check_same_tokenizer(data, tokenizer.get_vocab())
        return open_tokens(data, "train").tokens
    return tokenize_text(data or sample_path(), tokenizer, enough).tokens


def _convert(
    model: Any,
    profile: Profile,
    patterns: Sequence[BandPattern],
    held_out: Sequence[Tensor],
    options: Options,
) -> dict[str, Any]:
    """Apply the patterns, and compare with the dense model on rows that were not profiled."""
    check = hf.profile(model, held_out, prefix_max=profile.prefix_max)
    dense = _loss(model, held_out)
    hf.apply(model, patterns, sinks=starting_sinks(profile, patterns) if options.sinks else False)
    bands = _loss(model, held_out)
    table = explain(profile, patterns)
    return {
        "format": FORMAT,
        "version": 1,
        "command": spattention_command(),
        "model": options.model,
        "pairs": table.pairs,
        "length": table.length,
        "span": patterns[0].span,
        "cache": table.cache,
        "captured": {
            "profiled": table.captured,
            "checked": float(captured(check, patterns).mean()),
        },
        "loss": {"dense": dense, "bands": bands},
        "checked_tokens": check.tokens,
        "sinks": options.sinks,
    }


def _loss(model: Any, rows: Sequence[Tensor]) -> float:
    """Mean loss in nats per token; the model's mode of training stays as it is."""
    training = model.training
    losses = [token_losses(model, row[None]).double().flatten().cpu() for row in rows]
    model.train(training)
    return float(torch.cat(losses).mean())


def _save(
    folder: Path,
    model: Any,
    tokenizer: Any,
    profile: Profile,
    patterns: Sequence[BandPattern],
    facts: dict[str, Any],
) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    profile.save(folder / "profile.json")
    figures = {"profile": profile_figure(profile), "fit": fit_figure(profile, patterns)}
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(picture_of(figure, 130))
    finite = {k: v for k, v in facts["loss"].items() if math.isfinite(v)}
    (folder / "fit.json").write_text(json.dumps(facts | {"loss": finite}, indent=1) + "\n")
    text = f"# Bands fitted to {facts['model']}\n\n`{facts['command']}`\n\n{_summary(facts)}\n\n"
    text += f"{explain(profile, patterns)}\n{LEGEND}\n![where the heads look](profile.png)\n\n"
    (folder / "fit.md").write_text(text + "![what each head attends](fit.png)\n")


def _summary(facts: dict[str, Any]) -> str:
    shares, loss = facts["captured"], facts["loss"]
    return (
        f"{facts['pairs']:.4f} of dense attention's pairs at {facts['length']:,} tokens; "
        f"{shares['profiled']:.4f} of its attention captured on the rows that were profiled, "
        f"{shares['checked']:.4f} on {facts['checked_tokens']:,} other tokens. Loss on these "
        f"before any training: {loss['bands']:.3f}, dense {loss['dense']:.3f}."
    )


def _say(console: Console, options: Options, facts: dict[str, Any]) -> None:
    console.print(_summary(facts), highlight=False)
    if facts["span"] > facts["length"]:
        console.print(
            f"Fitted at {facts['length']:,} tokens: in longer texts, up to {facts['span']:,}, only "
            "heads that attend up to the end here look farther. Fit at the length that you will "
            "use (--context).",
            highlight=False,
        )
    console.print(
        f"written to {options.output}: the model with bands, what each layer got and why (fit.md, "
        "fit.png), and the profile",
        highlight=False,
    )
