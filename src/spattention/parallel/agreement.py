"""Comparison of what ranks are about to do, before they exchange anything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None


def check_agreement(facts: Mapping[str, object], fault: str | None, group: Group) -> None:
    """Compare facts on all ranks of a group; raise the same error on all of them.

    Digests are compared first; the facts themselves travel only if these differ.

    Args:
        facts: what must be equal on every rank, by name.
        fault: an error that this rank found; it is raised on every rank.
        group: the ranks; None: all.

    Raises:
        ValueError: naming a fact that differs with the values of two ranks, or the fault of a rank.
    """
    shown = {name: str(value) for name, value in facts.items()}
    digest = hashlib.sha256(repr((sorted(shown.items()), fault or "")).encode()).digest()
    device = _device(group)
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
    digests = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, mine, group=group)
    if not fault and all(torch.equal(mine, other) for other in digests):
        return
    found: list[tuple[dict[str, str], str | None]] = [({}, None)] * len(digests)
    dist.all_gather_object(found, (shown, fault), group=group)
    for rank, (_, problem) in enumerate(found):
        if problem:
            raise ValueError(f"{problem} (on rank {rank})")
    first = found[0][0]
    for rank, (other, _) in enumerate(found):
        for name in first:
            if first[name] != other.get(name):
                raise ValueError(
                    f"`{name}` must be the same on every rank, got {first[name]} on rank 0 and "
                    f"{other.get(name)} on rank {rank}"
                )


def _device(group: Group) -> torch.device:
    backend = dist.get_backend(group)
    if "nccl" in backend and "gloo" not in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
