"""A run of a recipe: data, model, precision, Trainer, and where it left off."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    logging,
    set_seed,
)

from .. import baselines, hf
from ..choice import AttentionChoice, Other
from ..data.tokens import InOrder
from ..data.training import TrainingData, open_training
from ..hf.config import read_section, remove_section
from ..models import SHAPES, build, preset
from .callbacks import Event
from .checkpoints import STAGING, checkpoints, clean, newest_good, step_of
from .layers import is_stock, recipe_attention
from .loss import defer_loss
from .precision import sharded_precision, to_bfloat16
from .recipe import Recipe
from .record import Record, recorded_step
from .results import LOCK, held, write_atomically
from .router import balance_routers
from .setup import make_arguments, make_trainer
from .watch import Guard, Intervals, Keeper, Metrics, Speed, TimeLimit
from .work import active_parameters, work_per_token

MARK = "run.json"
GRAPHS_PER_LAYER = 8  # PyTorch's limit for one function; training and evaluation need two to four


@dataclass(frozen=True)
class Outcome:
    """Where a run stands: `step` of `steps`, and its folder."""

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
) -> Outcome:
    """Train, or go on where an earlier call with this folder stopped or was killed.

    Args:
        recipe: what to do.
        folder: checkpoints, metrics and results; new, or of an earlier call.
        minutes: save and stop after so long; None goes on to the end.
        command: to record; the command line, if there was one.
        send: called on the first rank with what happens: `{"kind": "begin" | "note" | "step" |
            "log", ...}`.

    Raises:
        ValueError: before training starts, if recipe, data and folder do not go together.
        Diverged: if the loss is no number any more or rises and stays there.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if recipe.wandb and find_spec("wandb") is None:
        raise ValueError("`wandb` must be false where the package wandb is missing, got true")
    arguments = _arguments(recipe, folder)  # also joins the other processes
    passes = recipe.passes(arguments.world_size)
    _needs_masters(recipe, arguments.world_size)  # raises before anything is read or written
    data = open_training(
        recipe.data,
        recipe.validation,
        context=recipe.context,
        end_of_text=recipe.end_of_text,
        across_documents=recipe.across_documents,
        held_out=recipe.held_out,
        limit=recipe.validation_windows or None,
    )
    first = arguments.process_index == 0
    _check_folder(recipe, folder, data)
    arguments.gradient_accumulation_steps = passes
    with held(folder) if first else nullcontext():
        return _train(recipe, folder, arguments, data, minutes, command, send)


def _train(
    recipe: Recipe,
    folder: Path,
    arguments: TrainingArguments,
    data: TrainingData,
    minutes: float | None,
    command: str | None,
    send: Callable[[Event], None],
) -> Outcome:
    """What is left of `pretrain`, once everything is checked and the folder is this run's alone."""
    first = arguments.process_index == 0
    passes = arguments.gradient_accumulation_steps
    set_seed(recipe.seed)
    model, attention = _model(recipe, data, arguments.device)
    resume, notes = _from_first_rank(lambda: _claim(recipe, folder, data), first)
    for note in notes if first else ():
        send({"kind": "note", "text": note})
    # What a pretrained model loses by new attention is seen before its first step.
    judged = data.validation is not None
    arguments.eval_on_start = judged and resume is None and recipe.model not in SHAPES
    if not judged:
        arguments.eval_strategy = IntervalStrategy.NO
    if resume is not None and recipe.parallel == "ddp":
        _load_weights(model, resume)

    facts = {
        "kind": "begin",
        "steps": recipe.steps,
        "step": step_of(resume) if resume else 0,
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
        "pairs_per_token": attention.pairs(recipe.context) / recipe.context,
        "tokens": data.tokens,
        "epochs": recipe.steps * recipe.batch / len(data.train),  # type: ignore[arg-type]
        "attention": attention.name,
        "devices": arguments.world_size,
    }
    if first:
        send(facts)
    if facts["step"] == recipe.steps == recorded_step(folder):  # finished before: nothing to do
        return Outcome(folder, recipe.steps, recipe.steps)
    watchers = _watchers(recipe, folder, model, attention, arguments.world_size, send)
    watchers.append(Record(recipe.to_dict(), folder, facts, command))
    if minutes is not None:
        watchers.append(TimeLimit(minutes))
    optimizer = prepare_model(recipe, model, passes, arguments.device, arguments.world_size)
    trainer = make_trainer(
        model,
        arguments,
        InOrder(data.train, recipe.steps * recipe.batch, recipe.seed),
        data.validation,
        watchers,
        optimizer=optimizer,
        tokenizer=_tokenizer(data, recipe),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    step = trainer.state.global_step
    if first:
        clean(folder)
    return Outcome(folder, step, recipe.steps)


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
    """Whether float32 weights are kept beside the model's; FSDP2 keeps its own."""
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
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"`compile` needs decoder layers, {type(model).__name__} names none")
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_LAYER * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    more: dict[str, Any] = {}
    by_torchrun = get_int_from_env(["WORLD_SIZE"], 0)  # processes; 0 without it
    launched = max(by_torchrun, 1)
    if launched > 1 and not torch.cuda.is_available():
        # Without it Accelerate does not join the processes, and each trains alone.
        more["use_cpu"] = True
    if recipe.parallel == "fsdp2":
        if not torch.cuda.is_available():
            # Accelerate would copy the model instead, without a word.
            raise ValueError('`parallel` must be "ddp" on the CPU, got "fsdp2"')
        if not by_torchrun:
            raise ValueError(
                '`parallel` = "fsdp2" needs `torchrun -m spattention train ...`, also for one '
                "process"
            )
        more["bf16"] = recipe.precision == "bfloat16"
        more["fsdp"] = True
        more["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "activation_checkpointing": recipe.checkpointing,
            "state_dict_type": "FULL_STATE_DICT",  # what `from_pretrained` opens
        }
    if recipe.shard_size:
        more["parallelism_config"] = _groups(recipe, launched)
    arguments = make_arguments(
        folder / STAGING,
        steps=recipe.steps,
        batch=recipe.micro_batch,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        seed=recipe.seed,
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate},
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_epsilon=recipe.epsilon,
        max_grad_norm=recipe.clip,
        train_sampling_strategy="sequential",  # `InOrder` has the order
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=recipe.log_every,
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        save_strategy="steps",
        save_steps=recipe.save_every,
        ddp_find_unused_parameters=False,
        **more,
    )
    if arguments.fsdp_plugin_args is not None:  # Accelerate's; the Trainer has no word for this one
        arguments.fsdp_plugin_args["mixed_precision_policy"] = sharded_precision(recipe.precision)
    if arguments.n_gpu > 1:
        raise ValueError(
            f"several GPUs need one process each: `torchrun --nproc-per-node {arguments.n_gpu} -m "
            "spattention train ...`, or CUDA_VISIBLE_DEVICES to use one"
        )
    if arguments.world_size != launched:
        raise RuntimeError(f"{launched} processes were launched, {arguments.world_size} joined")
    return arguments


def _groups(recipe: Recipe, devices: int) -> Any:
    """Accelerate's words for: sharded within groups of devices, copied between them."""
    from accelerate import ParallelismConfig

    if recipe.parallel != "fsdp2" or devices % recipe.shard_size:
        raise ValueError(
            '`shard_size` must divide the number of devices under `parallel` = "fsdp2", got '
            f'{recipe.shard_size} on {devices} devices under "{recipe.parallel}"'
        )
    return ParallelismConfig(
        dp_replicate_size=devices // recipe.shard_size, dp_shard_size=recipe.shard_size
    )


def _model(
    recipe: Recipe, data: TrainingData, device: torch.device
) -> tuple[PreTrainedModel, AttentionChoice]:
    if recipe.model in SHAPES:
        chosen = preset(
            recipe.model,
            vocab_size=recipe.vocabulary,
            context=recipe.context,
            num_layers=recipe.layers,
        )
        with device:  # weights are made where they are used
            model = build(chosen, pattern=None)
    else:
        model = _pretrained(recipe)
    config = model.config.get_text_config()
    if data.largest >= config.vocab_size:
        raise ValueError(
            f"`vocabulary` must be above the largest token of the data, {data.largest}, got "
            f"{config.vocab_size}"
        )
    section = read_section(config)
    if section is not None and section.sinks and not recipe.sinks:
        raise ValueError(
            f"`sinks` must be true: {recipe.model} was trained with sinks, which its other weights "
            'count on (`attention = "dense"` leaves them out); got false'
        )
    attention = recipe_attention(
        recipe.attention,
        config.num_hidden_layers,
        config.num_attention_heads,
        recipe.context,
        sinks=recipe.sinks,
    )
    if not recipe.across_documents and isinstance(attention, Other):
        raise ValueError(
            f"`across_documents` must be true with {attention.name}, which knows no documents, "
            "got false"
        )
    attention.apply(model)
    if data.end_of_text is not None:
        model.config.eos_token_id = data.end_of_text
        if model.generation_config is not None:
            model.generation_config.eos_token_id = data.end_of_text
    return model, attention


def _pretrained(recipe: Recipe) -> PreTrainedModel:
    for name in ("layers", "vocabulary"):
        if getattr(recipe, name) is not None:
            raise ValueError(
                f"`{name}` is for presets {list(SHAPES)}, {recipe.model} has its own, got "
                f"{getattr(recipe, name)}"
            )
    hf.register()
    baselines.register()
    options: dict[str, Any] = {}
    try:
        if is_stock(recipe.attention):  # also of a model that had other attention
            config = AutoConfig.from_pretrained(recipe.model)
            remove_section(config)
            options = {"config": config, "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32, **options)
    except OSError as error:
        raise ValueError(
            f"`model` must be one of {list(SHAPES)} or a pretrained model, got {recipe.model!r}: "
            f"{error}"
        ) from error
    if any(".experts." in name for name, _ in model.named_parameters()):
        model.set_experts_implementation("grouped_mm")
    # Some know no longest text.
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is not None and recipe.context > length:
        raise ValueError(f"`context` must be at most the model's {length}, got {recipe.context}")
    return model


def _load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Give a model the weights of a checkpoint, all of them.

    The Trainer's own loading is not strict, and passes over experts: they are saved one by one, as
    on the hub, and only `from_pretrained` joins them again.
    """
    hf.register()
    found = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.load_state_dict(found.state_dict())


def _tokenizer(data: TrainingData, recipe: Recipe) -> PreTrainedTokenizerBase | None:
    if data.tokenizer is None:
        return None
    from ..data.tokenizer import for_transformers, load_tokenizer

    return for_transformers(load_tokenizer(data.tokenizer), recipe.context, data.end_of_text)


def _check_folder(recipe: Recipe, folder: Path, data: TrainingData) -> None:
    mark = folder / MARK
    if not mark.exists():
        if folder.exists() and any(p.name not in (STAGING, LOCK) for p in folder.iterdir()):
            raise ValueError(
                f"`--output` must be a new or empty folder, or an earlier run's; {folder} holds "
                "other files"
            )
        return
    found = json.loads(mark.read_text(encoding="utf-8"))
    different = recipe.differences(found["recipe"])
    # Runs that began before `contents` was written have the digest alone.
    if found["data"] != data.digest or found.get("contents", data.contents) != data.contents:
        different.append("the data is another")
    if different:
        raise ValueError(
            f"`--output` {folder} holds a run of another recipe ({'; '.join(different)}): name "
            "another folder"
        )


def _claim(recipe: Recipe, folder: Path, data: TrainingData) -> tuple[Path | None, list[str]]:
    """Mark the folder and find where to go on; what is damaged is named and put aside."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    content = {
        "version": 1,
        "recipe": recipe.to_dict(),
        "data": data.digest,
        "contents": data.contents,
    }
    write_atomically(folder / MARK, json.dumps(content, indent=2) + "\n")
    resume, problems = newest_good(folder)
    notes = [f"damaged checkpoint: {problem}" for problem in problems]
    for path in checkpoints(folder) if problems else ():
        if resume is None or step_of(path) > step_of(resume):
            path.rename(_free(path.with_name(f"damaged-{path.name}")))
    if resume is not None:
        notes.append(f"going on from {resume}")
    elif problems:
        notes.append("no checkpoint is whole: beginning anew")
    return resume, notes


def _free(path: Path) -> Path:
    """The path, or that with the first number behind it that is not taken."""
    taken = itertools.count(2)
    found = path
    while found.exists():
        found = path.with_name(f"{path.name}-{next(taken)}")
    return found


def _from_first_rank(
    find: Callable[[], tuple[Path | None, list[str]]], first: bool
) -> tuple[Path | None, list[str]]:
    """What `find` gives on the first rank, on every rank: they must go on from the same step."""
    found = [find() if first else None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def _watchers(
    recipe: Recipe,
    folder: Path,
    model: PreTrainedModel,
    attention: AttentionChoice,
    devices: int,
    send: Callable[[Event], None],
) -> list[TrainerCallback]:
    watchers: list[TrainerCallback] = [
        Intervals(),
        Guard(recipe.divergence),
        Speed(
            recipe.batch * recipe.context,
            work_per_token(model, attention, recipe.context),
            recipe.peak_tflops * 1e12 * devices,
        ),
        Metrics(folder, send),
        Keeper(folder / STAGING, folder, recipe.keep),
    ]
    if recipe.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        watchers.append(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"))))
    if recipe.wandb:
        from transformers.integrations import WandbCallback

        watchers.append(WandbCallback())
    return watchers
