"""Training of a converted model: AdamW, linear warm-up, cosine decay to 0, all weights or LoRA.

With a teacher, the model as it was before it was converted, a share of the loss is the divergence
of its next-token distributions from the teacher's (Hinton et al., arXiv:1503.02531, temperature 1).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spattention.compat.pytorch import raise_recompile_limit
from spattention.training.precision import groups, to_bfloat16

from .text import order

WARMUP = 0.1  # of the steps
BETAS = (0.9, 0.95)
MAX_NORM = 1.0
DECAY = 0.1
GRAPHS = 64  # of a function, for all rows of a process together


@dataclass(frozen=True)
class Schedule:
    """Settings of training, the same for every row.

    Attributes:
        batch: windows per step.
        micro_batch: windows at a time.
        rate: peak learning rate of all weights.
        lora_rate: peak learning rate of adapters.
        rank: of adapters.
        compiled: compile layers and loss.
    """

    batch: int
    micro_batch: int
    rate: float
    lora_rate: float
    rank: int
    compiled: bool = False


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and its share of the loss, from 0 to 1."""

    model: Any
    share: float


def with_lora(model: Any, schedule: Schedule) -> Any:
    """The model with adapters in all linear layers of its decoder."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=schedule.rank, lora_alpha=2 * schedule.rank, target_modules="all-linear")
    return get_peft_model(model, config)


def to_bfloat16_weights(model: Any) -> Any:
    """The model with bfloat16 parameters. Buffers stay as they are: rotary frequencies must not be
    rounded, or far positions turn."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def train(
    model: Any,
    windows: Tensor,
    tokens: int,
    schedule: Schedule,
    *,
    seed: int,
    lora: bool,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Train in place on about `tokens` tokens; returns losses by step and the time it took.

    The losses are those that are minimized, with the teacher's share. On a GPU all products are
    bfloat16 and the weights that are trained have float32 masters.
    """
    torch.manual_seed(seed)
    context = windows.shape[1]
    steps = max(1, round(tokens / (schedule.batch * context)))
    rate = schedule.lora_rate if lora else schedule.rate
    optimizer: torch.optim.Optimizer
    if model.device.type == "cuda":
        optimizer = to_bfloat16(model, DECAY, lr=rate, betas=BETAS)
    else:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(groups(named, DECAY), lr=rate, betas=BETAS)
    trained = [p for p in model.parameters() if p.requires_grad]
    chosen = order(len(windows), steps * schedule.batch, seed).view(steps, schedule.batch)
    model.train()
    losses: list[Tensor] = []

    def update(step: int, batch: Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate * _share(step, steps)
        total = torch.zeros((), device=model.device)
        for rows in batch.split(schedule.micro_batch):
            ids = windows[rows].to(model.device, non_blocking=True)
            found = model(input_ids=ids, labels=ids, use_cache=False)
            loss = found.loss
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher.model(input_ids=ids, use_cache=False).logits
                apart = divergence(found.logits.flatten(0, 1), taught.flatten(0, 1))
                loss = torch.lerp(loss, apart, teacher.share)
            loss = loss * (len(rows) / schedule.batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)

    divergence = torch.compile(_divergence, dynamic=False) if schedule.compiled else _divergence
    began = time.perf_counter()
    with compiled(model) if schedule.compiled else nullcontext():
        for step, batch in enumerate(chosen):
            update(step, batch)
    curve = torch.stack(losses).tolist()
    if not all(map(math.isfinite, curve)):
        raise SystemExit(f"the loss must be finite, got {curve}")
    return {
        "steps": steps,
        "tokens": steps * schedule.batch * context,
        "seconds": time.perf_counter() - began,
        "losses": [round(loss, 4) for loss in curve[:: max(1, steps // 50)]],
        "parameters": sum(p.numel() for p in trained),
    }


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Compile the decoder's layers, all but attention, and the loss; afterwards all is as before.

    Attention is left out because every layer has bands of its own: with it, each would be a graph.
    """
    name = model.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS[name]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers, loss = list(base.model.layers), base.loss_function
    raise_recompile_limit(GRAPHS)
    ALL_ATTENTION_FUNCTIONS[name] = torch._dynamo.disable(attend)
    base.loss_function = torch.compile(loss, dynamic=False)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = attend
        base.loss_function = loss
        for layer in layers:
            del layer.forward


def _divergence(logits: Tensor, taught: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student) in nats, from logits `[T, V]`, in float32."""
    logs = F.log_softmax(logits.float(), dim=-1)
    wanted = F.log_softmax(taught.float(), dim=-1)
    return F.kl_div(logs, wanted, reduction="batchmean", log_target=True)


def _share(step: int, steps: int) -> float:
    """Share of the peak rate at a step."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
