"""How a baseline gets into a model of Transformers: an attention name, a config section, and one
object per layer that does the work.

    config.<kind> = {"version": 1, <the fields of the baseline>}

Every baseline takes whole sequences, and a growing cache of one document per row. Padding, packed
documents, static caches, dropout, caps and attention weights raise. The systems of
`spattention.related` enter models the same way.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..compat.huggingface import attention_name
from ..hf.config import MAX_SPAN
from ..hf.decoder import attention_modules, check_model
from ..hf.parallel_guard import guard_parallel
from ..hf.section import AttentionKind, kinds_of, register_kind, section_changed
from ..hf.weights import Note, no_note, note_weights
from ..impl.layout import without_autocast
from ..scalars import as_number, shown_number
from .state import Handle, State, keep_state, stop_keeping_state

VERSION = 1
MAX_HEADS = 2**16
PLAN = "baseline_attention"  # attribute of an attention module
REFUSED = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "output_attentions",
    "s_aux",
    "sliding_window",
    "softcap",
)


class LayerAttention(Protocol):
    """The attention of one layer."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Causal attention of the last Q positions.

        Args:
            query: `[B, H, Q, D]`.
            key: `[B, Hkv, K, D]`, K >= Q; value alike, `[B, Hkv, K, Dv]`.
            value: see key.
            scale: factor of the scores.

        Returns:
            `[B, H, Q, Dv]` in query's dtype.
        """

    def weights(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """The weights of queries `start` to `stop` of a whole sequence (Q = K), to be looked at:
        `[B, H, stop - start, K]`, float32, each row adds up to 1.
        """


class StatefulAttention(LayerAttention, Protocol):
    """The attention of a layer whose past is a `State`, in place of keys and values."""

    def attend_after(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Causal attention of tokens that follow a state, which then holds them too.

        Args:
            state: of the layer; each system says which tensors it has.
            query: `[B, H, Q, D]`.
            key: `[B, Hkv, Q, D]`; value alike.
            value: see key.
            scale: factor of the scores.
        """


@dataclass(frozen=True)
class Baseline(ABC):
    """A way to attend in every layer of a model, in plain values that are saved with it.

    Args:
        num_heads: query heads.
        span: context length in tokens that it is made for; longer inputs raise.
    """

    kind: ClassVar[str]  # attention name and config section
    call: ClassVar[str] = "spattention.baselines.register()"  # named in errors
    has_weights: ClassVar[bool] = False  # beside those of stock attention
    keeps_state: ClassVar[bool] = False  # its layers have `attend_after`, for a cache of its own

    num_heads: int
    span: int

    @abstractmethod
    def layer(self, index: int, num_layers: int) -> LayerAttention:
        """The attention of layer `index` of `num_layers`."""

    @abstractmethod
    def pairs(self, seq_len: int, num_layers: int) -> int:
        """Attended (query, key) pairs of a layer over `seq_len` tokens, all heads together, the
        mean over the layers.
        """

    def check(self, module: Any) -> None:  # noqa: B027
        """Raise `ValueError` unless an attention module can be equipped; most can."""

    def equip(self, module: Any) -> None:  # noqa: B027
        """Change an attention module before its weights are loaded; most baselines do not."""

    def layer_in(self, module: Any, num_layers: int) -> LayerAttention:
        """The attention of an equipped module; most depend on its index alone."""
        return self.layer(module.layer_idx, num_layers)

    def section(self) -> dict[str, Any]:
        """The section that is saved in the model's config."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def restore(cls, model: Any, section: Any) -> None:
        """Apply the section of an adapter to a model with stock attention, in place."""
        if cls.has_weights:
            raise ValueError(
                f"the base model must come with its `{cls.kind}` weights, which an adapter does "
                "not hold, got a model without"
            )
        apply(model, cls.from_section(section))

    @classmethod
    def from_section(cls, section: Any) -> Self:
        """The baseline that `section` wrote; raises `ValueError` for anything else."""
        version = section.get("version") if isinstance(section, Mapping) else None
        if version != VERSION or isinstance(version, bool):
            raise ValueError(
                f"`config.{cls.kind}` must be a section of version {VERSION}, got {section!r}"
            )
        values = {name: value for name, value in section.items() if name != "version"}
        names = [field.name for field in fields(cls)]
        if sorted(map(str, values)) != sorted(names):
            raise ValueError(
                f"`config.{cls.kind}` must have the entries {['version', *names]}, got "
                f"{sorted(map(str, section))}"
            )
        return cls(**values)


def check_integers(kind: str, **values: tuple[Any, int, int]) -> None:
    """Each value is an integer between the two that follow it, both included."""
    for name, (value, least, most) in values.items():
        if type(value) is not int or not least <= value <= most:
            raise ValueError(
                f"`{name}` of `{kind}` must be an integer from {least} to {most}, got "
                f"{shown_number(value)}"
            )


def check_size(baseline: Baseline, least_span: int = 1) -> None:
    """A baseline's heads and span are numbers that memory can be asked for; all numbers become
    Python's, for they are saved.
    """
    for field in fields(baseline):
        number = as_number(getattr(baseline, field.name))
        if number is not None:
            object.__setattr__(baseline, field.name, number)
    check_integers(
        baseline.kind,
        num_heads=(baseline.num_heads, 1, MAX_HEADS),
        span=(baseline.span, least_span, MAX_SPAN),
    )


def register(kind: type[Baseline]) -> None:
    """Make `attn_implementation=kind.kind` known to Transformers, for this process.

    From then on an attention module that is built from a config with the section gets its baseline.
    """
    register_kind(
        AttentionKind(
            name=kind.kind,
            call=kind.call,
            forward=attention_forward,
            mask=no_mask,
            is_equipped=lambda module: hasattr(module, PLAN),
            equip=partial(_equip_from_config, kind),
            restore=kind.restore,
            weights=_head_weights,
            check_weights=partial(check_weights, kind),
        )
    )


def apply(model: Any, baseline: Baseline) -> Any:
    """Put a baseline into every attention layer of a causal language model, in place.

    Args:
        model: a Transformers causal language model with stock attention in all its layers.
        baseline: what to put in.

    Returns:
        The same model; `config` says what was done and is saved with it.

    Raises:
        ValueError: if the model has bands, another baseline, sliding windows, layers without
            attention, or another number of heads. The model is then as it was.
    """
    if not isinstance(baseline, Baseline):
        raise ValueError(
            "`baseline` must be a baseline or related system, such as `MEA(8, 1024)`, got "
            f"{type(baseline).__name__}"
        )
    kind = baseline.kind
    config = model.config
    if config.get_text_config() is not config or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"`model` must be a text decoder alone for {kind}, got {config.model_type}"
        )
    modules = attention_modules(model, config)
    check_model(model, config, modules)
    for present in kinds_of(config):
        raise ValueError(f"`model` must have stock attention for {kind}, got {present.name}")
    layers = config.num_hidden_layers
    if sorted(modules) != list(range(layers)):
        raise ValueError(
            f"`model` must have softmax attention in all {layers} layers for {kind}, got "
            f"{sorted(modules)}"
        )
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if not types else None
    if window is not None or types - {"full_attention"}:
        raise ValueError(
            f"`model` must not have sliding windows of its own for {kind}, got "
            f"{sorted(types) or window}"
        )
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(f"`model` must not be split over ranks for {kind}, got {model.tp_size}")
    _check_heads(baseline, config)
    for module in modules.values():
        baseline.check(module)
    register(type(baseline))
    setattr(config, kind, baseline.section())  # first: what `_equip` notes is read from there
    for module in modules.values():
        _equip(baseline, module, layers)
    model.set_attn_implementation(kind)
    section_changed(model)
    return model


def remove(model: Any) -> Any:
    """Give a model with a baseline its stock attention back, in place; its modules keep the
    changes that `equip` made.
    """
    config = model.config
    for kind in list(kinds_of(config)):
        delattr(config, kind.name)
    for module in attention_modules(model, config).values():
        if hasattr(module, PLAN):
            delattr(module, PLAN)
            note_weights(module, no_note)
        stop_keeping_state(module)
    model.set_attn_implementation("sdpa")
    section_changed(model)
    return model


def check_weights(kind: type[Baseline], model: Any, loading_info: Any) -> None:
    """Check that a checkpoint has all weights of equipped attention modules, and no others."""
    mismatched = {key for key, *_ in loading_info.mismatched_keys}
    for name, module in model.named_modules():
        if not hasattr(module, PLAN) or getattr(module.config, kind.kind, None) is None:
            continue
        for keys, problem in (
            (loading_info.missing_keys, "no {}"),
            (loading_info.unexpected_keys, "{}, which has no place in it"),
            (mismatched, "{} of another shape"),
        ):
            if found := sorted(key for key in keys if key.startswith(f"{name}.")):
                raise ValueError(
                    f"the checkpoint must hold the attention weights that `config.{kind.kind}` "
                    f"asks for, got {problem.format(found[0])}"
                )


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention function of every baseline; arguments are those of Transformers' interface.
    Key and value are tensors, or the handles of a `StateLayer`.

    Returns:
        `([B, Q, H, Dv], None)`.
    """
    config: Any = module.config
    kind = attention_name(config)
    plan: LayerAttention | None = getattr(module, PLAN, None)
    if plan is None:
        raise ValueError(
            f'`attn_implementation="{kind}"` needs `config.{kind}` before the model is built, or '
            f"`spattention.baselines.apply`; got none for {type(module).__name__}"
        )
    if attention_mask is not None:
        raise ValueError(
            f"`attention_mask` must be None for {kind}, got shape {list(attention_mask.shape)}"
        )
    if dropout > 0:
        raise ValueError(f"attention dropout must be 0 for {kind}, got {dropout}")
    for name in REFUSED:
        given = keywords.get(name)
        if given is not None and given is not False:
            raise ValueError(f"`{name}` must be None for {kind}, which cannot honour it")
    if keywords.get("is_causal") is False:
        raise ValueError(f"the model must be causal for {kind}, got `is_causal=False`")
    _check_positions(kind, keywords.get("position_ids"))
    state: State | None = None
    if isinstance(key, Handle):
        handle: Handle = key
        state, key, value = handle.state, handle.key, handle.value
    span, length = getattr(config, kind)["span"], key.shape[2] + (state.length if state else 0)
    if length > span:
        raise ValueError(
            f"inputs must have at most the {span} tokens that {kind} was made for, got {length}"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with without_autocast(query):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if state is None:
            out = plan.attend(query, key, value, scale)
        else:
            stateful = cast(StatefulAttention, plan)  # `keeps_state` says so
            out = stateful.attend_after(state, query, key, value, scale)
            state.length = length
    return out.transpose(1, 2).contiguous(), None


def no_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    use_vmap: bool = False,
    **others: Any,
) -> None:
    """The mask function of every baseline: it makes none, and what would need one raises."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "`attention_mask` must have no padding for a baseline, got zeros: give rows of equal "
            "length"
        )
    if use_vmap or mask_function is not causal_mask_function:
        raise ValueError(
            "the model's mask must be causal, one document per row, for a baseline, got a mask of "
            "packed documents, windows or added rules"
        )
    if isinstance(q_offset, Tensor) or q_offset - kv_offset != kv_length - q_length:
        raise ValueError(
            "`past_key_values` must grow with its tokens for a baseline, got a static cache"
        )


def _check_positions(kind: str, position_ids: Tensor | None) -> None:
    # With a cache, Transformers does not look for documents packed in a row.
    if position_ids is None or position_ids.dim() != 2 or torch.compiler.is_compiling():
        return
    if position_ids.device.type == "cpu" and bool((position_ids.diff(dim=1) != 1).any()):
        raise ValueError(f"`position_ids` must go up by one for {kind}, got packed documents")


def _check_heads(baseline: Baseline, config: Any) -> None:
    if baseline.num_heads != config.num_attention_heads:
        raise ValueError(
            f"`{baseline.kind}` has {baseline.num_heads} heads but the model has "
            f"{config.num_attention_heads}"
        )


def _equip(baseline: Baseline, module: Any, num_layers: int) -> None:
    baseline.equip(module)
    setattr(module, PLAN, baseline.layer_in(module, num_layers))
    if baseline.keeps_state:
        keep_state(module)
    guard_parallel(module)
    note_weights(module, partial(_note, baseline))


def _note(baseline: Baseline, module: Any) -> Note | None:
    """The note of a module that was equipped, also once the section of its config is gone."""
    if not hasattr(module, PLAN):
        return None
    return Note(baseline.kind, baseline.call, json.dumps(baseline.section(), sort_keys=True))


def _equip_from_config(kind: type[Baseline], module: Any) -> None:
    config = module.config
    baseline = kind.from_section(getattr(config, kind.kind))
    _check_heads(baseline, config)
    baseline.check(module)
    _equip(baseline, module, config.num_hidden_layers)


def _head_weights(
    module: Any,
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    sinks: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    """See `hf.head_weights.HeadWeights`; baselines have no sinks."""
    weights = getattr(module, PLAN).weights(query, key, scale, start, stop)
    return torch.nn.functional.pad(weights, (0, 1))
