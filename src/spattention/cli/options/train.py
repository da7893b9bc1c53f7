"""Options of `spattention train`, with the fields of a recipe."""

from __future__ import annotations

import inspect
import itertools
import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from docstring_parser import parse

from ...training.recipe import Recipe, find_recipe, read_recipe, shipped_recipes


@dataclass(frozen=True)
class Options:
    """Pre-train or fine-tune a model by a recipe: a TOML file whose fields are named below.

    Ctrl-C or a crash loses the steps since the last checkpoint; the same command resumes from it.
    On several GPUs: torchrun --nproc-per-node 8 -m spattention train RECIPE.

    Args:
        recipe: The recipe's file, or the name of one that the package ships, such as tiny-cpu.
        set: Changes to the recipe, as in --set steps=100 attention=dense 'data=["a","b"]'.
        output: Folder for checkpoints and metrics; runs/NAME-OF-THE-RECIPE without it.
        minutes: Minutes after which to save and stop; the same command resumes.
    """

    recipe: Annotated[str, tyro.conf.Positional]
    set: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    output: Path | None = None
    minutes: float | None = None


def description() -> str:
    """The text of `--help`: the command, and the fields of a recipe from their docstrings."""
    about = inspect.cleandoc(Options.__doc__ or "").partition("\n\nArgs:")[0]
    said = {each.arg_name: each.description for each in parse(Recipe.__doc__ or "").params}
    lines = []
    for field in fields(Recipe):
        words = {MISSING: "required", None: "optional"}
        default = words.get(field.default) or f"default {json.dumps(field.default)}"
        lines.append(f"- {field.name} ({default}): {' '.join((said[field.name] or '').split())}")
    shipped = ", ".join(path.stem for path in shipped_recipes())
    about += f"\n\nThe package ships the recipes {shipped}."
    return "\n".join([about, "", "The fields of a recipe:", *lines])


def check(options: Options) -> None:
    """Find the recipe, and check the names and values of its fields."""
    read_recipe(find_recipe(options.recipe), list(itertools.chain.from_iterable(options.set)))
