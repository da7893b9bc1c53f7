"""Training by a recipe: data, model, precision, Trainer, and the checkpoint to continue from."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
    set_seed,
)

from ..choice import MOST_EQUAL, AttentionChoice, BandAttention, pattern_remarks
from ..compat.huggingface import decoder_layer_names
from ..compat.pytorch import raise_recompile_limit
from ..data.tokens import InOrder
from ..data.training import TrainingData, open_training
from ..models import SHAPES, parameters_of
from .callbacks import (
    CheckpointCallback,
    DivergenceCallback,
    Event,
    IntervalCallback,
    MetricsCallback,
    SwitchCallback,
    ThroughputCallback,
    TimeLimitCallback,
)
from .checkpoints import STAGING, clean, step_of
from .experts import simplify_experts
from .graphs import asks_for_graphs, refusal
from .layers import Layered
from .load import (
    check_memory,
    first_attention,
    load_model,
    load_saved_tokenizer,
    load_weights,
)
from .lock import held
from .loss import check_loss, defer_loss
from .precision import to_bfloat16
from .recipe import Recipe
from .record import RecordCallback, recorded_step
from .router import balance_routers
from .run_folder import check_folder, claim
from .trainer import forget_graph, make_trainer
from .trainer_arguments import recipe_arguments
from .work import work_per_token

CPU_SPEED = 1e11  # FLOP/s of one thread at best
GRAPHS_PER_LAYER = 8  # PyTorch's limit for one function; training and evaluation need two to four


@dataclass(frozen=True)
class Outcome:
    """The folder of a run and how far it has come: `step` of `steps`."""

    folder: Path
    step: int
    steps: int

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def pretrain(
    recipe: Recipe,
    folder: Path,
    *,
    minutes: float | None = None,
    command: str | None = None,
    send: Callable[[Event], None] = lambda event: None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Train, or continue where an earlier call with this folder stopped or was killed.

    Under torchrun the process group stays open: end your script with
    `torch.distributed.destroy_process_group()`, as a rank that leaves it open may abort at exit.

    Args:
        recipe: model, data and settings of the run.
        folder: checkpoints, metrics and results; new, or of an earlier call.
        minutes: save and stop after this time; None trains to the end.
        command: command line to record, if there was one.
        send: called on the first rank with what happens: `{"kind": "begin" | "note" | "step" |
            "log", ...}`.
        callbacks: called before those that write, so that they may add to what is logged. They must
            not change what the model computes where passes are a CUDA graph.

    Raises:
        ValueError: before training starts, if recipe, data and folder do not go together, or a file
            is damaged.
        OSError: if a file cannot be written; the message names it.
        Diverged: if the loss is no number any more or rises and stays there.
    """
    if minutes is not None and not 0 <= minutes < math.inf:
        raise ValueError(f"`minutes` must be finite and not negative, got {minutes}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if recipe.wandb and find_spec("wandb") is None:
        raise ValueError("`wandb` must be false where the package wandb is missing, got true")
    arguments = recipe_arguments(recipe, folder / STAGING)  # also joins the other processes
    first = arguments.process_index == 0
    passes = recipe.passes(arguments.world_size)
    _needs_masters(recipe, arguments.world_size)  # raises before anything is read or written
    check_loss(recipe.loss, arguments.device)
    refusal(recipe, arguments.device, arguments.world_size)  # raises where graphs must be
    check_memory(recipe, arguments.device, arguments.world_size)
    data = open_training(
        recipe.data,
        recipe.validation,
        context=recipe.context,
        end_of_text=recipe.end_of_text,
        across_documents=recipe.across_documents,
        held_out=recipe.held_out,
        limit=recipe.validation_windows or None,
        check=arguments.local_process_index == 0,  # one process per node reads all tokens
        say=lambda text: send({"kind": "note", "text": text}) if first else None,
    )
    check_folder(recipe, folder, data)
    arguments.gradient_accumulation_steps = passes
    with held(folder) if first else nullcontext():
        return _train(recipe, folder, arguments, data, minutes, command, send, callbacks)


def _train(
    recipe: Recipe,
    folder: Path,
    arguments: TrainingArguments,
    data: TrainingData,
    minutes: float | None,
    command: str | None,
    send: Callable[[Event], None],
    more: Sequence[TrainerCallback],
) -> Outcome:
    """Build the model, continue from a checkpoint if there is one, and train.

    Called with the folder locked, after all checks.
    """
    first = arguments.process_index == 0
    passes = arguments.gradient_accumulation_steps
    set_seed(recipe.seed)
    model, attention = load_model(recipe, data, arguments.device)
    resume, notes = _from_first_rank(lambda: claim(recipe, folder, data), first)
    for note in notes if first else ():
        send({"kind": "note", "text": note})
    # What a pretrained model loses by new attention is seen before its first step.
    validates = data.validation is not None
    arguments.eval_on_start = validates and resume is None and recipe.model not in SHAPES
    if not validates:
        arguments.eval_strategy = IntervalStrategy.NO
    start = step_of(resume) if resume else 0
    callbacks = list(more)
    first_choice = first_attention(recipe, model)
    if first_choice is not None and recipe.first_steps is not None and start < recipe.first_steps:
        first_choice.apply(model)
        callbacks.append(
            SwitchCallback(model, attention, recipe.first_steps, lambda: forget_graph(trainer))
        )
    if resume is not None and recipe.parallel == "ddp":
        load_weights(model, resume)

    count = parameters_of(model)
    facts = {
        "kind": "begin",
        "steps": recipe.steps,
        "step": start,
        "parameters": count.total,
        "active_parameters": count.active,
        "pairs_per_token": attention.pairs(recipe.context) / recipe.context,
        "tokens": data.tokens,
        "epochs": recipe.steps * recipe.batch / len(data.train),  # type: ignore[arg-type]
        "attention": attention.name,
        "devices": arguments.world_size,
        "threads": torch.get_num_threads(),
    }
    if first:
        for text in _remarks(recipe, model, attention, data, arguments):
            send({"kind": "note", "text": f"warning: {text}"})
        send(facts)
    if facts["step"] == recipe.steps == recorded_step(folder):  # finished before: nothing to do
        return Outcome(folder, recipe.steps, recipe.steps)
    callbacks += _callbacks(recipe, folder, model, attention, facts, command, send)
    if minutes is not None:
        callbacks.append(TimeLimitCallback(minutes))
    optimizer = prepare_model(recipe, model, passes, arguments.device, arguments.world_size)
    wanted = asks_for_graphs(recipe)
    reason = refusal(recipe, arguments.device, arguments.world_size) if wanted else None

    def without_graph(why: str) -> None:
        if first:
            send({"kind": "note", "text": f"passes run without a CUDA graph: {why}"})

    if reason is not None:
        without_graph(reason)
    trainer = make_trainer(
        model,
        arguments,
        InOrder(data.train, recipe.steps * recipe.batch, recipe.seed),
        data.validation,
        callbacks,
        optimizer=optimizer,
        tokenizer=load_saved_tokenizer(data, recipe.context),
        without_graph=without_graph if wanted and reason is None else None,
    )
    _run(trainer, folder, resume)
    return Outcome(folder, trainer.state.global_step, recipe.steps)


def _remarks(
    recipe: Recipe,
    model: PreTrainedModel,
    attention: AttentionChoice,
    data: TrainingData,
    arguments: TrainingArguments,
) -> list[str]:
    """Remarks on a recipe that is valid and hardly meant."""
    found = []
    if arguments.device.type == "cpu":
        threads = arguments.world_size * torch.get_num_threads()
        tokens = recipe.steps * recipe.batch * recipe.context
        work = tokens * work_per_token(model, attention, recipe.context)
        days = work / (threads * CPU_SPEED * 86_400)
        if days > 1:
            found.append(
                f"this run takes {days:,.0f} days or more on the CPU, at "
                f"{CPU_SPEED / 1e9:.0f} GFLOP/s a thread: it needs a GPU, fewer steps, or a "
                "smaller model"
            )
    entries = -(-(data.largest + 1) // 64) * 64  # rounded up, as `prepare` says it
    size = model.config.get_text_config().vocab_size
    if recipe.model in SHAPES and recipe.vocabulary is None and entries < size:
        found.append(
            f"the data has tokens below {data.largest + 1:,}, and the model's embedding {size:,} "
            f"entries; `vocabulary = {entries}` leaves out those that no token uses"
        )
    patterns = [attention.pattern] if isinstance(attention, BandAttention) else []
    if isinstance(attention, Layered):
        patterns = [pattern for pattern in dict.fromkeys(attention.patterns) if pattern]
    for pattern in patterns:
        found += pattern_remarks(pattern, attention.name, MOST_EQUAL)
    return found


def _run(trainer: Trainer, folder: Path, resume: Path | None) -> None:
    """Train; what fails while a checkpoint is written says so, and nothing stays half written."""
    staging = folder / STAGING
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not staging.is_dir() or not any(staging.iterdir()):
            raise
        name = folder / f"checkpoint-{trainer.state.global_step}"
        free = shutil.disk_usage(folder).free
        raise OSError(f"{name} cannot be written, with {free:,} bytes free: {error}") from error
    finally:
        if trainer.is_world_process_zero():
            clean(folder)


def prepare_model(
    recipe: Recipe, model: Any, passes: int, device: torch.device, devices: int = 1
) -> torch.optim.Optimizer | None:
    """Put loss, auxiliary losses, precision and compilation into a float32 model, in place.

    Args:
        recipe: what to put in.
        model: as `build` made it; it moves to `device`.
        passes: forward passes per step on this device.
        device: where it is trained.
        devices: how many train together.

    Returns:
        The optimizer where the recipe needs one of its own, else None: the Trainer makes it.
    """
    masters = _needs_masters(recipe, devices)
    model.to(device)
    # Under FSDP2 the weight is a distributed tensor between the passes.
    defer_loss(model, recipe.loss, compiled=recipe.compile and recipe.parallel == "ddp")
    balance_routers(model, recipe.balance_loss, recipe.z_loss, passes)
    simplify_experts(model)
    optimizer = None
    if masters:
        optimizer = to_bfloat16(
            model,
            recipe.weight_decay,
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
        )
    if recipe.checkpointing and recipe.parallel == "ddp":
        # The newer name of the same thing, where there is one.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if recipe.compile:
        compile_layers(model)
    return optimizer


def _needs_masters(recipe: Recipe, devices: int) -> bool:
    """True if float32 weights are kept next to the model's; FSDP2 keeps its own."""
    if recipe.precision == "float32" or recipe.parallel == "fsdp2":
        return False
    if devices > 1:
        raise ValueError(
            '`precision` bfloat16 on several devices needs `parallel` = "fsdp2", whose mixed '
            f'precision keeps float32 weights; got "ddp" on {devices} devices'
        )
    return True


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer by itself: layers of the same bands share a compiled graph.

    The forward function is compiled, not the module: FSDP2's and checkpointing's hooks run around
    it. PyTorch runs a layer uncompiled beyond a limit of graphs, which is raised here where the
    model may need more.
    """
    names = decoder_layer_names(model)
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"`compile` needs decoder layers, {type(model).__name__} names none")
    raise_recompile_limit(GRAPHS_PER_LAYER * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def _from_first_rank(
    find: Callable[[], tuple[Path | None, list[str]]], first: bool
) -> tuple[Path | None, list[str]]:
    """Call `find` on the first rank and give all ranks its result: they continue from one step."""
    found = [find() if first else None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def _callbacks(
    recipe: Recipe,
    folder: Path,
    model: PreTrainedModel,
    attention: AttentionChoice,
    facts: Event,
    command: str | None,
    send: Callable[[Event], None],
) -> list[TrainerCallback]:
    """The callbacks of a run, in the order in which they are called."""
    metrics = MetricsCallback(folder, send)
    found: list[TrainerCallback] = [
        IntervalCallback(),
        DivergenceCallback(recipe.divergence),
        ThroughputCallback(
            recipe.batch * recipe.context,
            work_per_token(model, attention, recipe.context),
            recipe.peak_tflops * 1e12 * facts["devices"],
        ),
        metrics,
        CheckpointCallback(folder / STAGING, folder, recipe.keep),
    ]
    if recipe.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        found.append(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"))))
    if recipe.wandb:
        from transformers.integrations import WandbCallback

        found.append(WandbCallback())
    found.append(RecordCallback(recipe.to_dict(), folder, metrics, facts, command))
    return found
