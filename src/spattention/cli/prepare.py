"""`spattention prepare`: turn text into packed tokens for `spattention train`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..data.corpus import open_source, prepare_corpus
from ..data.tokenizer import END_OF_TEXT

# No dataset on the hub has a name that ends like this.
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".xz", ".gz", ".zst")


@dataclass(frozen=True)
class Options:
    """Tokenize text, on all cores, into a folder that `data` of a recipe can name.

    The text is read document by document, and the folder appears when it is complete. It holds
    training and validation tokens that are mapped into memory, the starts of their documents, the
    tokenizer, and a description (facts.json).

    Args:
        source: Text (.txt, documents separated by form feeds), JSON lines (.jsonl, with a "text"
            entry), a folder of these, .parquet, a folder that `datasets` saved, or the name of a
            dataset on the Hugging Face hub.
        output: Folder for the result; it must not exist.
        tokenizer: A tokenizer.json. Without it a byte-level BPE is trained on the first documents.
        vocabulary: Entries of the tokenizer that is trained.
        end_of_text: The token that ends a document, as the tokenizer writes it.
        held_out: Share of the documents that is kept for validation, spread evenly; 0 for none.
        name: The dataset's configuration, where it has several.
        split: The dataset's split.
        column: The entry of JSON lines or column of the dataset that holds the text.
        streaming: Read the dataset while it is downloaded, without a copy on disk.
    """

    source: Annotated[str, tyro.conf.Positional]
    output: Path
    tokenizer: Path | None = None
    vocabulary: int = 32768
    end_of_text: str = END_OF_TEXT
    held_out: float = 0.005
    name: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(options: Options) -> None:
    """Tokenize and print the number of tokens."""
    console = Console()
    _check_source(options.source)
    source = open_source(
        options.source,
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
            tokenizer=options.tokenizer,
            vocabulary=options.vocabulary,
            end_of_text=options.end_of_text,
            held_out=options.held_out,
            on_progress=lambda documents, tokens: progress.update(
                task, completed=documents, tokens=tokens
            ),
        )
    console.print(
        f"{options.output}: {facts.train_tokens:,} training tokens in {facts.train_documents:,} "
        f"documents, {facts.validation_tokens:,} validation tokens in "
        f"{facts.validation_documents:,}; {facts.vocabulary:,} entries, end of text "
        f"{facts.end_of_text}.",
        highlight=False,
    )


def _check_source(source: str) -> None:
    """Refuse a path that does not exist, before it is looked up as a dataset on the hub."""
    path = Path(source)
    looks_local = (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or ("/" in source and path.parent.is_dir())
        or path.suffix in SUFFIXES
    )
    if path.exists() or not looks_local:
        return
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    hint = f", did you mean {path.parent / close[0]}?" if close else ""
    raise ValueError(f"{source} is neither a file nor a folder{hint}")
