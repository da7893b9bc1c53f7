"""The implementation and the kernels that a call gets, and why not faster ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention import HAS_TRITON, IMPLEMENTATIONS
from .bands import BandPattern
from .binding import bind, bind_varlen
from .checks import validate


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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    *,
    sinks: torch.Tensor | None = None,
    query_start: int | torch.Tensor | None = None,
    key_start: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
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
    validate(
        query,
        key,
        value,
        pattern,
        sinks=sinks,
        query_start=query_start,
        key_start=key_start,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    if impl not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"`impl` must be None or one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl in ("reference", "blockwise"):
        return Explanation(impl, PYTORCH, (f'`impl="{impl}"` was given.',))
    if cu_seqlens_q is None:
        call = bind(
            query,
            key,
            value,
            pattern,
            scale=None,
            sinks=sinks,
            query_start=query_start,
            key_start=key_start,
        )
    else:
        assert cu_seqlens_k is not None
        assert max_seqlen_q is not None
        assert max_seqlen_k is not None
        lengths = max_seqlen_q, max_seqlen_k
        offsets = cu_seqlens_q, cu_seqlens_k
        call = bind_varlen(query, key, value, pattern, *offsets, *lengths, scale=None, sinks=sinks)
    refusal = _refusal(call.query, call.value, impl)
    if refusal is not None:
        if impl is not None:
            raise ValueError(f'`impl="{impl}"` {refusal}')
        return Explanation("blockwise", PYTORCH, (f'`impl="triton"` {refusal}.',))
    from .impl import triton as kernels

    name, need = kernels.describe(call)
    reasons = () if need is None else (f"The Hopper kernels need {need}.",)
    return Explanation("triton", name, reasons)


PYTORCH = "PyTorch operations"


def _refusal(query: torch.Tensor, value: torch.Tensor, impl: str | None) -> str | None:
    """Why the Triton kernels do not run the call, or None if they do."""
    if not HAS_TRITON:
        return 'needs Triton: pip install "spattention[gpu]"'
    if impl is None and not query.is_cuda:
        return f"needs CUDA tensors, got {query.device.type}"
    from .impl import triton as kernels

    return kernels.refusal(query, value)
