"""One run of a comparison: a fresh model, one attention, one seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments, logging, set_seed

from ..choice import attention_choice
from ..data.prepare import open_facts, open_stream
from ..data.tokenizer import for_transformers, load_tokenizer
from ..data.tokens import InOrder, TokenStream, Windows
from ..models import build, preset
from .callbacks import Event, LossRecorder, OrderDigest
from .memory import peak_resident_bytes, resident_bytes
from .settings import Settings
from .trainer import make_trainer
from .trainer_arguments import make_arguments

PROMPT_TOKENS = 40
CONTINUATION_TOKENS = 100


@dataclass(frozen=True)
class Job:
    """A run of a comparison that is to be trained.

    Args:
        attention: name for `attention_choice`.
        seed: RNG seed of the weights and of the order of the data.
        settings: settings that all runs share.
        data: folder that `prepare` wrote.
        models: folder of the trained models, each in its own subfolder.
    """

    attention: str
    seed: int
    settings: Settings
    data: Path
    models: Path

    @property
    def name(self) -> str:
        """Name of the run, unique in its comparison and fit for a file's name."""
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.attention)
        return f"{plain}-seed{self.seed}"

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        return self.models / self.name


@dataclass(frozen=True)
class Result:
    """Result of a run. Losses in nats per token, memory in bytes, pairs per layer and window."""

    attention: str
    seed: int
    context: int
    parameters: int
    validation_loss: float
    train_losses: list[tuple[int, float]]
    validation_losses: list[tuple[int, float]]
    tokens_per_second: float
    seconds: float
    pairs: int
    memory_before: int | None
    memory_peak: int | None
    memory_kind: str
    order: str
    model: str
    prompt: str | None
    continuation: str | None


def run(job: Job, send: Callable[[Event], None]) -> Result:
    """Train, evaluate, save, continue a text. Memory is that of the whole process."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.perf_counter()
    settings = job.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    before = resident_bytes()
    chosen = preset(
        settings.model,
        vocab_size=settings.vocabulary,
        context=settings.context,
        num_layers=settings.layers,
    )
    attention = attention_choice(job.attention, chosen.pattern.num_heads, settings.context)
    set_seed(job.seed)  # every variant starts from the same weights
    model = build(chosen, pattern=None)
    attention.apply(model)

    windows = Windows(open_stream(job.data, "train"), settings.context)
    train = InOrder(windows, settings.steps * settings.batch, job.seed)
    held_out = open_stream(job.data, "validation")
    validation = Windows(held_out, settings.context, settings.validation_windows)
    losses = LossRecorder(settings.batch * settings.context, send)
    order = OrderDigest(model)
    trainer = make_trainer(model, _arguments(job), train, validation, [losses])
    trainer.train()
    if not losses.validation_losses or losses.validation_losses[-1][0] != settings.steps:
        trainer.evaluate()
    peak = peak_resident_bytes()
    kind = "resident set of the run's own process"
    if torch.cuda.is_available():
        before, peak, kind = 0, torch.cuda.max_memory_allocated(), "tensors on the GPU"

    end = open_facts(job.data).end_of_text
    prompt, continuation = _continue(job, model, held_out, end)
    model.config.eos_token_id = model.generation_config.eos_token_id = end  # generation stops there
    model.save_pretrained(job.model)
    return Result(
        attention=job.attention,
        seed=job.seed,
        context=settings.context,
        parameters=model.num_parameters(),
        validation_loss=losses.validation_losses[-1][1],
        train_losses=losses.train_losses,
        validation_losses=losses.validation_losses,
        tokens_per_second=losses.tokens_per_second,
        seconds=time.perf_counter() - began,
        pairs=attention.pairs(settings.context),
        memory_before=before,
        memory_peak=peak,
        memory_kind=kind,
        order=order.close(),
        model=job.name,
        prompt=prompt,
        continuation=continuation,
    )


def _arguments(job: Job) -> TrainingArguments:
    """The order of windows depends on the seed and the data alone, never on the model."""
    settings = job.settings
    return make_arguments(
        job.model,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        warmup=max(1, settings.steps // 10),
        seed=job.seed,
        train_sampling_strategy="sequential",  # `InOrder` has the order
        adam_beta2=0.98,  # short runs: the average over 1 / (1 - 0.98) = 50 steps
        logging_steps=max(1, settings.steps // 60),
        eval_strategy="steps",
        eval_steps=max(1, -(-settings.steps // settings.evaluations)),
    )


def _continue(
    job: Job, model: PreTrainedModel, held_out: TokenStream, end_of_text: int | None
) -> tuple[str | None, str | None]:
    """The first words of the validation text and what the model makes of them: always as many
    tokens, past the end of a text too.

    Both are None without a tokenizer.
    """
    path = job.data / "tokenizer.json"
    if not path.exists():
        return None, None
    context = job.settings.context
    tokenizer = for_transformers(load_tokenizer(path), context, end_of_text)
    tokenizer.save_pretrained(job.model)
    text = tokenizer.decode(held_out.tokens[: min(PROMPT_TOKENS, context // 2)].tolist())
    prompt = text.rsplit(maxsplit=1)[0] or text  # the last word may be cut
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    model.eval()
    set_seed(job.seed)
    tokens = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max(1, min(CONTINUATION_TOKENS, context - length)),
        do_sample=True,
        temperature=0.7,
        top_k=40,
    )[0]
    return prompt, tokenizer.decode(tokens[length:])
