"""Find the layers whose bands cost answers beyond the length that a model was fitted at.

    python -m benchmarks.conversion.layers --model MODEL --text TEXT --profile PROFILE.json \
        --output layers.json

Passkeys are asked of the untrained model, each as the log-probability of its whole answer, which
tells more of few texts than the share that is found. Rows: dense; `fitted` with no dense layer;
`question dense`, where the text is read with these bands and the question without; `dense A B`,
fitted anew within the budget with these layers dense; and `opened N`, the fitted patterns with
layer N dense, beyond the budget. The file is written, whole, after each row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging

import spattention as spa
from spattention.bands import BandPattern
from spattention.benchmarking.results import environment, write_rows
from spattention.fitting import Profile
from spattention.hf.needles import Needle, plant

from .rows import PREFIX
from .text import digests, read_text

DEPTHS = 5  # .1, .3, .5, .7, .9, as the benchmark plants them
QUESTION = 24  # last tokens of a row: the question, its answer and a few before


@dataclass(frozen=True)
class Options:
    """Ask an untrained model for passkeys, layer by layer dense.

    Args:
        model: folder of a dense model of Llama's kind, with its tokenizer.
        text: folder of tokens, see text.py.
        profile: JSON of its profile.
        output: JSON of results.
        pairs: budget of bands, as a share of dense attention's pairs at `context`.
        context: tokens for which pairs are counted.
        lengths: tokens of the texts.
        depths: which of five depths, from 0.
        trials: passkeys per length and depth.
        batch: tokens of texts that are answered together.
        opened: layers to open one by one; default all.
        refitted: sets of dense layers to fit anew with, such as 0,1.
        commit: to record, where git cannot tell.
    """

    model: Path
    text: Path
    profile: Path
    output: Path
    pairs: float = 0.35
    context: int = 2048
    lengths: tuple[int, ...] = (4096, 8192)
    depths: tuple[int, ...] = (0, 1)
    trials: int = 10
    batch: int = 32_768
    opened: tuple[int, ...] | None = None
    refitted: tuple[str, ...] = ("0", "1", "2", "0,1", "0,2", "0,1,2")
    commit: Annotated[str | None, tyro.conf.arg(metavar="COMMIT")] = None


def main(options: Options) -> None:
    """Every row, one after the other."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = {k: v for k, v in asdict(options).items() if k not in ("output", "commit")}
    settings = json.loads(json.dumps(settings, default=str)) | {"text": digests(options.text)}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    profile = Profile.load(options.profile)
    long = read_text(options.text, options.context, max(options.lengths), 1).long
    needles = {
        f"{length} at {(2 * depth + 1) / (2 * DEPTHS)}": [
            plant([long[trial % len(long), :length]] * DEPTHS, DEPTHS, tokenizer, seed=trial)[depth]
            for trial in range(options.trials)
        ]
        for length in options.lengths
        for depth in options.depths
    }
    cuda = torch.cuda.is_available()
    where = environment() if cuda else {}
    rows: list[dict[str, Any]] = []
    for name, patterns in _rows(options, profile):
        began = time.perf_counter()
        model = _open(options.model)
        asked = _open(options.model) if name == "question dense" else model
        row: dict[str, Any] = {"row": name, "pairs": 1.0}
        if patterns is not None:
            spa.hf.apply(model, patterns)
            row["pairs"] = _pairs(patterns, options.context)
        row["answers"] = {
            key: ask(model, asked, each, options.batch) for key, each in needles.items()
        }
        rows.append(row | {"seconds": time.perf_counter() - began})
        write_rows(
            options.output, "answers by dense layer", settings, rows, commit=options.commit,
            environment=where,
        )  # fmt: skip
        found = {k: f"{v['mean']:.2f} {v['found']}" for k, v in row["answers"].items()}
        print(f"{name:12s} pairs {row['pairs']:.3f} {found}", flush=True)


def _rows(options: Options, profile: Profile) -> Iterator[tuple[str, list[BandPattern] | None]]:
    yield "dense", None
    layers = profile.model.layers
    span = max(options.lengths)
    wanted: dict[str, Any] = {
        "pairs": options.pairs,
        "length": options.context,
        "span": span,
        "prefix": PREFIX,
    }
    fitted = spa.fit(profile, **wanted, dense_layers=())
    yield "fitted", fitted
    yield "question dense", fitted
    for each in options.refitted:
        chosen = [int(layer) for layer in each.split(",")]
        yield f"dense {' '.join(map(str, chosen))}", spa.fit(profile, **wanted, dense_layers=chosen)
    whole = BandPattern.dense(profile.model.heads, span)
    for layer in range(layers) if options.opened is None else options.opened:
        yield f"opened {layer}", [whole if k == layer else p for k, p in enumerate(fitted)]


def _pairs(patterns: Sequence[BandPattern], length: int) -> float:
    heads = sum(pattern.num_heads for pattern in patterns)
    return sum(sum(p.pairs(length)) for p in patterns) / (heads * length * (length + 1) // 2)


def _open(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def ask(model: Any, asked: Any, needles: Sequence[Needle], tokens: int) -> dict[str, Any]:
    """Log-probabilities of the answers, in nats, and how many are the likeliest throughout.

    Args:
        model: reads the text.
        asked: reads the question: the same model, or another with the text's keys and values.
        needles: of one length.
        tokens: of texts that are answered together.
    """
    each, found = [], 0
    batch = max(1, tokens // len(needles[0].tokens))
    for start in range(0, len(needles), batch):
        chosen = needles[start : start + batch]
        keep = max(len(needle.answer) for needle in chosen) + 1
        ids = torch.stack([needle.tokens for needle in chosen]).to(model.device)
        cache = None if asked is model else DynamicCache()
        if cache is not None:
            model(input_ids=ids[:, :-QUESTION], past_key_values=cache, logits_to_keep=1)
            ids = ids[:, -QUESTION:]
        kept = {"past_key_values": cache, "use_cache": cache is not None}
        logits = asked(input_ids=ids, logits_to_keep=keep, **kept).logits.float().cpu()
        for row, needle in zip(logits, chosen):
            own = row[keep - 1 - len(needle.answer) : keep - 1]
            answer = needle.answer_tokens[:, None]
            each.append(float(own.log_softmax(dim=-1).gather(1, answer).sum()))
            found += int(torch.equal(own.argmax(dim=-1), needle.answer_tokens))
    mean = sum(each) / len(each)
    return {"mean": mean, "found": found, "of": len(each), "each": [round(x, 2) for x in each]}


if __name__ == "__main__":
    main(tyro.cli(Options))
