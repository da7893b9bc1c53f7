"""Attention modules whose key/value heads may change their order, each with its query heads.

Every tensor of a module must be one that the order moves, or one that all heads share. Anything
else is refused by name: it may be laid out by heads in a way that nothing here knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .weights import is_mark

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ORDER = "spattention_order"  # attribute of an attention module with dealt heads


def is_dealt(module: Any) -> bool:
    """True for an attention module whose heads are in another order than the config's."""
    order = getattr(module, ORDER, ())
    return tuple(order) != tuple(range(len(order)))


def refuse_dealt(model: Any, purpose: str) -> None:
    """Check that no attention module of a model has dealt heads; raises `ValueError` that names the
    purpose which needs the natural order."""
    for module in model.modules():
        if is_dealt(module):
            raise ValueError(
                f"`model` must have its heads in their natural order {purpose}, got heads "
                "dealt by `spattention.hf.deal`: call `spattention.hf.deal(model, 1)` first"
            )


def by_heads(module: Any) -> Iterator[tuple[str, int]]:
    """Names of the tensors of an attention module that consist of heads, with their dimension."""
    for name in PROJECTIONS[:3]:
        projection = getattr(module, name)
        for kind, _ in projection.named_parameters(recurse=False):
            yield f"{name}.{kind}", 0
        norm = getattr(module, f"{name[0]}_norm", None)
        for kind, tensor in () if norm is None else norm.named_parameters(recurse=False):
            # A norm over all heads, as in OLMoE, not over each, as in Qwen3.
            if tensor.dim() == 1 and tensor.shape[0] == projection.weight.shape[0]:
                yield f"{name[0]}_norm.{kind}", 0
    yield "o_proj.weight", 1
    if isinstance(getattr(module, "sinks", None), torch.Tensor):
        yield "sinks", 0


def check_dealable(module: Any, key_heads: int) -> None:
    """Check that an order of the key/value heads, those on all ranks, changes no result of an
    attention module; raises `ValueError` that names what is not known to allow it."""
    where = f"in layer {module.layer_idx} to deal its heads"
    missing = [name for name in PROJECTIONS if not hasattr(module, name)]
    if missing:
        raise ValueError(f"`model` must have separate projections {where}, got no {missing}")
    for name in PROJECTIONS:
        projection = getattr(module, name)
        parameters = {kind for kind, _ in projection.named_parameters()}
        # Subclasses store their weights otherwise, or add to what they compute.
        if type(projection) is not torch.nn.Linear or not parameters <= {"weight", "bias"}:
            raise ValueError(
                f"`model` must have plain linear projections {where}, got {name} of type "
                f"{_type(projection)}"
            )
        if not projection.weight.is_floating_point() or projection.weight.element_size() < 2:
            raise ValueError(
                f"`model` must have unquantised projections {where}, got {name} in "
                f"{projection.weight.dtype}"
            )
    if getattr(module, "is_kv_shared_layer", False):
        raise ValueError(
            f"`model` must have keys and values of its own {where}, got those of another layer"
        )
    head_dim = module.k_proj.weight.shape[0] // key_heads
    moved = {name for name, _ in by_heads(module)}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        owner = module.get_submodule(name.rpartition(".")[0])
        # Deeper inside there may be a norm for each head, as in StableLM.
        is_norm = name.count(".") == 1 and "Norm" in type(owner).__name__
        shared = tensor.dim() == 0 or (is_norm and tensor.shape == (head_dim,))
        rotary = "Rotary" in type(owner).__name__ and not isinstance(tensor, torch.nn.Parameter)
        if not (name in moved or shared or rotary or name == "o_proj.bias" or is_mark(name)):
            raise ValueError(
                f"`model` must have nothing but projections, norms over each head or all heads "
                f"together, and sinks {where}, got {name} {list(tensor.shape)} of "
                f"{_type(owner)}"
            )


def refuse_changed(module: Any, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of dealt modules, whose projections must stay as they were dealt."""
    if not is_dealt(module):
        return
    for name in PROJECTIONS:
        projection = getattr(module, name)
        if type(projection) is not torch.nn.Linear:
            raise ValueError(
                f"`model` must keep the projections that `spattention.hf.deal` dealt, got {name} "
                f"of type {_type(projection)} in layer {module.layer_idx}: call "
                "`spattention.hf.deal(model, 1)` before they are replaced"
            )


def _type(module: Any) -> str:
    kind = type(module)
    package = kind.__module__.removeprefix("peft.tuners.")
    return f"{package.partition('.')[0]}.{kind.__name__}"
