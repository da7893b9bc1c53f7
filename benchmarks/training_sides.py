"""The sides of `benchmarks.training`: how one attends, and what its step takes."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface

import spattention as spa
from spattention.bands import BandPattern
from spattention.benchmarking.timing import graph_milliseconds
from spattention.choice import AttentionChoice, BandAttention, DenseAttention, attention_choice
from spattention.hf.config import remove_section
from spattention.training.graphs import PassGraph

from .training_documents import Documents

FLEX, VARLEN = "flex", "varlen"
BACKENDS = {
    "cudnn": ("dense cuDNN", SDPBackend.CUDNN_ATTENTION),
    "flash": ("dense FlashAttention", SDPBackend.FLASH_ATTENTION),
    "efficient": ("dense, PyTorch's memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
    "math": ("dense, PyTorch's own products", SDPBackend.MATH),
    FLEX: ("dense FlexAttention", None),
    VARLEN: ("dense FlashAttention 2 over documents, PyTorch's varlen_attn", None),
}
NO_DOCUMENTS = Documents(())
CHECKED_TOKENS = 1024
# Relative, in bfloat16. Another mask changes the gradients by about their size.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-3, 0.1


@dataclass(frozen=True)
class FlexAttention(DenseAttention):
    """Transformers' dense attention by FlexAttention, whose blocks leave out other documents."""

    def apply(self, model: Any) -> None:
        super().apply(model)
        model.set_attn_implementation("flex_attention")


@dataclass(frozen=True)
class VarlenAttention(DenseAttention):
    """Dense attention within documents by FlashAttention's kernels, as PyTorch has them.

    Their offsets are made in advance, as `DataCollatorWithFlattening` can give them to
    Transformers' `flash_attention_2`, which takes the same kernels from another package.
    """

    documents: Documents = NO_DOCUMENTS  # of all rows, one after another

    def apply(self, model: Any) -> None:
        super().apply(model)
        AttentionInterface.register(VARLEN, _varlen(self.documents, model.device))
        model.set_attn_implementation(VARLEN)


def dense_side(name: str, heads: int, length: int, documents: Documents | None = None) -> Side:
    """The side of one of `BACKENDS`; `documents` are those of all rows."""
    title, backend = BACKENDS[name]
    if name == VARLEN:
        if documents is None:
            raise ValueError(f"{VARLEN} needs documents that do not see one another")
        return Side(title, VarlenAttention(heads, documents=documents), backend)
    chosen = FlexAttention(heads) if name == FLEX else attention_choice("dense", heads, length)
    return Side(title, chosen, backend)


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
    kernels: str | None = None  # of the bands
    both_passes: Callable[[], Any] | None = None  # of one layer's attention alone
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

    def prepare_kernels(
        self, config: Any, windows: int, length: int, documents: Documents | None
    ) -> None:
        """Compile one layer's attention, for `time_kernels`."""
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads

        def tensor(count: int) -> torch.Tensor:
            shape = (windows, length, count, head_dim)
            found = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            return found.transpose(1, 2).requires_grad_()

        inputs = tensor(heads), tensor(key_heads), tensor(key_heads)
        d_out = tensor(heads).detach()
        attend = self._attention_of(inputs, documents)
        self.both_passes = lambda: torch.autograd.grad(attend(), inputs, d_out)
        self.both_passes()

    def time_kernels(self, count: int) -> None:
        """Set `kernel_seconds`: replays of one layer's forward and backward pass, `count` times."""
        assert self.both_passes is not None
        milliseconds = graph_milliseconds(self.both_passes, budget=100.0)
        self.kernel_seconds = milliseconds / 1e3 * count

    def _attention_of(
        self, inputs: tuple[torch.Tensor, ...], documents: Documents | None
    ) -> Callable[[], torch.Tensor]:
        """Attention of one layer as the model calls it; sets `kernels`."""
        query, key, value = inputs
        windows, heads = query.shape[:2]
        first = None
        if documents is not None:
            first = documents.first(query.device).expand(windows, -1)
        if isinstance(self.attention, BandAttention):
            pattern = self.attention.pattern
            self.kernels = spa.explain(query, key, value, pattern, key_start=first).kernels

            def bands() -> torch.Tensor:
                found = spa.band_attention(query, key, value, pattern, key_start=first)
                assert isinstance(found, torch.Tensor)
                return found

            return bands
        if isinstance(self.attention, FlexAttention):
            return _flex(inputs, first)
        if isinstance(self.attention, VarlenAttention):
            attend = _varlen(self.attention.documents, query.device)
            return lambda: attend(None, *inputs, None)[0].transpose(1, 2)
        assert self.backend is not None
        backend, mask = self.backend, None if documents is None else documents.mask(query.device)
        # Transformers repeats keys where there is a mask.
        repeats = 1 if mask is None else heads // key.shape[1]

        def dense() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    query,
                    key.repeat_interleave(repeats, 1) if repeats > 1 else key,
                    value.repeat_interleave(repeats, 1) if repeats > 1 else value,
                    attn_mask=mask,
                    is_causal=mask is None,
                    enable_gqa=mask is None and heads != key.shape[1],
                )

        return dense

    def compare(self, model: Any, tokens: torch.Tensor, documents: Documents | None) -> None:
        """Set `check`: loss and gradients of the values' weights in a short window, with these
        bands or documents and, by a dense mask of the same, in the model's stock attention.
        Documents go as positions that restart to the bands, and in the mask to the reference.

        Raises:
            RuntimeError: if they differ.
        """
        tokens = tokens[:1, :CHECKED_TOKENS]
        heads, length = model.config.num_attention_heads, tokens.shape[1]
        short: AttentionChoice
        if isinstance(self.attention, BandAttention):
            short = attention_choice(self.attention.name, heads, length)
            assert isinstance(short, BandAttention)
            pattern = short.pattern
        elif isinstance(self.attention, VarlenAttention):
            short = VarlenAttention(heads, documents=self.attention.documents.until(length))
            pattern = BandPattern((((0, length),),) * heads, length)
        else:
            return
        if documents is None:
            mask, positions = pattern.mask(length, device=tokens.device)[None], None
        else:
            mask = documents.mask_of(pattern, length, tokens.device)[None]
            positions = documents.positions(tokens.device)[None, :length]
        reference = Side("reference", attention_choice("dense", heads, length), SDPBackend.MATH)
        with torch.compiler.set_stance("force_eager"):
            with reference.chosen(model):
                wanted_loss, wanted = _loss_and_gradients(model, tokens, mask, positions)
            with Side(self.name, short, None).chosen(model):
                loss, gradients = _loss_and_gradients(model, tokens, None, positions)
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


def _flex(
    inputs: tuple[torch.Tensor, ...], first: torch.Tensor | None
) -> Callable[[], torch.Tensor]:
    """Compiled causal FlexAttention, within documents if the first token of each is given."""
    query, key, value = inputs
    windows, heads, length, _ = query.shape

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k if first is None else (q >= k) & (first[b, q] == first[b, k])

    blocks = create_block_mask(mask, windows, None, length, length, device=query.device.type)
    compiled = torch.compile(flex_attention)

    def attend() -> torch.Tensor:
        grouped = heads != key.shape[1]
        found: torch.Tensor = compiled(query, key, value, block_mask=blocks, enable_gqa=grouped)
        return found

    return attend


@functools.cache
def _varlen(documents: Documents, device: torch.device) -> Callable[..., Any]:
    """Attention of a layer within documents; the same function every time, so that a compiled
    layer stays as it is.
    """
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = documents.offsets(device), max(documents.lengths)
    # PyTorch 2.11 takes fewer key heads as they are, 2.13 if it is told so.
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    more: dict[str, Any] = {"enable_gqa": True} if told else {}

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        scaling: float | None = None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
        options = {"scale": scaling, "window_size": (-1, 0), **more}
        out = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
        assert isinstance(out, torch.Tensor)
        return out.unflatten(0, (query.shape[0], query.shape[2])), None

    return attend


def _loss_and_gradients(
    model: Any,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[float, torch.Tensor]:
    given = {"attention_mask": mask, "position_ids": positions}
    loss = model(input_ids=tokens, labels=tokens, use_cache=False, **given).loss
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
