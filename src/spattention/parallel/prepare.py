"""Checks of an operator on shards, which all ranks of a group pass or fail together."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..checks import check_attention, check_no_tangents, check_tensors
from ..impl.layout import under_autocast
from .agreement import Group, check_agreement
from .plan import Plan


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    group: Group,
    *,
    scale: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Query, key and value in autocast's dtype, and this rank's number.

    All ranks compare their arguments in the first call with a plan and shapes; an error on one of
    them is raised on all.
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"`plan` must come from `plan_exchange`, got {type(plan).__name__}")
    ranks, rank = place(plan.shards.ranks, group)
    fault = None
    try:
        check_tensors(query=query, key=key, value=value)
        query, key, value = under_autocast(query, key, value)
        _check(query, key, value, plan, ranks, rank, scale=scale, sinks=sinks)
    except ValueError as error:
        if ranks == 1:
            raise
        fault = str(error)
    known: tuple[object, ...] = () if group is None else (group.group_name,)
    if fault is None:
        known = (*known, query.shape[:2], query.shape[3], value.shape[3], query.dtype, scale)
    if ranks > 1 and (fault or known not in plan.agreed):
        shapes = {
            "batch size": query.shape[0],
            "head_dim": (query.shape[3], value.shape[3]),
            "dtype": query.dtype,
        }
        facts = {
            "pattern": plan.pattern,
            "length": plan.shards.length,
            "shards": plan.shards.ranges,
            "num_key_value_heads": plan.num_key_value_heads,
            "documents": plan.documents,
            "scale": scale,
            "sinks": sinks is not None,
            **({} if fault else shapes),
        }
        check_agreement(facts, fault, group)
        plan.agreed.add(known)
    check_no_tangents(query=query, key=key, value=value, sinks=sinks)
    return query, key, value, rank


def place(expected: int, group: Group) -> tuple[int, int]:
    """Number of ranks of a group, and this process's rank in it."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(f"`group` must be a process group or None, got {type(group).__name__}")
    if not (dist.is_available() and dist.is_initialized()):
        if expected == 1 and group is None:
            return 1, 0
        raise ValueError(
            f"`group` must be a group of {expected} processes, got none: call "
            "`torch.distributed.init_process_group` first"
        )
    return dist.get_world_size(group), dist.get_rank(group)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    ranks: int,
    rank: int,
    *,
    scale: float | None,
    sinks: Tensor | None,
) -> None:
    """Check this rank's arguments; raises `ValueError`."""
    if plan.shards.ranks != ranks:
        raise ValueError(
            f"`plan` must be for the {ranks} ranks of `group`, got shards of {plan.shards.ranks}"
        )
    check_attention(
        query,
        key,
        value,
        plan.pattern,
        scale=scale,
        sinks=sinks,
        query_start=0,
        key_start=None,
    )
    tokens = plan.shards.sizes[rank]
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[2] != tokens:
            raise ValueError(
                f"`{name}` must have the {tokens} tokens of rank {rank}'s shard, got "
                f"{tensor.shape[2]}"
            )
    if key.shape[1] != plan.num_key_value_heads:
        raise ValueError(
            f"`key` must have the plan's {plan.num_key_value_heads} key/value heads, got "
            f"{key.shape[1]}"
        )
    if plan.documents is not None and query.shape[0] != len(plan.documents):
        raise ValueError(
            f"`query` must have the {len(plan.documents)} batch entries that the plan's documents "
            f"are for, got {query.shape[0]}"
        )
