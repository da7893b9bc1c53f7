"""A recipe: everything that decides a run, in one TOML file that is read from top to bottom."""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..files import shown
from .bounds import BOUNDS, check_bounds

# Fields that may change when a run continues. None changes what is computed, except for rounding
# and, with `micro_batch`, for the balance loss, which is taken per pass.
FREE = frozenset(
    {
        *("data", "validation", "micro_batch", "compile", "checkpointing", "loss", "workers"),
        *("threads", "log_every", "evaluate_every", "save_every", "keep", "tensorboard", "wandb"),
        *("divergence", "peak_tflops", "shard_size", "cuda_graphs"),
    }
)
RECIPE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run of `spattention train`. `bounds.BOUNDS` has the range of every number.

    Args:
        model: a preset of `spattention.models`; or a folder or a name on the hub of a pretrained
            model to continue from.
        layers: decoder layers, instead of the preset's; a pretrained model keeps its own.
        vocabulary: entries of the embedding, in the same way.
        attention: dense, a pattern, a baseline or a related system, as `spattention compare` names
            them; one, or a list of dense and patterns with one per layer.
        sinks: whether layers with a pattern have attention sinks.
        first_attention: attention of the first steps, named as `attention`; it then changes to
            that. Both are then dense or patterns, and dense layers run as a band of all distances.
        first_steps: number of these steps.
        data: folders that `spattention prepare` wrote, and token files (.u16.xz).
        validation: the same, for the validation loss; empty for what the folders of `data` hold
            out, or else a share of its streams.
        held_out: that share, by documents; 0 for none.
        end_of_text: the token between documents of token files whose JSON does not name it.
        across_documents: whether tokens attend earlier documents in their window.
        context: tokens per window, and the span of the patterns.
        steps: optimizer steps.
        batch: windows per step, over all devices.
        micro_batch: windows per device and pass; a step takes batch / (micro_batch * devices)
            passes.
        learning_rate: peak learning rate.
        final_learning_rate: learning rate at the end, as a share of the peak; cosine decay.
        warmup: steps of linear warm-up.
        weight_decay: decay of tensors with at least two dimensions.
        beta1: AdamW's decay of the average of gradients.
        beta2: AdamW's decay of the average of their squares.
        epsilon: AdamW's epsilon.
        clip: largest norm of the gradients.
        balance_loss: weight of the router's balance loss, over the windows of a pass.
        z_loss: weight of the router's z-loss.
        seed: RNG seed of the weights and of the order of the windows.
        precision: dtype of the products. "bfloat16" keeps float32 weights, gradients and optimizer
            state next to bfloat16 weights that the products use; "float32" has these alone.
        loss: "plain" makes all logits at once, "chunked" some thousand rows at a time, "liger"
            likewise with Liger's kernels (GPU; package liger-kernel).
        compile: compile each layer, and under "ddp" the chunks of the loss.
        cuda_graphs: replay forward and backward pass as one CUDA graph, which needs one GPU, a loss
            other than "liger" and no checkpointing. "auto" does with `compile` where that is
            possible, and says why not; true raises where it is not.
        checkpointing: keep each layer's input alone and recompute the rest.
        parallel: "ddp" copies the model to each device, "fsdp2" shards it.
        shard_size: devices that share one copy under "fsdp2", such as those of a node; whole copies
            are then averaged between the groups. 0 shards over all.
        workers: data loader processes per device.
        threads: CPU threads of each process; 0 for PyTorch's choice, usually one per core. More
            gain little with a small model, and cost much on a busy machine.
        log_every: steps between two lines of metrics.
        evaluate_every: steps between two validation losses.
        validation_windows: windows of the validation loss; 0 for all.
        save_every: steps between two checkpoints.
        keep: number of checkpoints to retain.
        tensorboard: whether to write for TensorBoard.
        wandb: whether to report to Weights & Biases.
        divergence: nats above its best at which the loss stops the run; 0 disables the check.
        peak_tflops: peak of one device, in TFLOP/s, for MFU.
    """

    model: str
    layers: int | None = None
    vocabulary: int | None = None
    attention: str | tuple[str, ...] = "shared_local"
    sinks: bool = False
    first_attention: str | tuple[str, ...] | None = None
    first_steps: int | None = None
    data: tuple[str, ...]
    validation: tuple[str, ...] = ()
    held_out: float = 0.005
    end_of_text: int | None = None
    across_documents: bool = True
    context: int
    steps: int
    batch: int
    micro_batch: int = 1
    learning_rate: float
    final_learning_rate: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0
    balance_loss: float = 0.01
    z_loss: float = 0.001
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    loss: Literal["plain", "chunked", "liger"] = "chunked"
    compile: bool = False
    cuda_graphs: Literal[True, False, "auto"] = False
    checkpointing: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    shard_size: int = 0
    workers: int = 0
    threads: int = 1
    log_every: int = 10
    evaluate_every: int = 500
    validation_windows: int = 128
    save_every: int = 500
    keep: int = 2
    tensorboard: bool = True
    wandb: bool = False
    divergence: float = 2.0
    peak_tflops: float = 700.0

    def __post_init__(self) -> None:
        check_bounds(self, (f.name for f in fields(self) if f.name in BOUNDS))
        if self.batch % self.micro_batch:
            raise ValueError(
                f"`micro_batch` must divide the batch of {self.batch}, got {self.micro_batch}"
            )
        if (self.first_attention is None) != (self.first_steps is None):
            raise ValueError(
                "`first_attention` and `first_steps` must be given together, got "
                f"{self.first_attention!r} and {self.first_steps}"
            )
        if self.first_steps is not None and self.first_steps >= self.steps:
            raise ValueError(
                f"`first_steps` must be less than `steps` = {self.steps}, got {self.first_steps}"
            )
        if self.first_attention is not None and self.parallel == "fsdp2":
            raise ValueError(
                '`first_attention` must be left out under `parallel` = "fsdp2", which shards the '
                f"model before attention could change; got {self.first_attention!r}"
            )

    def passes(self, devices: int) -> int:
        """Forward and backward passes of each device in one step."""
        at_once = self.micro_batch * devices
        if self.batch % at_once:
            raise ValueError(
                f"`batch` must be a multiple of micro_batch x devices = {self.micro_batch} x "
                f"{devices}, got {self.batch}"
            )
        return self.batch // at_once

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Fields that prevent a run of `other`, a `to_dict`, from continuing with this recipe."""
        mine = self.to_dict()
        return [
            f"{name} was {other.get(name)!r}, now {mine[name]!r}"
            for name in mine
            if name not in FREE and mine[name] != other.get(name)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; tuples become lists."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def find_recipe(name: str) -> Path:
    """The recipe's file that a user names: a path, or the name of one that the package ships.

    Raises:
        ValueError: if there is neither; the message lists the names.
    """
    if (path := Path(name)).exists():
        return path
    known = {each.stem: each for each in shipped_recipes()}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"`RECIPE` must be a recipe in TOML or one of {', '.join(known)}; {name} is no file{hint}"
    )


def shipped_recipes() -> list[Path]:
    """The recipes of an installed package; those beside `src` in a checkout."""
    here = Path(__file__).parents[1]
    installed = here / "recipes"
    return sorted((installed if installed.is_dir() else here.parents[1] / "recipes").glob("*.toml"))


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `NAME=VALUE` changes.

    Args:
        path: the file. Paths in it are relative to the current folder.
        changes: each a field and its value, as TOML or as bare text: `steps=100`,
            `attention=dense`, `data=["a", "b"]`.

    Raises:
        ValueError: if the file cannot be read, or a field is unknown, missing or out of range.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a recipe in TOML: it is no file")
    size = path.stat().st_size
    if size > RECIPE_BYTES:
        raise ValueError(f"{path} must be a recipe of at most {RECIPE_BYTES} bytes, got {size}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a recipe in TOML: {error}") from error
    for change in changes:
        name, value = read_change(change)
        values[name] = value
    return recipe_from(values)


def read_change(change: str) -> tuple[str, Any]:
    """A field and its value, from `NAME=VALUE` with VALUE as TOML or as bare text."""
    name, equals, text = change.partition("=")
    if not equals:
        raise ValueError(f"`--set` takes NAME=VALUE, got {shown(change)}")
    return name.strip(), _value(text.strip())


def recipe_from(values: dict[str, Any]) -> Recipe:
    """The recipe of these fields, converted and checked."""
    hints = typing.get_type_hints(Recipe)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        name = unknown[0]
        close = difflib.get_close_matches(name, hints, n=1)
        known = f"did you mean `{close[0]}`?" if close else f"it has {', '.join(sorted(hints))}"
        raise ValueError(f"a recipe has no field {shown(name)}, {known}")
    missing = [f.name for f in fields(Recipe) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"a recipe must have the fields {missing}, they are missing")
    return Recipe(**{name: _convert(name, value, hints[name]) for name, value in values.items()})


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text  # a line's end may begin another entry


def _convert(name: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            # 1 is no true, and 0 no false.
            if any(type(value) is type(each) and value == each for each in typing.get_args(kind)):
                return value
        elif typing.get_origin(kind) is tuple:
            items = (value,) if isinstance(value, str) and str not in kinds else value
            if isinstance(items, (list, tuple)) and all(isinstance(i, str) for i in items):
                return tuple(items)
        elif kind is float and type(value) is int:
            return (
                float(value) if abs(value) < 2**53 else value
            )  # what no float holds, no bounds do
        elif type(value) is kind:
            return value
    if typing.get_origin(hint) is Literal:
        wanted = f"one of {list(typing.get_args(hint))}"
    else:
        wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ValueError(f"`{name}` must be {wanted}, got {shown(value)}")
