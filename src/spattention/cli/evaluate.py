"""`spattention evaluate`: measure a trained model; results as tables, as JSON and as a plot."""

from __future__ import annotations

import itertools
import json
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import logging as transformers_logging

from ..compat.huggingface import attention_name
from ..data.model_text import check_same_tokenizer, is_text, open_tokens, tokenize_text
from ..data.token_file import SUFFIX
from ..data.tokenizer import load_tokenizer
from ..data.tokens import TokenStream, Windows
from ..evaluation.heads import LayerHeads, head_statistics
from ..evaluation.perplexity import LossByPosition, Mean, position_edges, validation_loss
from ..evaluation.recall import Score, questions, recall
from ..evaluation.tasks import TaskScore, run_tasks
from ..files import read_json, write_atomically
from ..loading import LARGEST_JSON, model_digest, model_folder, open_model, open_tokenizer
from ..markdown import table
from ..plots import evaluation_figure, picture_of
from ..provenance import machine, spattention_command
from ..training.lock import held
from .bounds import LARGEST, LARGEST_SEED, check_range
from .options.evaluate import Options, Part

PARTS: tuple[Part, ...] = ("loss", "recall", "heads", "tasks")
FORMAT = "spattention-evaluation"
PARTS_OF_CONTEXT = 8  # rows of the table of losses, after those that double
HEAD_ROWS = 4  # windows whose heads are looked at
MOST_SHOTS = 1000
MOST_TOKENS = 2**26  # of the sequences of one question of recall; they are held in memory


@dataclass(frozen=True)
class Evaluation:
    """Results of the parts; None for a part that was not evaluated.

    Attributes:
        model: its folder.
        digest: of its config and weights.
        attention: its attention implementation.
    """

    model: str
    digest: str
    attention: str
    loss: LossByPosition | None
    recall: list[Score] | None
    heads: list[LayerHeads] | None
    tasks: list[TaskScore] | None


def main(options: Options) -> None:
    """Open the model, evaluate, write and print."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # warns of a model that is open already
    parts = options.parts or ("loss", "recall", "heads", *(("tasks",) if options.tasks else ()))
    _check(options, parts)
    folder = model_folder(options.checkpoint)
    with held(options.output):
        digest = model_digest(folder)
        if not options.replace:
            _check_output(options.output, folder, digest, parts)
        _evaluate(options, parts, folder, digest)


def _evaluate(options: Options, parts: tuple[Part, ...], folder: Path, digest: str) -> None:
    # Refused before the model is opened, not after the work.
    data = _data(options, folder) if parts != ("tasks",) else None
    if "tasks" in parts:
        open_tokenizer(folder)
    model = open_model(folder, dtype=getattr(torch, options.dtype))
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)  # some models have none
    context = longest if options.context is None else options.context
    if context is None:
        raise ValueError("`--context` must be given, the model names no longest text")
    if not 2 <= context <= (longest or LARGEST):
        raise ValueError(f"`--context` must be from 2 to the model's {longest}, got {context}")
    if options.items * context > MOST_TOKENS:
        raise ValueError(
            f"`--items` times `--context` must be at most {MOST_TOKENS:,} tokens, got "
            f"{options.items} x {context}"
        )
    texts = None
    if data is not None:
        texts = Windows(_text(data, folder), context, options.windows)
        largest = max(int(texts[k]["input_ids"].max()) for k in range(len(texts)))
        if largest >= config.vocab_size:
            raise ValueError(
                f"`--data` must hold tokens of the model's {config.vocab_size} entries, got token "
                f"{largest}"
            )
    console = Console()
    with _progress(console) as say:
        evaluation = evaluate(model, folder, digest, parts, texts, options, say)
    report(evaluation, options, folder, console)


def evaluate(
    model: Any,
    folder: Path,
    digest: str,
    parts: tuple[Part, ...],
    texts: Windows | None,
    options: Options,
    say: Any,
) -> Evaluation:
    """Evaluate the given parts."""
    config = model.config.get_text_config()
    loss, scores, heads, tasks = None, None, None, None
    if "loss" in parts:
        assert texts is not None
        count_of = len(texts)
        loss = validation_loss(
            model,
            texts,
            batch=options.batch,
            edges=position_edges(texts.context, PARTS_OF_CONTEXT),
            on_window=lambda done: say("loss", done / count_of),
        )
        if not math.isfinite(loss.loss.mean):
            raise ValueError(f"{folder} must give finite losses, got {loss.loss.mean}")
    if "recall" in parts:
        assert texts is not None
        rows = torch.stack([texts[k % len(texts)]["input_ids"] for k in range(options.items)])
        asked = list(questions(config.vocab_size, texts.context, rows, options.items, options.seed))
        done = itertools.count(1)
        scores = recall(
            model,
            asked,
            tokens=options.batch * texts.context,
            on_score=lambda score: say("recall", next(done) / len(asked)),
        )
    if "heads" in parts:
        assert texts is not None
        some = [texts[k]["input_ids"] for k in range(min(HEAD_ROWS, len(texts)))]
        heads = head_statistics(model, torch.stack(some))
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
    attention = attention_name(config)
    return Evaluation(str(folder), digest, attention, loss, scores, heads, tasks)


def report(evaluation: Evaluation, options: Options, folder: Path, console: Console) -> None:
    """Write JSON, Markdown and plot, and print the tables."""
    title = f"Evaluation of {model_title(folder)}"
    content = {
        "format": FORMAT,
        "version": 1,
        "command": spattention_command(),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "machine": machine(),
        **asdict(evaluation),
    }
    text = json.dumps(_numbers(content), indent=1, allow_nan=False)
    lines = [f"# {title}", "", f"`{content['command']}`", ""]
    lines += [f"Model `{folder}`, digest {evaluation.digest[:16]}.", ""]
    console.print(title, highlight=False, markup=False)
    for name, header, rows in tables_of(evaluation):
        lines += [f"## {name}", "", *table(header, rows), ""]
        shown = Table(title=name, title_justify="left")
        for column in header:
            shown.add_column(column, justify="left" if column == header[0] else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    picture = b""
    if evaluation.loss or evaluation.recall or evaluation.heads:
        figure = evaluation_figure(evaluation.loss, evaluation.recall, evaluation.heads, title)
        picture = picture_of(figure, 150)
        lines += ["![loss by position, recall, entropy of heads](evaluation.png)", ""]
    # All three are complete before the first is written.
    write_atomically(options.output / "evaluation.json", text + "\n")
    write_atomically(options.output / "evaluation.md", "\n".join(lines))
    if picture:
        write_atomically(options.output / "evaluation.png", picture)
    else:  # tasks alone; an older picture would be of other results
        (options.output / "evaluation.png").unlink(missing_ok=True)
    console.print(f"written to {options.output}", highlight=False)


def model_title(folder: Path) -> str:
    """A model's name that tells apart checkpoints of equal names: the end of its full path."""
    whole = folder.resolve()
    return f".../{'/'.join(whole.parts[-3:])}" if len(whole.parts) > 4 else str(whole)


def _numbers(content: Any) -> Any:
    """The content with null in place of NaN and infinity, which JSON does not have."""
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
        parts = [("all", found.loss)]
        parts += [
            (f"{near:,}" if far == near + 1 else f"{near:,} to {far - 1:,}", part)
            for near, far, part in zip(found.edges, found.edges[1:], found.parts)
        ]
        rows = [(name, _mean(part, 4), _perplexity(part)) for name, part in parts]
        yield "Validation loss, nats per token", ("position", "loss", "perplexity"), rows
    if evaluation.recall is not None:
        rows = [
            (
                _question(score),
                _mean(score.accuracy, 3),
                f"{score.chance:.3g}",
                _mean(score.loss, 3),
                beside_chance(score),
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
                beside_chance(score),
            )
            for score in evaluation.tasks
        ]
        yield "Tasks", ("task", "shots", "metric", "score", "chance", "items", ""), rows


def _check(options: Options, parts: tuple[Part, ...]) -> None:
    """Check the options that need no model."""
    if ("tasks" in parts) != bool(options.tasks):
        raise ValueError('`--parts` must name "tasks" if and only if there are `--tasks`')
    check_range(
        options,
        windows=(1, LARGEST),
        items=(1, LARGEST),
        batch=(1, LARGEST),
        limit=(1, LARGEST),
        seed=(0, LARGEST_SEED),
    )
    if not options.shots or not all(0 <= shots <= MOST_SHOTS for shots in options.shots):
        raise ValueError(
            f"`--shots` must be integers from 0 to {MOST_SHOTS}, got {list(options.shots)}"
        )
    if options.task_data is not None and not options.task_data.is_dir():
        raise ValueError(f"`--task-data` must be a folder, got {options.task_data}")
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"`--output` must be a folder, {options.output} is a file")


def _check_output(output: Path, folder: Path, digest: str, parts: tuple[Part, ...]) -> None:
    """Check that nothing is lost which the output folder holds."""
    file = output / "evaluation.json"
    if not file.exists():
        return
    found = read_json(file, LARGEST_JSON)
    advice = "name another folder, or give --replace"
    if found.get("format") != FORMAT:
        raise ValueError(f"`--output` holds {file}, which is no evaluation: {advice}")
    # Evaluations without a digest were written by earlier versions.
    same = found["digest"] == digest if "digest" in found else found.get("model") == str(folder)
    if not same:
        raise ValueError(
            f"`--output` {output} holds the evaluation of another model, {found.get('model')}, got "
            f"{folder}: {advice}"
        )
    lost = [part for part in PARTS if part not in parts and found.get(part) is not None]
    if lost:
        raise ValueError(
            f"`--output` {output} holds results of the parts {lost}, which are not in `--parts` "
            f"{list(parts)}: {advice}"
        )


def _data(options: Options, folder: Path) -> Path:
    """The held-out text: what `--data` names, or the validation data of the run itself."""
    path = options.data
    if path is None and _is_prepared(options.checkpoint / "data"):  # of a comparison
        return options.checkpoint / "data"
    if path is None:
        named = _data_of_run(folder.parent)
        if len(named) != 1 or not _is_prepared(named[0]):
            raise ValueError(
                f"`--data` must name held-out text: {options.checkpoint} is neither a comparison "
                "with data nor of a run on one prepared folder that is still there"
            )
        return named[0]
    if path.name.endswith(SUFFIX) or _is_prepared(path):
        return path
    if is_text(path):
        open_tokenizer(folder)
        return path
    raise ValueError(
        f"`--data` must be text (.txt, .jsonl), a token file ({SUFFIX}) or a folder that "
        f"`spattention prepare` wrote, got {path}"
    )


def _data_of_run(run: Path) -> list[Path]:
    """The data that a training run takes its validation loss over; empty if there is no run."""
    if not (run / "run.json").is_file():
        return []
    recipe = read_json(run / "run.json", LARGEST_JSON).get("recipe")
    named = (recipe.get("validation") or recipe.get("data")) if isinstance(recipe, dict) else None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{run / 'run.json'} must hold the recipe of a run with its `data`")
    return [Path(name) for name in named]


def _is_prepared(path: Path) -> bool:
    return (path / "facts.json").is_file()


def _text(path: Path, folder: Path) -> TokenStream:
    if not path.name.endswith(SUFFIX) and not _is_prepared(path):
        return tokenize_text(path, open_tokenizer(folder))
    own = folder / "tokenizer.json"
    if own.is_file():
        check_same_tokenizer(path, load_tokenizer(own).get_vocab())
    return open_tokens(path, "validation")


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
        return f"copying, {score.setting:,.0f} back"
    if score.task == "pairs":
        return f"{score.setting:,.0f} pairs"
    return f"needle at {100 * score.setting:.0f} %"


def beside_chance(score: Score | TaskScore) -> str:
    """The remark on a score that is not above guessing."""
    if score.below_chance:
        return "below chance"
    return "near chance" if score.near_chance else ""


def _mean(value: Mean, digits: int) -> str:
    return f"{value.mean:{_style(value.mean, digits)}} ± {value.error:{_style(value.mean, digits)}}"


def _perplexity(loss: Mean) -> str:
    value = math.exp(min(loss.mean, 700.0))  # no overflow
    return f"{value:{_style(value, 2)}}"


def _style(value: float, digits: int) -> str:
    # The perplexity of an untrained model runs to millions.
    return f".{digits}f" if abs(value) < 1e4 else ".3g"
