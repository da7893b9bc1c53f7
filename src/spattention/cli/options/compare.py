"""Options of `spattention compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Train one small OLMoE language model several times, each with another attention, and compare.

    Without options: four public-domain books, dense attention against four patterns of bands at a
    context of 1,024 tokens, on the CPU, in about three minutes on two cores. It ends with a table,
    a plot, and a text that the trained model continues. Everything is written to the output folder.
    `spattention generate` opens the trained models in its `models` folder.

    Ctrl-C keeps the runs that are finished; the same command continues with those that are missing.

    Args:
        patterns: Attention of each run: dense, shared_local, exclusive, sliding_window, gapped,
            local_only, or a baseline: longformer, bigbird, reformer, published_longformer,
            published_bigbird, published_reformer, or a related system: mea, cca, rrattention,
            dga, elementwise, recurrent_near. Options follow a colon, as in
            shared_local:widths=geometric,prefix=4, sliding_window:window=128 or
            mea:norm=0,bands=exclusive; intervals writes out those of every head, as in
            intervals:heads=0-64+256-512. By default a sliding window is one token wider than a
            uniform band.
        steps: Optimizer steps of each run.
        seeds: Seeds of weights and data order. With two or more, differences within the spread
            between seeds are marked.
        context: Tokens per window, and the span of the patterns.
        batch: Windows per step.
        learning_rate: Peak of the learning rate.
        model: Preset of spattention.models.
        layers: Decoder layers; None for the preset's own number.
        data: Text (.txt, documents separated by form feeds), JSON lines (.jsonl, with a "text"
            entry), either compressed (.gz, .zst), a folder of these, or a token file (.u16.xz
            with its .json beside it). Without it, the sample that comes with the package.
        held_out: Share of the documents that is kept from training, for the validation loss.
        validation_windows: Upper bound on the number of windows of held-out text.
        vocabulary: Entries of the tokenizer that is trained on the text; not for a token file.
        tokenizer: A tokenizer.json, a folder with one, or the name of a model on the hub, to use
            instead. For a token file it is the one that made it; without it no text can be
            shown.
        end_of_text: The token between the documents of a token file, where its .json does not
            name it.
        threads: Threads of each run; 0 for one per core. The default model is so small that a
            second thread gains little, and costs much on a busy machine.
        output: Folder for results.json, results.md, results.png, and the trained models.
        restart: Remove the runs that the output folder holds.
    """

    patterns: tuple[str, ...] = (
        "dense",
        "shared_local",
        "shared_local:widths=geometric",
        "exclusive",
        "sliding_window",
    )
    steps: int = 240
    seeds: tuple[int, ...] = (0,)
    context: int = 1024
    batch: int = 1
    learning_rate: float = 6e-3
    model: str = "olmoe-tiny"
    layers: int | None = 2
    data: Path | None = None
    held_out: float = 0.1
    validation_windows: int = 40
    vocabulary: int = 512
    tokenizer: str | None = None
    end_of_text: int | None = None
    threads: int = 1
    output: Path = Path("spattention-compare")
    restart: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
