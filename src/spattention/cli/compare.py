"""`spattention compare`: one small model, trained with dense and with banded attention."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..choice import MOST_EQUAL, BandAttention, OtherAttention, attention_choice, pattern_remarks
from ..comparison.folder import ResultsFolder
from ..comparison.plan import Run, plan_of
from ..comparison.process import train_in_process
from ..comparison.report import HEADER, Report
from ..comparison.summary import check_equal_order
from ..data.prepare import CorpusFacts, open_stream, prepare
from ..data.tokenizer import find_tokenizer
from ..data.tokens import Windows
from ..models import build, preset
from ..provenance import spattention_command
from ..training.callbacks import Event
from ..training.lock import held
from .interrupt import Interrupts
from .options.compare import Options
from .progress import RunProgress

TITLE = "Dense and banded attention compared"
EVALUATIONS = 3  # validation losses of a run, the one at its end included


def main(options: Options) -> None:
    """Run what is missing, then report."""
    console = Console()
    remarks = _check(options)
    folder = ResultsFolder(options.output)
    with held(folder.path):
        _compare(options, folder, console, remarks)


def _compare(
    options: Options, folder: ResultsFolder, console: Console, remarks: Sequence[str]
) -> None:
    with folder.preparing() as prepared:
        facts = prepare(
            prepared,
            options.data,
            vocabulary=options.vocabulary,
            held_out=options.held_out,
            tokenizer=None if options.tokenizer is None else find_tokenizer(options.tokenizer),
            end_of_text=options.end_of_text,
        )
        shared = shared_fields(options, facts.vocabulary, folder.data)
        settings = {**shared, "data": facts.digest}  # what runs must share to be compared
        facts = evaluated_facts(options, prepared, facts)
        # Nothing is refused after this: what the folder held is replaced here at the earliest.
        folder.claim(settings, restart=options.restart)
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)
    runs = plan_of(TITLE, shared, options.patterns, options.seeds).runs
    console.print(
        f"Runs: {len(runs)}, each of {options.steps} steps on {facts.train_tokens:,} tokens "
        f"({facts.source}). Results go to {options.output}."
    )

    def report() -> Report:
        made = make_report(runs, folder, facts, settings)
        made.write(options.output)
        return made

    try:
        _run_missing(runs, folder, console, report)
    except KeyboardInterrupt:
        show(report(), options.output, console)
        console.print("Interrupted. The same command continues with the missing runs.")
        raise
    show(report(), options.output, console)


def evaluated_facts(options: Options, folder: Path, facts: CorpusFacts) -> CorpusFacts:
    """The facts with entropy and size of the evaluated windows."""
    # Both raise here if the text is too short, before any run does.
    Windows(open_stream(folder, "train"), options.context)
    held_out = open_stream(folder, "validation")
    used = Windows(held_out, options.context, options.validation_windows).used()
    return replace(facts, unigram_entropy=used.unigram_entropy(), validation_tokens=len(used))


def shared_fields(options: Options, vocabulary: int, data: Path) -> dict[str, Any]:
    """The fields of the recipe that all runs share."""
    evaluate_every = max(1, -(-options.steps // EVALUATIONS))
    return {
        "model": options.model,
        "layers": options.layers,
        "vocabulary": vocabulary,
        "data": [str(data)],
        "context": options.context,
        "steps": options.steps,
        "batch": options.batch,
        "micro_batch": options.batch,
        "learning_rate": options.learning_rate,
        "warmup": max(1, options.steps // 10),
        "beta2": 0.98,  # short runs: the average over 1 / (1 - 0.98) = 50 steps
        "balance_loss": 0.0,
        "z_loss": 0.0,
        "precision": "float32",
        "loss": "plain",
        "threads": options.threads,
        "log_every": max(1, options.steps // 60),
        "evaluate_every": evaluate_every,
        "validation_windows": options.validation_windows,
        "save_every": evaluate_every,
        "keep": 1,
        "tensorboard": False,
    }


def make_report(
    runs: Sequence[Run], folder: ResultsFolder, facts: CorpusFacts, settings: dict[str, Any]
) -> Report:
    """The report on what is finished."""
    results = folder.finished(runs)
    check_equal_order(results)
    done = {(r.attention, r.seed) for r in results}
    missing = [run.name for run in runs if (run.label, run.seed) not in done]
    return Report(facts, settings, results, missing, spattention_command())


def show(report: Report, output: Path, console: Console) -> None:
    """Print table, notes and a text."""
    if not report.results:
        return
    table = Table(title=TITLE, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    # Numbers are never broken but where they are here; names give way to them.
    for column, name in enumerate(HEADER):
        heading = name.replace(" ", "\n")
        if column:
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    for name, *cells in report.cells():
        broken = re.sub(r"(:|_(?=longformer|reformer))|(?=,)", r"\1\n", name)
        table.add_row(broken, *(cell.replace(" (", "\n(") for cell in cells))
    console.print(table)
    console.print()
    for note in report.notes():
        console.print(note, highlight=False, markup=False)
    shown = report.shown
    if shown is not None and shown.continuation:
        console.print(f"\nA text that {shown.attention} continues (in bold):", highlight=False)
        console.print(Text.assemble(shown.prompt or "", (shown.continuation, "bold")))
        console.print(
            f'\nTo continue: spattention generate {output} "It was a dark night"', highlight=False
        )
    for what, name in (("plot", "png"), ("page", "md"), ("numbers", "json")):
        console.print(f"{what}: {output / f'results.{name}'}", highlight=False)


def _check(options: Options) -> list[str]:
    """Check the options before any work; returns remarks on patterns that are hardly meant."""
    if not options.patterns or not options.seeds:
        raise ValueError("`--patterns` and `--seeds` must name at least one each")
    for name in ("patterns", "seeds"):
        values = getattr(options, name)
        if len(set(values)) != len(values):
            raise ValueError(
                f"`--{name}` must name each only once, got {' '.join(map(str, values))}"
            )
    for seed in options.seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"`--seeds` must be between 0 and 2**32 - 1, got {seed}")
    _ = Run("", 0, shared_fields(options, options.vocabulary, options.output)).recipe
    chosen = preset(options.model, context=options.context, num_layers=options.layers)
    choices = [
        attention_choice(attention, chosen.pattern.num_heads, options.context)
        for attention in options.patterns
    ]
    for choice in choices:
        if isinstance(choice, OtherAttention):
            # What it asks of a model is known before the first run.
            with torch.device("meta"):
                choice.apply(build(chosen, pattern=None))
    return [
        remark
        for choice in choices
        if isinstance(choice, BandAttention)
        for remark in pattern_remarks(choice.pattern, choice.name, MOST_EQUAL)
    ]


def _run_missing(
    runs: Sequence[Run],
    folder: ResultsFolder,
    console: Console,
    after_each: Callable[[], object],
) -> None:
    missing = [run for run in runs if folder.find(run) is None]
    if len(missing) < len(runs):
        console.print(f"Finished before: {len(runs) - len(missing)}.")
    with Interrupts() as interrupts, RunProgress(missing, console) as progress:

        def on_event(event: Event) -> None:
            interrupts.check()
            progress.update(event)

        for run in missing:
            interrupts.check()
            progress.begin(run)
            result = train_in_process(run, folder, on_event)
            folder.add(run, result)
            progress.finish(result)
            after_each()  # what is finished is readable, whatever happens next
