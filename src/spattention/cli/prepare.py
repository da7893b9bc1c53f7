"""`spattention prepare`: turn text into tokens for `spattention train`."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..data.corpus import open_source, prepare_corpus
from ..data.text import sample_path
from ..data.tokenizer import END_OF_TEXT, find_tokenizer
from ..files import counted
from .options.prepare import Options

FEW = 2048  # validation tokens; one window of many recipes is longer


def main(options: Options) -> None:
    """Tokenize and print the number of tokens."""
    console = Console()
    named = str(sample_path()) if options.source is None else options.source
    tokenizer = None if options.tokenizer is None else find_tokenizer(options.tokenizer)
    source = open_source(
        named,
        name=options.name,
        split=options.split,
        column=options.column,
        streaming=options.streaming,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,.0f} documents, {task.fields[tokens]:,} tokens,"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tokenizing", total=source.total, tokens=0)
        facts = prepare_corpus(
            options.output,
            source,
            tokenizer=tokenizer,
            vocabulary=options.vocabulary,
            end_of_text=END_OF_TEXT if options.end_of_text is None else options.end_of_text,
            held_out=options.held_out,
            on_progress=lambda documents, tokens: progress.update(
                task, completed=documents, tokens=tokens
            ),
        )
    console.print(
        f"{options.output}: {facts.train_tokens:,} training tokens in "
        f"{counted(facts.train_documents, 'document')}, {facts.validation_tokens:,} validation "
        f"tokens in {facts.validation_documents:,}; {facts.vocabulary:,} entries, end of text "
        f"{facts.end_of_text}.",
        highlight=False,
    )
    if 0 < facts.validation_tokens < FEW:
        console.print(
            f"Few validation tokens: the `context` of a run must be at most "
            f"{facts.validation_tokens:,}. A larger `--held-out` keeps more.",
            highlight=False,
        )
