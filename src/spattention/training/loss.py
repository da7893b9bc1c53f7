"""Cross-entropy from hidden states, a few thousand rows at a time: no [tokens, vocabulary] float32.

A model of Transformers makes all logits and hands them to its loss function. Here its output layer
hands on the hidden states instead, and the loss function multiplies by the layer's weight itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..data.tokens import IGNORED

ROWS = 4096  # tokens whose logits exist at a time
# What models of Transformers call the bound of their logits, which is no linear function of them.
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

Summed = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class DeferredHead(torch.nn.Linear):
    """An output layer without bias whose product the loss makes."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def defer_loss(model: Any, kind: str, *, compiled: bool = False) -> None:
    """Let a causal language model take its loss in chunks; it then returns no logits.

    Args:
        model: of Transformers; what it saves stays as it was.
        kind: "plain" changes nothing, "chunked" recomputes each chunk's logits in the backward
            pass, "liger" computes gradients in the forward pass with Liger's kernels.
        compiled: compile a chunk of "chunked", whose float32 logits are then never written.

    Raises:
        ModuleNotFoundError: if Liger is asked for and not installed.
        ValueError: if the output layer is not a plain linear layer without bias, or the model caps
            its logits.
    """
    if kind == "plain":
        return
    summed = _liger() if kind == "liger" else partial(chunked_cross_entropy, compiled=compiled)
    old = model.get_output_embeddings()
    if type(old) is not torch.nn.Linear or old.bias is not None:
        raise ValueError(f'`loss` must be "plain" for {type(old).__name__} with bias, got "{kind}"')
    for name in LOGIT_CAPS:
        cap = getattr(model.config.get_text_config(), name, None)
        if cap is not None:
            raise ValueError(
                f'`loss` must be "plain" for a model that caps its logits ({name} = {cap}), got '
                f'"{kind}"'
            )
    head = DeferredHead(old.in_features, old.out_features, bias=False, device="meta")
    head.weight = old.weight
    model.set_output_embeddings(head)

    def loss_function(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        targets = shift_labels.flatten()
        total = summed(logits.flatten(0, 1), head.weight, targets)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / count

    model.loss_function = loss_function


def check_loss(kind: str, device: torch.device) -> None:
    """Check that a loss runs here, before a model is built.

    Raises:
        ModuleNotFoundError: if Liger is asked for and not installed.
        ValueError: if Liger is asked for without a GPU.
    """
    if kind != "liger":
        return
    if device.type == "cpu":
        raise ValueError('`loss` must be "chunked" or "plain" on the CPU, got "liger"')
    if find_spec("liger_kernel") is None:
        raise ModuleNotFoundError('`loss` = "liger" needs liger-kernel', name="liger_kernel")


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, compiled: bool = False
) -> torch.Tensor:
    """Sum of `cross_entropy(hidden @ weight.T, targets)` with a float32 softmax, by chunks of rows.

    Args:
        hidden: `[T, D]`.
        weight: `[V, D]`.
        targets: int64 `[T]`; those equal to -100 do not count.
        compiled: compile what is done to a chunk, and compute gradients in the forward pass: logits
            are then made once, and take no float32 memory.

    Returns:
        float32 `[]`.
    """
    if compiled and torch.is_grad_enabled():
        return _WithGradients.apply(hidden, weight, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS)):
        # Nothing is random there, and a CUDA graph cannot hold the reading of a random state.
        total = total + checkpoint(
            _cross_entropy, rows, weight, wanted, use_reentrant=False, preserve_rng_state=False
        )
    return total


class _WithGradients(torch.autograd.Function):
    """The same sum; its gradients wait for the backward pass, which only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows, wanted, d_rows in zip(
            hidden.split(ROWS), targets.split(ROWS), d_hidden.split(ROWS)
        ):
            loss, d_logits = _compiled_with_gradient(rows, weight, wanted)
            total += loss
            torch.mm(d_logits, weight, out=d_rows)
            if d_weight is not None:
                d_weight += d_logits.T @ rows
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scaled = None if d_weight is None else d_weight * d_total
        return (d_hidden * d_total).to(d_hidden.dtype), scaled, None


def _cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _with_gradient(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum and its gradient by the logits `[T, V]`, in hidden's dtype."""
    logits = F.linear(hidden, weight)
    lse = torch.logsumexp(logits.float(), dim=-1)
    counts = targets != IGNORED
    index = torch.where(counts, targets, 0)
    chosen = logits.gather(1, index[:, None]).float()[:, 0]
    loss = torch.where(counts, lse - chosen, 0.0).sum()
    entries = torch.arange(logits.shape[1], device=logits.device)
    gradient = torch.exp(logits.float() - lse[:, None]) - (entries == index[:, None]).float()
    return loss, torch.where(counts[:, None], gradient, 0.0).to(hidden.dtype)


_compiled_with_gradient = torch.compile(_with_gradient, dynamic=False)


def _liger() -> Summed:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
    )
    return lambda hidden, weight, targets: fused(weight, hidden, targets)
