"""Context parallelism in one line: every rank trains on its own part of each row.

A hook of the model cuts rows into shards before the forward pass, and another makes the loss that
of all tokens. Between them travels one keyword, `SHARDS`, which the model passes on to its
attention layers: it says which positions this rank has.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from ..bands import BandPattern
from ..compat.huggingface import attention_name
from ..compat.pytorch import without_dynamo
from ..parallel import Plan, Shards, plan_exchange, sharded_attention
from ..parallel.agreement import Group, check_agreement
from .config import NAME
from .context_inputs import BY_TOKEN, check_inputs, document_starts
from .decoder import attention_modules, plan_of, text_config_of
from .packing import PACKING

SHARDS = "spattention_shards"  # keyword of the attention function
MODE = "spattention_context"  # attribute of the model and of its attention modules
LAYOUTS = ("balanced", "contiguous")
IGNORED = -100  # label of a token without a loss


@dataclass(frozen=True)
class ShardedRows:
    """The rows of one forward pass: ranks, positions per rank, and the starts of packed documents
    per row, None for one document per row."""

    group: Group
    shards: Shards
    documents: tuple[tuple[int, ...], ...] | None
    _plans: dict[tuple[BandPattern, int], Plan] = field(default_factory=dict, compare=False)

    def plan(self, pattern: BandPattern, key_heads: int) -> Plan:
        """The exchange of one layer."""
        known = self._plans.get((pattern, key_heads))
        if known is None:
            known = plan_exchange(pattern, self.shards, key_heads, documents=self.documents)
            self._plans[pattern, key_heads] = known
        return known


@dataclass
class ContextParallel:
    """A model's mode: ranks, layout of shards (one of `LAYOUTS`), and the model's hooks."""

    group: Group
    layout: str
    handles: list[Any] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        # A copied model stays in the same group, of which there is but one; its hooks are its own.
        memo[id(self)] = mode = ContextParallel(self.group, self.layout)
        mode.handles = copy.deepcopy(self.handles, memo)
        return mode

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model must not be pickled under `context_parallel`, whose ranks are those of this "
            f"process group, got one of {dist.get_world_size(self.group)}: call "
            "`context_parallel(model, None)` first, or save it with `save_pretrained`"
        )


def context_parallel(model: Any, mesh: Any, *, layout: str = "balanced") -> Any:
    """Have a model with bands train on rows that are spread over ranks, in place.

    Every rank calls the model with the same whole rows, as if it were alone; each forward pass
    compares them by a digest. The model cuts
    `input_ids`, `labels` and `position_ids` to the rank's tokens; labels are shifted before.
    Attention fetches from other ranks what its heads' bands reach. `logits` are those of this
    rank's tokens. `loss` is that of all tokens, on every rank, and its gradients are scaled so that
    their *mean* over ranks is the gradient, as DDP and FSDP average them.

    Args:
        model: a causal language model in which `spattention.hf.apply` gave every attention layer a
            pattern.
        mesh: a one-dimensional DeviceMesh, such as `mesh["cp"]`, or a process group. None takes
            context parallelism away again.
        layout: "balanced" (head and tail: equal work) or "contiguous".

    Returns:
        The same model.

    Raises:
        ValueError: if an argument breaks a rule above, and in a forward pass if rows are padded,
            continued from a cache, or differ between ranks.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {LAYOUTS}, got {layout!r}")
    modules = attention_modules(model, text_config_of(model))
    if mesh is not None:
        _check_layers(modules)
    mode = None if mesh is None else ContextParallel(_group(mesh), layout)

    # Nothing was changed so far, and nothing fails from here on.
    known = getattr(model, MODE, None)
    for handle in known.handles if known is not None else ():
        handle.remove()
    for module in (model, *modules.values()):
        setattr(module, MODE, mode)
    if mode is not None:
        mode.handles = [
            model.register_forward_pre_hook(_shard_inputs, with_kwargs=True, prepend=True),
            model.register_forward_hook(_total_loss, with_kwargs=True),
        ]
    return model


def is_context_parallel(module: torch.nn.Module) -> bool:
    """True for a model or attention module under `context_parallel`."""
    return getattr(module, MODE, None) is not None


def attend_shards(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    rows: ShardedRows | None,
    *,
    scale: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention `[B, H, tokens, Dv]` of this rank's tokens."""
    if rows is None:
        raise ValueError(
            f"`{SHARDS}` must reach the attention layers under `context_parallel`, got None: call "
            "the model that was given to `context_parallel`, not a part of it, and one that passes "
            "keywords on to its layers"
        )
    plan = rows.plan(pattern, key.shape[1])
    attend = without_dynamo(sharded_attention)  # the exchange is not traced
    out = attend(query, key, value, plan, group=rows.group, scale=scale, sinks=sinks)
    assert isinstance(out, torch.Tensor)  # no log-sum-exp was asked for
    return out


def _check_layers(modules: Mapping[int, Any], is_marked: bool = False) -> None:
    """Check that every attention layer runs bands; any other would attend a rank's own tokens. With
    `is_marked` they must be under `context_parallel` already."""
    if not modules:
        raise ValueError("`model` must have attention layers with bands, got none")
    for index, module in modules.items():
        plan, name = plan_of(module), attention_name(module.config)
        if plan is None or plan.pattern is None:
            raise ValueError(
                "`model` must have a pattern in every attention layer under `context_parallel`, "
                f"got none in layer {index}: give it `BandPattern.dense` with "
                "`spattention.hf.apply`"
            )
        if name != NAME:
            raise ValueError(
                f'`model` must run attn_implementation="{NAME}" under `context_parallel`, got '
                f'"{name}" in layer {index}: take `context_parallel(model, None)` first'
            )
        if is_marked and not is_context_parallel(module):
            raise ValueError(
                f"`model` must have the layers that `context_parallel` was given, got another "
                f"layer {index}: call `context_parallel` again"
            )


def _group(mesh: Any) -> Group:
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if not hasattr(mesh, "get_group") or mesh.ndim != 1:
        shown = f"{mesh.ndim} dimensions" if hasattr(mesh, "ndim") else type(mesh).__name__
        raise ValueError(
            '`mesh` must be a one-dimensional DeviceMesh, such as `mesh["cp"]`, or a process '
            f"group, got {shown}"
        )
    return mesh.get_group()


def _shard_inputs(
    model: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: whole rows become this rank's tokens."""
    mode: ContextParallel = getattr(model, MODE)
    bound = inspect.signature(model.forward).bind_partial(*args, **keywords).arguments
    given = {k: v for k, v in bound.items() if k != "kwargs" and v is not None}
    given |= {k: v for k, v in bound.get("kwargs", {}).items() if v is not None}
    group = mode.group
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    tokens, documents = _agreed_rows(model, given, group, ranks)
    shards = getattr(Shards, mode.layout)(tokens.shape[1], ranks)
    positions = given.get("position_ids")
    if positions is None:
        given["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if "labels" in given and "shift_labels" not in given:
        given["shift_labels"] = pad(given["labels"], (0, 1), value=IGNORED)[:, 1:]
    if "shift_labels" in given:
        labels = given["labels"] = given["shift_labels"]
        if given.get("num_items_in_batch") is None:
            given["num_items_in_batch"] = (labels != IGNORED).sum()
    for name in BY_TOKEN:
        if name in given:
            given[name] = shards.split(given[name], rank)
    for name in ("attention_mask", *PACKING):
        given.pop(name, None)
    given |= {"use_cache": False, SHARDS: ShardedRows(group, shards, documents)}
    return (), given


def _agreed_rows(
    model: Any, given: Mapping[str, Any], group: Group, ranks: int
) -> tuple[torch.Tensor, tuple[tuple[int, ...], ...] | None]:
    """Tokens and starts of documents, which all ranks have alike; a fault of one is told by all."""
    fault, facts, rows = None, {}, None
    try:
        modules = attention_modules(model, text_config_of(model))
        _check_layers(modules, is_marked=True)
        tokens = check_inputs(model, given)
        documents = document_starts(model, given, *tokens.shape[:2])
        if "labels" in given or "shift_labels" in given:
            _check_loss(model)
        shown = f"{list(tokens.shape)} with digest {_digest(tokens)}"
        facts, rows = {"input_ids": shown, "documents": documents}, (tokens, documents)
    except ValueError as error:
        if ranks == 1:
            raise
        fault = str(error)
    check_agreement(facts, fault, group)
    assert rows is not None  # a fault was raised
    return rows


def _digest(tokens: torch.Tensor) -> str:
    """Digest of the values of a tensor; it waits for the device, once per forward pass."""
    content = tokens.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _check_loss(model: Any) -> None:
    """Check that the loss takes labels that are shifted already: a shard has no next token."""
    loss = getattr(model, "loss_function", None)
    if loss is None or "shift_labels" not in inspect.signature(loss).parameters:
        raise ValueError(
            "`model` must have a loss function with `shift_labels` to be given labels under "
            f"`context_parallel`, got {getattr(loss, '__name__', loss)}: take the loss from logits"
        )


def _total_loss(model: Any, args: Any, keywords: dict[str, Any], output: Any) -> Any:
    """A forward hook: the loss of this rank's tokens becomes that of all."""
    rows = keywords.get(SHARDS)
    if rows is None or keywords.get("labels") is None:
        return output
    if isinstance(output, tuple):
        return (_Total.apply(output[0], rows.group), *output[1:])
    output["loss"] = _Total.apply(output["loss"], rows.group)
    return output


class _Total(torch.autograd.Function):
    """The sum over ranks of their losses; gradients are scaled for a mean over ranks."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.ranks, None
