"""Inputs of a model under `context_parallel`: what can be split over ranks, and where documents
start. Whatever a model with whole rows refuses is refused here by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checks import check_documents
from .mask import Rows, check_padding
from .packing import PACKING, check_packing, refuse_jumps, warn_of_restarts

# Arguments of a model that do not depend on the tokens of a rank.
PASSED_ON = frozenset(
    {
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
    }
)
# Arguments with a number or a vector per token, and their dimensions.
BY_TOKEN = {"input_ids": 2, "inputs_embeds": 3, "position_ids": 2, "labels": 2, "shift_labels": 2}


def check_inputs(model: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """The tokens of whole rows, or their vectors, among the arguments of a model that are not None.

    Raises:
        ValueError: if an argument cannot be split, or is of a wrong type or shape.
    """
    named = next((name for name in ("input_ids", "inputs_embeds") if name in given), None)
    if named is None:
        raise ValueError("`input_ids` must be given under `context_parallel`, got None")
    _check_names(given)
    for name in (*BY_TOKEN, "attention_mask"):
        if name in given and not isinstance(given[name], torch.Tensor):
            raise ValueError(f"`{name}` must be a tensor, got {type(given[name]).__name__}")
    batch, length = _check_shape(named, given[named])
    for name in BY_TOKEN:
        if name in given:
            _check_shape(name, given[name], batch, length)
    mask = given.get("attention_mask")
    if mask is not None:
        check_padding(mask, batch, 0, length)
        if not bool(mask[:, :length].all()):
            raise ValueError(
                "`attention_mask` must be None or all ones under `context_parallel`, got padding: "
                "pack documents into rows with `position_ids`, or pad at the end with labels of "
                "-100"
            )
    if given.get("logits_to_keep"):
        raise ValueError(
            f"`logits_to_keep` must be 0 under `context_parallel`, got {given['logits_to_keep']}"
        )
    router = given.get("output_router_logits")
    if router or (router is None and getattr(model.config, "output_router_logits", False)):
        raise ValueError(
            "`output_router_logits` must be False under `context_parallel`: the auxiliary loss of "
            "a rank's tokens is not that of all tokens, got True"
        )
    return given[named]


def document_starts(
    model: Any, given: Mapping[str, Any], batch: int, length: int
) -> tuple[tuple[int, ...], ...] | None:
    """Starts of the documents of each row, from offsets or from positions; reads values once.

    None stands for one document per row, as with an `attention_mask`, whatever the positions.
    """
    padded = "attention_mask" in given
    if any(name in given for name in PACKING):
        check_packing(given, padded)
        if batch != 1:
            raise ValueError(f"`cu_seq_lens_q` must describe one row, got {batch}")
        offsets, key_offsets = (given[name].cpu().to(torch.int32) for name in PACKING[:2])
        longest, longest_key = (int(given[name]) for name in PACKING[2:])
        check_documents(length, length, offsets, key_offsets, longest, longest_key, offsets.device)
        return (tuple(sorted({each for each in offsets.tolist() if each < length})),)
    positions = given.get("position_ids")
    if positions is None:
        return None
    if padded:
        warn_of_restarts(model, positions, Rows(padded=True))
        return None
    positions = positions.expand(batch, -1).cpu()
    refuse_jumps(positions, "give whole rows, which `context_parallel` splits itself")
    return tuple(
        (0, *((row != 1).nonzero().flatten() + 1).tolist()) for row in positions.diff(dim=1)
    )


def _check_names(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        known = name in PASSED_ON or name in PACKING or name in BY_TOKEN
        if not known and name != "attention_mask" and value is not False:
            raise ValueError(
                f"`{name}` cannot be split over ranks by `context_parallel`; it must be None, got "
                f"{type(value).__name__}"
            )


def _check_shape(
    name: str, tensor: torch.Tensor, batch: int | None = None, length: int | None = None
) -> tuple[int, int]:
    """Batch size and length of an argument, which must be those given."""
    rows = (batch, 1) if name == "position_ids" else (batch,)
    shape = tuple(tensor.shape)
    wrong = len(shape) != BY_TOKEN[name]
    wrong = wrong or (batch is not None and (shape[0] not in rows or shape[1] != length))
    if wrong:
        wanted = f"[{'B' if batch is None else batch}, {'tokens' if length is None else length}"
        wanted += ", D]" if BY_TOKEN[name] == 3 else "]"
        raise ValueError(
            f"`{name}` must be {wanted} under `context_parallel`, got shape {list(shape)}"
        )
    return shape[0], shape[1]
