"""The sides of `benchmarks.training`: how one attends, and what its step takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import spattention as spa
from spattention.benchmarking.timing import graph_milliseconds
from spattention.choice import AttentionChoice, BandAttention, attention_choice
from spattention.hf.config import remove_section
from spattention.training.graphs import PassGraph

BACKENDS = {
    "cudnn": ("dense cuDNN", SDPBackend.CUDNN_ATTENTION),
    "flash": ("dense FlashAttention", SDPBackend.FLASH_ATTENTION),
    "math": ("dense, PyTorch's own products", SDPBackend.MATH),
}
CHECKED_TOKENS = 1024
# Relative, in bfloat16. Another mask changes the gradients by about their size.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-3, 0.1


@dataclass
class Side:
    """One way to attend: how it is switched on, and what its steps took, in seconds. Between the
    sides the model has its stock attention.
    """

    name: str
    attention: AttentionChoice
    backend: SDPBackend | None
    seconds: list[float] = field(default_factory=list)
    graph: PassGraph | None = None
    loss: float = float("nan")
    kernel_seconds: float | None = None  # of attention in one step, by its kernels alone
    check: dict[str, float] | None = None

    @contextlib.contextmanager
    def chosen(self, model: Any) -> Iterator[None]:
        self.attention.apply(model)
        try:
            with sdpa_kernel(self.backend) if self.backend else contextlib.nullcontext():
                yield
        finally:
            remove_section(model.config)
            model.set_attn_implementation("sdpa")

    def time_kernels(self, config: Any, windows: int, length: int, passes: int) -> None:
        """Set `kernel_seconds`: replays of one layer's forward and backward pass."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads

        def tensor(count: int) -> torch.Tensor:
            shape = (windows, length, count, head_dim)
            found = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            return found.transpose(1, 2).requires_grad_()

        query, d_out = tensor(heads), tensor(heads).detach()
        key, value = (tensor(config.num_key_value_heads) for _ in range(2))

        def attend() -> torch.Tensor:
            if isinstance(self.attention, BandAttention):
                found = spa.band_attention(query, key, value, self.attention.pattern)
                assert isinstance(found, torch.Tensor)
                return found
            assert self.backend is not None
            with sdpa_kernel(self.backend):
                grouped = heads != config.num_key_value_heads
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=grouped
                )

        def call() -> None:
            torch.autograd.grad(attend(), (query, key, value), d_out)

        milliseconds = graph_milliseconds(call, budget=100.0)
        self.kernel_seconds = milliseconds / 1e3 * config.num_hidden_layers * passes

    def compare(self, model: Any, tokens: torch.Tensor) -> None:
        """Set `check`: loss and gradients of the values' weights in a short window, with these
        bands and, by a dense mask of the same pattern, in the model's stock attention.

        Raises:
            RuntimeError: if they differ.
        """
        if not isinstance(self.attention, BandAttention):
            return
        tokens = tokens[:1, :CHECKED_TOKENS]
        heads, length = model.config.num_attention_heads, tokens.shape[1]
        short = attention_choice(self.attention.name, heads, length)
        assert isinstance(short, BandAttention)
        mask = short.pattern.mask(length, device=tokens.device)[None]
        reference = Side("reference", attention_choice("dense", heads, length), SDPBackend.MATH)
        with torch.compiler.set_stance("force_eager"):
            with reference.chosen(model):
                wanted_loss, wanted = _loss_and_gradients(model, tokens, mask)
            with Side(self.name, short, None).chosen(model):
                loss, gradients = _loss_and_gradients(model, tokens, None)
        self.check = {
            "tokens": length,
            "loss": loss,
            "reference_loss": wanted_loss,
            "gradient_difference": float((gradients - wanted).norm() / wanted.norm()),
        }
        if not (
            abs(loss / wanted_loss - 1) <= LOSS_TOLERANCE
            and self.check["gradient_difference"] <= GRADIENT_TOLERANCE
        ):
            raise RuntimeError(f"{self.name} differs from its reference: {self.check}")


def _loss_and_gradients(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor | None
) -> tuple[float, torch.Tensor]:
    loss = model(input_ids=tokens, labels=tokens, attention_mask=mask, use_cache=False).loss
    loss.backward()
    named = dict(model.named_parameters())
    found = [each.grad.flatten() for name, each in named.items() if "v_proj" in name]
    model.zero_grad()
    return float(loss.detach()), torch.cat(found)


def predict(dense: Side, side: Side, seconds: dict[str, float]) -> dict[str, float]:
    """What a side's kernels alone predict of its step, and how much of that it reaches.

    Args:
        dense: the first side.
        side: another.
        seconds: of a step of each, by name.
    """
    if dense.kernel_seconds is None or side.kernel_seconds is None or side is dense:
        return {}
    gain = dense.kernel_seconds - side.kernel_seconds
    predicted = seconds[dense.name] - gain
    return {
        "predicted_seconds": predicted,
        "share_of_predicted_gain": (seconds[dense.name] - seconds[side.name]) / gain,
        "share_of_predicted_speed": predicted / seconds[side.name],
    }
