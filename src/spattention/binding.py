"""Entry point that the public operators share: arguments in, one checked `AttentionCall` out.

Autocast and defaults are applied here and nowhere else. Checks that depend only on shapes, strides,
dtypes and devices are skipped once a call equal in these has passed (`CallForm`).
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .bands import BandPattern
from .checks import check_attention, check_tensors, check_varlen
from .compat.pytorch import is_watched, needs_dispatcher, torch_function_modes
from .impl.attention_call import AttentionCall, CallForm
from .impl.layout import score_scale, under_autocast
from .scalars import python_number

NO_FORM = "no form"


def bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    *,
    scale: float | None,
    sinks: Tensor | None,
    query_start: int | Tensor | None,
    key_start: Tensor | None,
    form: CallForm | None = None,
) -> AttentionCall:
    """The call of `band_attention` with these arguments, and its form if that is known; raises as
    that does.
    """
    if form is None:
        check_tensors(query=query, key=key, value=value)  # autocast asks them for their device
        query, key, value = under_autocast(query, key, value)
        query_start = python_number(query_start)
        form = form_of(query, key, value, pattern, scale, (sinks, query_start, key_start))
    if form is None or not form.checked:
        rows: dict[str, Any] = {"query_start": query_start, "key_start": key_start}
        check_attention(query, key, value, pattern, scale=scale, sinks=sinks, **rows)
        _remember(form, query, (sinks, query_start, key_start))
    scale = score_scale(query, scale)
    start_tensor = query_start if isinstance(query_start, Tensor) else None
    start = 0 if isinstance(query_start, Tensor) else query_start
    if start is None:
        start = key.shape[2] - query.shape[2]
    positions = start, start_tensor, key_start, None, None
    return AttentionCall(query, key, value, pattern, scale, sinks, *positions, form)


def bind_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None,
    sinks: Tensor | None,
) -> AttentionCall:
    """The call of `band_attention_varlen` with these arguments; raises as that does.

    The maximal lengths are checked and dropped: implementations read documents from the offsets.
    """
    check_tensors(query=query, key=key, value=value)  # autocast asks them for their device
    query, key, value = under_autocast(query, key, value)
    max_seqlen_q, max_seqlen_k = python_number(max_seqlen_q), python_number(max_seqlen_k)
    optional: tuple[Any, ...] = (sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    form = form_of(query, key, value, pattern, scale, optional)
    if form is None or not form.checked:
        check_varlen(query, key, value, pattern, *optional[1:], scale=scale, sinks=sinks)
        _remember(form, query, optional)
    scale = score_scale(query, scale)
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    positions = 0, None, None, cu_seqlens_q, cu_seqlens_k
    return AttentionCall(query, key, value, pattern, scale, sinks, *positions, form)


def form_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    scale: float | None,
    optional: tuple[Any, ...],
) -> CallForm | None:
    """The form of a call, from its arguments as a user gives them. None where autocast changes a
    dtype, for numbers of other types than Python's, and under torch.compile, a torch.func
    transform, a mode or a tensor subclass: `bind` looks again once it has cast what it can, and
    calls without a form are checked every time.
    """
    if torch.compiler.is_compiling() or is_watched() or torch_function_modes():
        return None
    if type(pattern) is not BandPattern or (scale is not None and type(scale) is not float):
        return None
    strided = torch.strided
    for each in (query, key, value):
        kind = type(each)
        if (kind is not Tensor and kind is not torch.nn.Parameter) or each.layout is not strided:
            return None
        if each.is_neg() or each.is_nested:
            return None
    device, dtype = query.device, query.dtype
    kind_of_device = device.type
    if kind_of_device == "meta":
        return None
    if torch.is_autocast_enabled(kind_of_device):
        kept = torch.get_autocast_dtype(kind_of_device), torch.float64
        if dtype not in kept or key.dtype not in kept or value.dtype not in kept:
            return None
    facts = [None if each is None else _facts(each) for each in optional]
    if NO_FORM in facts:
        return None
    return _form(
        pattern,
        scale,
        query.shape,
        query.stride(),
        dtype,
        device,
        key.shape,
        key.stride(),
        key.dtype,
        key.device,
        value.shape,
        value.stride(),
        value.dtype,
        value.device,
        *facts,
    )


def _facts(argument: Any) -> Hashable:
    """Shape, strides, dtype and device of a tensor, or type and value of a number; `NO_FORM` for
    whatever else, or a tensor that the dispatcher has to see.
    """
    if isinstance(argument, int):
        return type(argument), argument
    if not isinstance(argument, Tensor) or needs_dispatcher((argument,)):
        return NO_FORM
    if argument.layout != torch.strided or argument.is_nested:
        return argument.layout, argument.is_nested
    return argument.shape, argument.stride(), argument.dtype, argument.device


@lru_cache(maxsize=4096)
def _form(*facts: Hashable) -> CallForm:
    return CallForm()


def _remember(form: CallForm | None, query: Tensor, optional: tuple[Any, ...]) -> None:
    """Note that a call of this form passed. On the CPU checks read the values of tensors as well,
    which another call of the form does not share.
    """
    if form is not None:
        form.checked = query.is_cuda or not any(isinstance(each, Tensor) for each in optional)
