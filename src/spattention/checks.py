"""Every error about what a user passes to an operator: its shape, dtype, device and, on the CPU,
its values.

Each message names the argument, the rule and the value given. Values of device tensors are not read
here, because that would wait for the device; `validate` reads them on request.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .bands import BandPattern
from .compat.pytorch import forward_mode_active, has_tangent, is_batched
from .scalars import LARGEST_SIZE, python_number, shown_number

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_POSITION = LARGEST_SIZE
LARGEST_SCALE = sys.float_info.max


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    *,
    scale: float | None,
    sinks: Tensor | None,
    query_start: int | Tensor | None,
    key_start: Tensor | None,
) -> None:
    """Arguments of `band_attention`, after `check_tensors`; raises `ValueError`."""
    _check_layout(query, key, value, pattern, layout="[B, H, length, D]", dims=4)
    _check_scale_and_sinks(query, pattern, scale, sinks)
    batch, _, queries, _ = query.shape
    key_batch, _, keys, _ = key.shape
    value_batch, _, values, _ = value.shape
    if key_batch != batch or value_batch != batch:
        raise ValueError(
            f"`key` and `value` must have query's batch size {batch}, got {key_batch} and "
            f"{value_batch}"
        )
    if values != keys:
        raise ValueError(f"`value` must have as many tokens as `key`, {keys}, got {values}")
    _check_query_start(query, queries, keys, query_start)
    if key_start is not None:
        check_key_start(key_start, query)


def check_key_start(key_start: Tensor, query: Tensor) -> None:
    """Starts for the tokens of `query [B, H, Q, D]`; raises `ValueError`."""
    batch, queries = query.shape[0], query.shape[2]
    _check_index_tensor("key_start", key_start, query.device)
    if not (_has_shape(key_start, batch) or _has_shape(key_start, batch, queries)):
        raise ValueError(
            f"`key_start` must be [B] = [{batch}] or [B, Q] = [{batch}, {queries}], "
            f"got {list(key_start.shape)}"
        )
    if readable(key_start):
        _check_key_start_values(key_start)


def check_new_tokens(
    key: Tensor, value: Tensor, mask: Tensor | None, buffers: tuple[Tensor, Tensor], key_heads: int
) -> None:
    """Tokens for a store that has these keys and values `[B, slots, D]`; raises `ValueError`."""
    check_tensors(key=key, value=value)
    for name, tensor, buffer in (("key", key, buffers[0]), ("value", value, buffers[1])):
        rows, dim = buffer.shape[0], buffer.shape[2]
        if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != (rows, key_heads, dim):
            raise ValueError(
                f"`{name}` must have the store's shape [B, Hkv, n, D] = "
                f"[{rows}, {key_heads}, n, {dim}], got {list(tensor.shape)}"
            )
        if tensor.dtype != buffer.dtype or tensor.device != buffer.device:
            raise ValueError(
                f"`{name}` must have the store's dtype and device, {buffer.dtype} on "
                f"{buffer.device}, got {tensor.dtype} on {tensor.device}"
            )
    if value.shape[2] != key.shape[2]:
        raise ValueError(
            f"`value` must have as many tokens as `key`, {key.shape[2]}, got {value.shape[2]}"
        )
    if mask is None:
        return
    check_tensors(mask=mask)
    if mask.dtype != torch.bool or mask.device != key.device:
        raise ValueError(f"`mask` must be bool on {key.device}, got {mask.dtype} on {mask.device}")
    if mask.dim() != 2 or mask.shape[0] != key.shape[0] or mask.shape[1] != key.shape[2]:
        raise ValueError(
            f"`mask` must be [B, n] = [{key.shape[0]}, {key.shape[2]}], got {list(mask.shape)}"
        )


def check_rows(rows: Tensor, batch_size: int, *, allow_bool: bool) -> None:
    """Indices of batch entries, or a mask of them; raises `ValueError`."""
    check_tensors(rows=rows)
    kinds = (torch.int32, torch.int64, *((torch.bool,) if allow_bool else ()))
    if rows.dtype not in kinds:
        names = "int32, int64 or bool" if allow_bool else "int32 or int64"
        raise ValueError(f"`rows` must be {names}, got {rows.dtype}")
    if rows.device.type == "meta":
        raise ValueError("`rows` must have values, got a tensor on the meta device")
    is_mask = rows.dtype == torch.bool
    if rows.dim() != 1 or (is_mask and rows.shape[0] != batch_size):
        shape = f"[B] = [{batch_size}]" if is_mask or not allow_bool else "[rows]"
        raise ValueError(f"`rows` must be {shape}, got {list(rows.shape)}")
    if rows.shape[0] == 0 or (is_mask and readable(rows) and not rows.any()):
        raise ValueError("`rows` must name at least one sequence, got none")
    if not is_mask and readable(rows):
        lowest, highest = int(rows.min()), int(rows.max())
        if lowest < 0 or highest >= batch_size:
            raise ValueError(
                f"`rows` must be from 0 to {batch_size - 1}, got "
                f"{lowest if lowest < 0 else highest}"
            )


def check_varlen(
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
) -> None:
    """Arguments of `band_attention_varlen`, after `check_tensors`; raises `ValueError`."""
    _check_layout(query, key, value, pattern, layout="[T, H, D]", dims=3)
    _check_scale_and_sinks(query, pattern, scale, sinks)
    if value.shape[0] != key.shape[0]:
        raise ValueError(
            f"`value` must have as many tokens as `key`, {key.shape[0]}, got {value.shape[0]}"
        )
    offsets, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    check_documents(query.shape[0], key.shape[0], *offsets, *longest, query.device)


def check_documents(
    query_tokens: int,
    key_tokens: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    device: torch.device,
) -> None:
    """Offsets of flattened documents, on the device of the query; raises `ValueError`."""
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_index_tensor(name, offsets, device)
        if offsets.dim() != 1 or offsets.shape[0] < 2:
            raise ValueError(
                f"`{name}` must be [documents + 1] with at least one document, got shape "
                f"{list(offsets.shape)}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"`cu_seqlens_q` and `cu_seqlens_k` must name the same documents, "
            f"got {cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        )
    for name, given in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        longest = python_number(given)
        if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
            raise ValueError(f"`{name}` must be an int, got {type(longest).__name__}")
        if longest < 0:
            raise ValueError(f"`{name}` must not be negative, got {shown_number(longest)}")
        if longest > MAX_POSITION:
            raise ValueError(
                f"`{name}` must be at most {MAX_POSITION}, got {shown_number(longest)}"
            )
    if readable(cu_seqlens_q) and readable(cu_seqlens_k):
        _check_cu_seqlens_values(
            query_tokens, key_tokens, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        )


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    query_start: int | Tensor | None = None,
    key_start: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> None:
    """Check everything, values on any device included. Waits for the device; for debugging, not for
    a hot path.

    Arguments are those of `band_attention`, or of `band_attention_varlen` when those of packed
    documents are given: all four, without `query_start` and `key_start`.

    Raises:
        ValueError: naming the argument, the rule and the value given.
    """
    check_tensors(query=query, key=key, value=value)
    rows: dict[str, Any] = {"query_start": query_start, "key_start": key_start}
    packed: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }
    given = [name for name, value in packed.items() if value is not None]
    if not given:
        check_attention(query, key, value, pattern, scale=scale, sinks=sinks, **rows)
        _check_sinks_values(sinks)
        if key_start is not None:
            _check_key_start_values(key_start)
        if isinstance(query_start, Tensor):
            _check_query_start_values(query_start)
        return
    missing = [name for name, value in packed.items() if value is None]
    if missing:
        raise ValueError(f"`{missing[0]}` must be given with `{given[0]}`, got None")
    for name, value_given in rows.items():
        if value_given is not None:
            raise ValueError(f"`{name}` must not be given with `{given[0]}`, got {value_given!r}")
    check_varlen(query, key, value, pattern, **packed, scale=scale, sinks=sinks)
    _check_sinks_values(sinks)
    _check_cu_seqlens_values(query.shape[0], key.shape[0], *packed.values())


def check_no_tangents(**tensors: Tensor | None) -> None:
    """Raise NotImplementedError in forward-mode differentiation (`torch.func.jvp`): PyTorch would
    run the operator without it, and take the derivative for zero.
    """
    if not forward_mode_active():
        return
    for name, tensor in tensors.items():
        if tensor is not None and has_tangent(tensor):
            raise NotImplementedError(
                f"`{name}` has a tangent, but `band_attention` has no forward-mode derivative "
                '(jvp, jacfwd, hessian) except with `impl="reference"`'
            )


def check_tensors(**tensors: Tensor) -> None:
    """Check that each named argument is a tensor with strides; raises `ValueError`."""
    strided = torch.strided
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != strided:
            raise ValueError(f"`{name}` must be a dense tensor, got layout {tensor.layout}")
        if tensor.is_nested:
            raise ValueError(f"`{name}` must be a dense tensor, got a nested one")


def check_dtype(name: str, dtype: Any) -> None:
    """Check a dtype against those that the operators compute in; raises `ValueError`."""
    if dtype in DTYPES:
        return
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`{name}` must be floating point, got {dtype!r}")
    names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
    raise ValueError(f"`{name}` must be one of {names}, got {dtype}")


def _check_layout(
    query: Tensor, key: Tensor, value: Tensor, pattern: BandPattern, *, layout: str, dims: int
) -> None:
    if not isinstance(pattern, BandPattern):
        raise ValueError(f"`pattern` must be a BandPattern, got {type(pattern).__name__}")
    dtype, device = query.dtype, query.device
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != dims:
            raise ValueError(f"`{name}` must be {layout}, got shape {list(tensor.shape)}")
        check_dtype(name, tensor.dtype)
        if tensor.dtype != dtype:
            raise ValueError(f"`{name}` must have query's dtype {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"`{name}` must be on query's device {device}, got {tensor.device}")
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    heads, key_heads = query_shape[1], key_shape[1]
    if pattern.num_heads != heads:
        raise ValueError(f"`pattern` has {pattern.num_heads} heads but `query` has {heads}")
    if key_heads == 0 or heads % key_heads != 0:
        raise ValueError(
            f"query's {heads} heads must be a multiple of key's heads, got {key_heads} in `key`"
        )
    if value_shape[1] != key_heads:
        raise ValueError(
            f"`value` must have as many heads as `key`, {key_heads}, got {value_shape[1]}"
        )
    head_dim = query_shape[-1]
    if head_dim != key_shape[-1]:
        raise ValueError(f"`key` must have query's head_dim {head_dim}, got {key_shape[-1]}")
    if head_dim == 0 or value_shape[-1] == 0:
        raise ValueError(
            f"head_dim must be at least 1, got {head_dim} in `query` and {value_shape[-1]} "
            "in `value`"
        )


def _check_scale_and_sinks(
    query: Tensor, pattern: BandPattern, scale: float | None, sinks: Tensor | None
) -> None:
    _check_scale(scale)
    if sinks is None:
        return
    check_tensors(sinks=sinks)
    if sinks.dim() != 1 or sinks.shape[0] != pattern.num_heads:
        raise ValueError(f"`sinks` must be [H] = [{pattern.num_heads}], got {list(sinks.shape)}")
    if sinks.dtype not in (query.dtype, torch.float32):
        raise ValueError(
            f"`sinks` must have query's dtype {query.dtype} or float32, got {sinks.dtype}"
        )
    if sinks.device != query.device:
        raise ValueError(f"`sinks` must be on query's device {query.device}, got {sinks.device}")


def _check_scale(scale: float | None) -> None:
    scale = python_number(scale)
    if scale is None:
        return
    if isinstance(scale, Tensor):
        raise ValueError("`scale` must be a float, got a tensor")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise ValueError(f"`scale` must be a float, got {type(scale).__name__}")
    # Not `math.isfinite`, which is no comparison that torch.compile keeps symbolic.
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"`scale` must be finite, got {shown_number(scale)}")


def _check_query_start(
    query: Tensor, queries: int, keys: int, query_start: int | Tensor | None
) -> None:
    query_start = python_number(query_start)
    if query_start is None:
        if queries > keys:
            raise ValueError(
                f"`query` must not have more tokens than `key` when `query_start` is not given, "
                f"got {queries} and {keys}"
            )
    elif isinstance(query_start, Tensor):
        _check_index_tensor("query_start", query_start, query.device)
        if not (query_start.dim() == 0 or _has_shape(query_start, query.shape[0])):
            raise ValueError(
                f"`query_start` must be an int, [] or [B] = [{query.shape[0]}], "
                f"got shape {list(query_start.shape)}"
            )
        if readable(query_start):
            _check_query_start_values(query_start)
    elif isinstance(query_start, bool) or not isinstance(query_start, (int, torch.SymInt)):
        raise ValueError(f"`query_start` must be an int or an int32 tensor, got {query_start!r}")
    elif query_start < 0:
        raise ValueError(f"`query_start` must not be negative, got {shown_number(query_start)}")
    elif query_start > MAX_POSITION:
        raise ValueError(
            f"`query_start` must be at most {MAX_POSITION}, got {shown_number(query_start)}"
        )


def _check_index_tensor(name: str, tensor: Tensor, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"`{name}` must be an int32 tensor, got {type(tensor).__name__}")
    check_tensors(**{name: tensor})
    if tensor.dtype != torch.int32:
        raise ValueError(f"`{name}` must be int32, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"`{name}` must be on query's device {device}, got {tensor.device}")


def _has_shape(tensor: Tensor, *sizes: int) -> bool:
    # Size by size: comparing tuples goes wrong under torch.compile with dynamic shapes.
    return tensor.dim() == len(sizes) and all(a == b for a, b in zip(tensor.shape, sizes))


def readable(tensor: Tensor) -> bool:
    """True if reading values waits for no device, breaks no compiled graph and needs no single
    value where `torch.vmap` has many."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not is_batched(tensor)


def in_graph(tensor: Tensor) -> bool:
    """True in torch.compile and in the capture of a CUDA graph, where the tensor is of a GPU."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_sinks_values(sinks: Tensor | None) -> None:
    if sinks is None or sinks.is_meta:
        return
    wrong = ~(sinks < torch.inf)  # NaN too; -inf is a head without a sink
    if bool(wrong.any()):
        head = int(wrong.nonzero()[0])
        raise ValueError(f"`sinks` must be below inf, got {sinks[head].item()} in head {head}")


def _check_query_start_values(query_start: Tensor) -> None:
    if query_start.numel() and int(query_start.min()) < 0:
        raise ValueError(f"`query_start` must not be negative, got {int(query_start.min())}")


def _check_key_start_values(key_start: Tensor) -> None:
    if key_start.dim() == 2 and key_start.shape[1] > 1:
        falls = key_start.diff(dim=1) < 0
        if bool(falls.any()):
            row, column = falls.nonzero()[0].tolist()
            before, after = key_start[row, column : column + 2].tolist()
            raise ValueError(
                f"`key_start` must never decrease along a row, got {before} then {after} in row "
                f"{row}"
            )


def _check_cu_seqlens_values(
    query_tokens: int,
    key_tokens: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    lengths = []
    for name, offsets, tokens, limit, limit_name in (
        ("cu_seqlens_q", cu_seqlens_q.tolist(), query_tokens, max_seqlen_q, "max_seqlen_q"),
        ("cu_seqlens_k", cu_seqlens_k.tolist(), key_tokens, max_seqlen_k, "max_seqlen_k"),
    ):
        if offsets[0] != 0:
            raise ValueError(f"`{name}` must start at 0, got {offsets[0]}")
        for before, after in zip(offsets, offsets[1:]):
            if after < before:
                raise ValueError(f"`{name}` must never decrease, got {before} then {after}")
        if offsets[-1] != tokens:
            raise ValueError(
                f"`{name}` must end at the number of tokens, {tokens}, got {offsets[-1]}"
            )
        lengths.append([after - before for before, after in zip(offsets, offsets[1:])])
        if max(lengths[-1]) > limit:
            raise ValueError(
                f"`{limit_name}` must be at least the longest document, {max(lengths[-1])}, got "
                f"{limit}"
            )
    for document, (queries, keys) in enumerate(zip(*lengths)):
        if queries > keys:
            raise ValueError(
                f"`cu_seqlens_q` must not give a document more queries than keys, "
                f"got {queries} and {keys} in document {document}"
            )
