"""Options of `spattention prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...files import check_local

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
            entry), either compressed (.gz, .zst), a folder of these, .parquet, a folder that
            `datasets` saved, or the name of a dataset on the Hugging Face hub. Without it, the
            books that the package ships.
        output: Folder for the result; it must not exist.
        tokenizer: A tokenizer.json, a folder with one, or the name of a model on the hub. Without
            it a byte-level BPE is trained on the first documents.
        vocabulary: Entries of the tokenizer that is trained.
        end_of_text: The token that ends a document, as the tokenizer writes it; default
            <|endoftext|>.
        held_out: Share of the documents that is kept for validation, spread evenly; 0 for none. A
            single document is cut at a line's end. Small sources need more than the default.
        name: The dataset's configuration, where it has several.
        split: The dataset's split.
        column: The entry of JSON lines or column of the dataset that holds the text.
        streaming: Read the dataset while it is downloaded, without a copy on disk.
    """

    output: Path
    source: Annotated[str | None, tyro.conf.Positional] = None
    tokenizer: str | None = None
    vocabulary: int = 32768
    end_of_text: str | None = None
    held_out: float = 0.005
    name: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def check(options: Options) -> None:
    """Find the source, where it is a path, and see that the output is new."""
    if options.output.exists():
        raise ValueError(f"`--output` must be a new folder, {options.output} exists")
    if options.source is not None:
        check_local(options.source, "`SOURCE` must be text or a dataset on the hub", SUFFIXES)
