"""The losses of runs that `spattention train` recorded, as a picture and a table.

    python -m benchmarks.losses recipes/olmoe-0.25b-1.75b.*.losses.json \
        --output docs/images/olmoe-0.25b-1.75b.png
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib
import tyro
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Options:
    """Draw the losses of runs, and print their ends as a table.

    Args:
        files: losses.json of runs with equal data.
        output: PNG file.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    output: Annotated[Path, tyro.conf.arg(metavar="PNG")]


def main(options: Options) -> None:
    """Read, check, draw, print."""
    if not options.files:
        raise SystemExit("`files` must name at least one losses.json, got none")
    runs = [read(path) for path in options.files]
    different = {json.dumps(run["recipe"] | {"attention": None}) for run in runs}
    if len(different) > 1:
        raise SystemExit("the runs must have one recipe but for `attention`")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure(runs).savefig(options.output, dpi=150)
    print("| attention | validation loss | tokens/s | MFU |\n|---|---|---|---|")
    for run in runs:
        speed, mfu = (
            median(e[name] for e in run["train"][1:]) for name in ("tokens_per_second", "mfu")
        )
        loss = run["validation"][-1]["eval_loss"]
        print(f"| `{run['facts']['attention']}` | {loss:.3f} | {speed:,.0f} | {100 * mfu:.1f} % |")


def read(path: Path) -> dict[str, Any]:
    """A run's record."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != "spattention-run":
        raise SystemExit(f"{path} must be a run's losses.json")
    return content


def figure(runs: list[dict[str, Any]]) -> Figure:
    """Losses over tokens on the left, the norm of the gradients on the right."""
    found = Figure(figsize=(11, 4.2), layout="constrained")
    losses, norms = found.subplots(1, 2, width_ratios=[1.25, 1])
    for run, color in zip(runs, cycle(matplotlib.color_sequences["tab10"])):
        per_step = run["recipe"]["batch"] * run["recipe"]["context"] / 1e6
        name = run["facts"]["attention"]
        train, validation = run["train"], run["validation"]
        tokens = [entry["step"] * per_step for entry in train]
        losses.plot(tokens, [e["loss"] for e in train], color=color, alpha=0.4, linewidth=1)
        losses.plot(
            [entry["step"] * per_step for entry in validation],
            [entry["eval_loss"] for entry in validation],
            "o-",
            color=color,
            markersize=4,
            label=name,
        )
        norms.semilogy(tokens, [e["grad_norm"] for e in train], color=color, linewidth=1)
    losses.set(xlabel="million tokens", ylabel="loss (nats per token)")
    losses.set_title("loss on validation (dots) and training text (faint)", fontsize=10)
    losses.legend(fontsize=8, frameon=False)
    norms.set(xlabel="million tokens", ylabel="norm of the gradients")
    norms.set_title("before clipping", fontsize=10)
    for axis in (losses, norms):
        axis.spines[["top", "right"]].set_visible(False)
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
