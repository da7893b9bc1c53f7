"""One run of a comparison: a recipe trained in its own folder, and a text that it continues."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, set_seed

from .. import baselines, hf
from ..data.prepare import open_facts, open_stream
from ..data.tokenizer import for_transformers, load_tokenizer
from ..files import write_atomically
from ..training.callbacks import Event, OrderCallback
from ..training.metrics import METRICS, read_metrics
from ..training.pretrain import pretrain
from ..training.record import LOSSES
from .folder import ResultsFolder
from .memory import peak_resident_bytes, resident_bytes
from .plan import Run
from .summary import Result

PROMPT_TOKENS = 40
CONTINUATION_TOKENS = 100


class StepClock(TrainerCallback):
    """Collects the seconds of each step, without loading data, logging, evaluating and saving."""

    warm_up = 3  # the first steps allocate

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)

    @property
    def median(self) -> float | None:
        """Seconds of the median step; None where no step was taken."""
        found = self.seconds[self.warm_up :] or self.seconds
        return median(found) if found else None


def train(run: Run, folder: ResultsFolder, send: Callable[[Event], None]) -> Result:
    """Train on the data in the folder of a comparison, or continue an earlier process's run;
    evaluate, save, continue a text. `send` gets the events of `pretrain`. Memory is that of the
    whole process."""
    began = time.perf_counter()
    before = resident_bytes()
    recipe, place = run.recipe, folder.training / run.name
    facts: Event = {}
    clock = StepClock()

    def listen(event: Event) -> None:
        facts.update(event if event["kind"] == "begin" else {})
        send(event)

    outcome = pretrain(recipe, place, send=listen, callbacks=[clock, OrderCallback()])
    peak = peak_resident_bytes()
    kind = "resident set of the run's own process"
    if torch.cuda.is_available():
        before, peak, kind = 0, torch.cuda.max_memory_allocated(), "tensors on the GPU"
    entries = read_metrics(place / METRICS)
    losses = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    validation = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
    # A process that finds the run trained has taken no step: the log knows its speed about as well.
    logged = median(e["tokens_per_second"] for e in entries if "tokens_per_second" in e)
    tokens = recipe.batch * recipe.context
    model = folder.models / run.name
    prompt, continuation = _finish(run, folder, place / f"checkpoint-{outcome.step}", model)
    write_atomically(model / LOSSES, (place / LOSSES).read_text(encoding="utf-8"))
    return Result(
        attention=run.label,
        seed=run.seed,
        context=recipe.context,
        parameters=facts["parameters"],
        validation_loss=validation[-1][1],
        train_losses=losses,
        validation_losses=validation,
        tokens_per_second=tokens / clock.median if clock.median else logged,
        seconds=time.perf_counter() - began,
        pairs=round(facts["pairs_per_token"] * recipe.context),
        memory_before=before,
        memory_peak=peak,
        memory_kind=kind,
        order=[e["order"] for e in entries if "order" in e][-1],
        model=run.name,
        prompt=prompt,
        continuation=continuation,
    )


def _finish(
    run: Run, folder: ResultsFolder, checkpoint: Path, target: Path
) -> tuple[str | None, str | None]:
    """Save the trained model and its tokenizer without the state of training; continue a text."""
    hf.register()
    baselines.register()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.save_pretrained(target)
    return _continue(run, model, folder.data, target)


def _continue(
    run: Run, model: PreTrainedModel, data: Path, target: Path
) -> tuple[str | None, str | None]:
    """The first words of the validation text and what the model makes of them: always as many
    tokens, past the end of a text too.

    Both are None without a tokenizer.
    """
    path = data / "tokenizer.json"
    if not path.exists():
        return None, None
    context = run.recipe.context
    tokenizer = for_transformers(load_tokenizer(path), context, open_facts(data).end_of_text)
    tokenizer.save_pretrained(target)
    held_out = open_stream(data, "validation")
    text = tokenizer.decode(held_out.tokens[: min(PROMPT_TOKENS, context // 2)].tolist())
    prompt = text.rsplit(maxsplit=1)[0] or text  # the last word may be cut
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    model.generation_config.eos_token_id = None
    set_seed(run.seed)
    tokens = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max(1, min(CONTINUATION_TOKENS, context - length)),
        do_sample=True,
        temperature=0.7,
        top_k=40,
    )[0]
    return prompt, tokenizer.decode(tokens[length:])
