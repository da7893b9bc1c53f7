"""The implementation and the kernels that a call gets, and why not faster ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import attention
from .attention import choose, refusal
from .bands import BandPattern
from .binding import bind, bind_varlen
from .checks import validate

PYTORCH = "PyTorch operations"


@dataclass(frozen=True)
class Explanation:
    """Answer of `explain`.

    Args:
        implementation: the value of `impl` that the call runs with.
        kernels: name of the kernels that run, with the version of Triton.
        reasons: why no faster kernels run, one sentence each; empty if there are none.
    """

    implementation: str
    kernels: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.implementation}: {self.kernels}", *self.reasons])


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    *,
    sinks: Tensor | None = None,
    query_start: int | Tensor | None = None,
    key_start: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    impl: str | None = None,
) -> Explanation:
    """Name the kernels that a call of `band_attention` gets, and why not faster ones.

    Nothing is computed.

    ```
    >>> print(spattention.explain(query, key, value, pattern))
    triton: portable kernels (Triton 3.6.0)
    The Hopper kernels need head_dim 64 or 128, got 96.
    ```

    Arguments are those of `band_attention`, or of `band_attention_varlen` if `cu_seqlens_q` is
    given. Whether gradients are recorded and whether autocast is on is taken from the context of
    this call. On CUDA this waits for the device.

    Raises:
        ValueError: if an argument breaks a rule of the operator, or `impl` cannot compute the call.
    """
    rows: dict[str, Any] = {"query_start": query_start, "key_start": key_start}
    packed: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }
    validate(query, key, value, pattern, sinks=sinks, **rows, **packed)
    if cu_seqlens_q is None:
        call = bind(query, key, value, pattern, scale=None, sinks=sinks, **rows)
    else:
        call = bind_varlen(query, key, value, pattern, **packed, scale=None, sinks=sinks)
    if impl is None:
        reason = refusal(call.query, call.value)
        if attention.HAS_TRITON and not call.query.is_cuda:
            reason = f"needs CUDA tensors, got {call.query.device.type}"
        if reason is not None:
            return Explanation("blockwise", PYTORCH, (f'`impl="triton"` {reason}.',))
    elif impl != "triton":
        choose(impl, call.query, call.value)  # raises for a name that there is not
        return Explanation(impl, PYTORCH, (f'`impl="{impl}"` was given.',))
    name, need = choose("triton", call.query, call.value).describe(call)
    reasons = () if need is None else (f"The Hopper kernels need {need}.",)
    return Explanation("triton", name, reasons)
