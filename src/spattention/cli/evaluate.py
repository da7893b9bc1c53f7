"""`spattention evaluate`: what a trained model can do, as a table, as JSON and as a plot."""

from __future__ import annotations

import io
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, logging

from .. import baselines, hf
from ..data.packed import SUFFIX, read_packed
from ..data.prepare import open_stream
from ..data.tokens import Windows
from ..evaluation.heads import LayerHeads, look_at_heads
from ..evaluation.perplexity import LossByPosition, Mean, validation_loss
from ..evaluation.recall import Score, questions, recall
from ..evaluation.tasks import TaskScore, run_tasks
from ..plots import evaluation_figure
from ..training.report import machine
from ..training.results import write_atomically
from .generate import model_folder, open_tokenizer

Part = Literal["loss", "recall", "heads", "tasks"]
HEAD_ROWS = 4  # windows whose heads are looked at
NEAR = "near chance"


@dataclass(frozen=True)
class Options:
    """Evaluate a trained causal language model, with bands, a baseline or dense attention.

    Four parts: the validation loss, overall and by position in the context; recall (copying, pairs
    of keys and values, a needle at each depth of the context); the entropy, the distance and the
    divergence of the heads; and tasks of the lm-evaluation-harness, with --tasks, which needs
    spattention[eval]. Scores come with standard errors, and those that guessing would reach are
    called near chance.

    Args:
        checkpoint: Folder of a saved model, of `spattention train` (its newest checkpoint that is
            whole), or of `spattention compare` (its first model with bands).
        data: Held-out text: packed tokens (.u16.xz), or a folder that `spattention prepare` wrote,
            of which the validation tokens are taken. Without it, the data of `compare`.
        parts: Which parts; default all that need no --tasks, and tasks if they are given.
        context: Tokens per window; default the model's longest input.
        windows: At most so many windows, spread over the text.
        items: Sequences per question of recall.
        batch: Windows at a time.
        dtype: Of the weights.
        tasks: hellaswag, winogrande, copa, piqa, arc_easy, arc_challenge, lambada_openai, mmlu;
            from the hub any of the harness.
        task_data: Folder of JSON lines to take the items from; without it, the hub.
        shots: Numbers of examples in the prompt, such as 0 5; local files have them for mmlu alone.
        limit: Only so many items per task, for a first look.
        seed: Of the random tokens of recall.
        output: Folder for evaluation.json, evaluation.md and evaluation.png.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    data: Path | None = None
    parts: tuple[Part, ...] = ()
    context: int | None = None
    windows: int = 64
    items: int = 16
    batch: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    shots: tuple[int, ...] = (0,)
    limit: int | None = None
    seed: int = 0
    output: Path = Path("spattention-evaluate")


@dataclass(frozen=True)
class Evaluation:
    """What was found; None for parts that were not asked for."""

    model: str
    attention: str
    loss: LossByPosition | None
    recall: list[Score] | None
    heads: list[LayerHeads] | None
    tasks: list[TaskScore] | None


def main(options: Options) -> None:
    """Open, evaluate, write, show."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parts = options.parts or ("loss", "recall", "heads", *(("tasks",) if options.tasks else ()))
    if ("tasks" in parts) != bool(options.tasks):
        raise ValueError('`--parts` must name "tasks" if and only if there are `--tasks`')
    for name in ("windows", "items", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(options, name)}")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"`--limit` must be at least 1, got {options.limit}")
    if any(shots < 0 for shots in options.shots) or not options.shots:
        raise ValueError(f"`--shots` must be integers from 0 on, got {list(options.shots)}")
    folder = model_folder(options.checkpoint)
    model = _open(folder, options.dtype)
    if options.tasks:
        open_tokenizer(folder)  # refused before the work, not after it
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)  # some know none
    context = longest if options.context is None else options.context
    if context is None:
        raise ValueError("`--context` must be given, the model names no longest text")
    if not 2 <= context <= (longest or context):
        raise ValueError(f"`--context` must be from 2 to the model's {longest}, got {context}")
    texts = None
    if parts != ("tasks",):
        texts = Windows(_text(options), context, options.windows)
        largest = max(int(texts[k]["input_ids"].max()) for k in range(len(texts)))
        if largest >= config.vocab_size:
            raise ValueError(
                f"`--data` must hold tokens of the model's {config.vocab_size} entries, got token "
                f"{largest}"
            )
    console = Console()
    with _progress(console) as say:
        evaluation = evaluate(model, folder, parts, texts, options, say)
    report(evaluation, options, folder, console)


def evaluate(
    model: Any,
    folder: Path,
    parts: tuple[Part, ...],
    texts: Windows | None,
    options: Options,
    say: Any,
) -> Evaluation:
    """Every part that was asked for."""
    config = model.config.get_text_config()
    loss, scores, heads, tasks = None, None, None, None
    if "loss" in parts:
        assert texts is not None
        count_of = len(texts)
        loss = validation_loss(
            model,
            texts,
            batch=options.batch,
            on_window=lambda done: say("loss", done / count_of),
        )
    if "recall" in parts:
        assert texts is not None
        rows = torch.stack([texts[k % len(texts)]["input_ids"] for k in range(options.items)])
        asked = list(questions(config.vocab_size, texts.context, rows, options.items, options.seed))
        done: list[Score] = []

        def count(score: Score) -> None:
            done.append(score)
            say("recall", len(done) / len(asked))

        most = options.batch * texts.context
        scores = recall(model, asked, tokens=most, on_score=count)
    if "heads" in parts:
        assert texts is not None
        some = [texts[k]["input_ids"] for k in range(min(HEAD_ROWS, len(texts)))]
        heads = look_at_heads(model, torch.stack(some))
        say("heads", 1.0)
    if "tasks" in parts:
        tasks = []
        tokenizer = open_tokenizer(folder)
        for number, shots in enumerate(options.shots):
            with tempfile.TemporaryDirectory() as work:
                tasks += run_tasks(
                    model,
                    tokenizer,
                    options.tasks,
                    folder=options.task_data,
                    work=Path(work),
                    shots=shots,
                    batch=max(8, options.batch),
                    limit=options.limit,
                )
            say("tasks", (number + 1) / len(options.shots))
    return Evaluation(str(folder), config._attn_implementation, loss, scores, heads, tasks)


def report(evaluation: Evaluation, options: Options, folder: Path, console: Console) -> None:
    """Write JSON, Markdown and plot, and print the tables."""
    content = {
        "format": "spattention-evaluation",
        "version": 1,
        "command": shlex.join(["spattention", *sys.argv[1:]]),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "machine": machine(),
        **asdict(evaluation),
    }
    text = json.dumps(_numbers(content), indent=1, allow_nan=False)
    write_atomically(options.output / "evaluation.json", text + "\n")
    tables = list(tables_of(evaluation))
    lines = [f"# Evaluation of {folder.name}", "", f"`{content['command']}`", ""]
    for title, header, rows in tables:
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
        shown = Table(title=title, title_justify="left")
        for name in header:
            shown.add_column(name, justify="left" if name == header[0] else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    if evaluation.loss or evaluation.recall or evaluation.heads:
        picture = io.BytesIO()
        evaluation_figure(evaluation.loss, evaluation.recall, evaluation.heads).savefig(
            picture, dpi=150, format="png"
        )
        write_atomically(options.output / "evaluation.png", picture.getvalue())
        lines += ["![loss by position, recall, entropy of heads](evaluation.png)", ""]
    write_atomically(options.output / "evaluation.md", "\n".join(lines))
    console.print(f"written to {options.output}", highlight=False)


def _numbers(content: Any) -> Any:
    """With null for what JSON has no number for: the error of a single item."""
    if isinstance(content, dict):
        return {name: _numbers(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_numbers(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def tables_of(
    evaluation: Evaluation,
) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, header and rows of each part."""
    rows: list[tuple[str, ...]]
    if evaluation.loss is not None:
        found = evaluation.loss
        rows = [("all", _mean(found.loss, 4))]
        rows += [
            (f"{near:,} to {far - 1:,}", _mean(part, 4))
            for near, far, part in zip(found.edges, found.edges[1:], found.parts)
        ]
        yield "Validation loss, nats per token", ("position", "loss"), rows
    if evaluation.recall is not None:
        rows = [
            (
                _question(score),
                _mean(score.accuracy, 3),
                f"{score.chance:.3g}",
                _mean(score.loss, 3),
                NEAR if score.near_chance else "",
            )
            for score in evaluation.recall
        ]
        yield "Recall", ("question", "accuracy", "chance", "loss", ""), rows
    if evaluation.heads is not None:
        rows = [
            (
                str(index),
                f"{sum(layer.entropy) / len(layer.entropy):.2f}",
                f"{min(layer.entropy):.2f} to {max(layer.entropy):.2f}",
                f"{min(layer.distance):.0f} to {max(layer.distance):.0f}",
                f"{layer.divergence:.2f}",
            )
            for index, layer in enumerate(evaluation.heads)
        ]
        header = ("layer", "entropy", "of its heads", "mean distances", "divergence")
        yield "Heads (entropy and divergence in nats)", header, rows
    if evaluation.tasks is not None:
        rows = [
            (
                score.task,
                str(score.shots),
                score.metric,
                _mean(score.value, 3),
                "" if score.chance is None else f"{score.chance:.3f}",
                str(score.value.items),
                NEAR if score.near_chance else "",
            )
            for score in evaluation.tasks
        ]
        yield "Tasks", ("task", "shots", "metric", "score", "chance", "items", ""), rows


def _open(folder: Path, dtype: str) -> Any:
    hf.register()
    baselines.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def _text(options: Options) -> Any:
    """The held-out tokens."""
    path = options.data
    if path is None:
        path = options.checkpoint / "data"
        if not (path / "facts.json").is_file():
            raise ValueError(
                f"`--data` must name held-out text: {options.checkpoint} is no comparison with data"
            )
    if path.name.endswith(SUFFIX):
        return read_packed(path)
    if not (path / "facts.json").is_file():
        raise ValueError(
            f"`--data` must be packed tokens ({SUFFIX}) or a folder that `spattention prepare` "
            f"wrote, got {path}"
        )
    return open_stream(path, "validation")


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    with Progress(console=console, transient=True) as progress:
        bars: dict[str, Any] = {}

        def say(name: str, share: float) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=1.0)
            progress.update(bars[name], completed=share)

        yield say


def _question(score: Score) -> str:
    if score.task == "copying":
        return f"copying, {score.setting:,.0f} tokens back"
    if score.task == "pairs":
        return f"{score.setting:,.0f} pairs of key and value"
    return f"needle at {100 * score.setting:.0f} % of the context"


def _mean(value: Mean, digits: int) -> str:
    # The perplexity of an untrained model runs to millions.
    style = f".{digits}f" if abs(value.mean) < 1e4 else ".3g"
    return f"{value.mean:{style}} ± {value.error:{style}}"
