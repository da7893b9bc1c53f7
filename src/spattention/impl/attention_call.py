"""The one object that a call is, from the public operators to an implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..bands import BandPattern

if TYPE_CHECKING:
    from .replay import Replay


class CallForm:
    """Everything about a call but the values in its tensors: pattern, shapes, strides, dtypes.

    Equal forms are one object, so that implementations find what they made of it by identity.

    Attributes:
        checked: whether a call of this form passed the checks.
        replays: by `deterministic`, how later calls of this form run, or None until that is known.
    """

    def __init__(self) -> None:
        self.checked = False
        self.replays: dict[bool, Replay | None] = {}


class AttentionCall(NamedTuple):
    """Checked arguments of one call, the same for rows and for packed documents.

    Attributes:
        query: `[B, H, Q, D]`; of packed documents the view `[1, H, T, D]`.
        key: `[B, Hkv, K, D]`.
        value: `[B, Hkv, K, Dv]`.
        pattern: the bands, one entry per query head.
        scale: factor of the scores before the softmax.
        sinks: `[H]`.
        query_start: position of the first query, unless `query_start_tensor` has it.
        query_start_tensor: the same as int32 `[]` or `[B]`.
        key_start: int32 `[B]` or `[B, Q]`.
        cu_seqlens_q: int32 `[documents + 1]`, of packed documents alone.
        cu_seqlens_k: given with `cu_seqlens_q`.
        form: the call's form, if it runs eagerly on plain tensors: no compiler, transform, mode or
            tensor subclass has to see its operators. None: they go through the dispatcher.
        deterministic: whether the gradients must have the same bits on every run.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: BandPattern
    scale: float
    sinks: Tensor | None = None
    query_start: int = 0
    query_start_tensor: Tensor | None = None
    key_start: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    form: CallForm | None = None
    deterministic: bool = True


class WholeResults(NamedTuple):
    """Results over all keys, sinks included, and their gradients: `out` and `d_out [B, H, Q, Dv]`,
    `lse` and `d_lse [B, H, Q]`, None for zeros."""

    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_lse: Tensor | None
