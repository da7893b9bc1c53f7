"""Attention kinds that a section of a model's config describes: bands, baselines and relatives.

    config.<kind> = {"version": 1, ...}

A saved model must come back with its attention, or not at all, whoever opens it. So whatever writes
a config with a section also writes

- `attn_implementation`, the kind, which Transformers honours on loading;
- `architectures` with a prefix, which vLLM and other programs look up and do not know (Transformers
  goes by `model_type`; after `register` it knows these names too, since some tools look there);
- an empty `auto_map`, without which TRL fails before it gets to the next entry;
- a requirement among `fusion_config`, which `from_pretrained` refuses by name in a process without
  this library, `attn_implementation="sdpa"` or not. It is off, so a process that knows it does
  nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compat.huggingface import (
    alias_architectures,
    attention_name,
    register_fusion,
    set_attention_name,
    wrap_attention_choice,
    wrap_missing_keys_check,
    wrap_module_loading,
)
from .decoder import is_attention
from .head_weights import HeadWeights
from .import_hooks import when_imported
from .weights import (
    REQUIREMENT,
    allow_weights,
    checking_notes,
    is_mark,
    refill_marks,
    refuse_other_mark,
    refusing_lost_sections,
    refusing_other_marks,
)

ARCHITECTURE_PREFIX = "Spattention"
LONGEST_VALUE = 200  # characters of a value in an error
LOADER = "modeling_spattention"  # a module beside a saved model; see `loader`
CONFIG_LOADER = {"AutoConfig": f"{LOADER}.Config"}  # its entry of `auto_map`
ADAPTERS = "spattention.hf.peft_adapters"  # imported with PEFT, never without
GUARD = "spattention.hf.peft_guard"
TRAINER_GUARD = "spattention.hf.trainer_guard"
ACCELERATE_GUARD = "spattention.hf.accelerate_guard"
PLANNER = "torch.distributed.checkpoint.default_planner"
PLANNER_GUARD = "spattention.hf.planner_guard"
CALL = "spattention.hf.register()"  # makes bands known, as errors name it
# A loader makes a call code of its folder, so it is one of these, whatever a config says.
CALLS = (CALL, "spattention.baselines.register()", "spattention.related.register()")


@dataclass(frozen=True)
class AttentionKind:
    """An attention that a section of the config describes.

    Attributes:
        name: of the attention implementation, and of the section.
        call: what makes it known to Transformers, as an error names it.
        forward: the attention function, as Transformers' interface takes it.
        mask: the mask function, alike.
        is_equipped: tells whether an attention module has its part of the section.
        equip: gives an attention module its part of the section, while the model is built.
        restore: applies a saved section to a model with stock attention, in place.
        weights: recomputes the weights of its heads; None where they cannot be looked at.
        check_weights: raises ValueError if a checkpoint lacks weights that the section asks for, or
            holds others; takes a model and Transformers' facts of the loading. None: nothing to
            check.
    """

    name: str
    call: str
    forward: Callable[..., Any]
    mask: Callable[..., Any]
    is_equipped: Callable[[Any], bool]
    equip: Callable[[Any], None]
    restore: Callable[[Any, Any], None]
    weights: HeadWeights | None = None
    check_weights: Callable[[Any, Any], None] | None = None

    @property
    def requirement(self) -> str:
        """Entry of `fusion_config`, which a process without the kind names in its error."""
        return f"{self.name}: {self.call}{REQUIREMENT}"


# Registered kinds by name; a registry of the process, as those of Transformers.
KINDS: dict[str, AttentionKind] = {}


def register_kind(kind: AttentionKind) -> None:
    """Make a kind known to Transformers, for this process. A second call does nothing.

    From then on an attention module that is built from a config with the section is equipped, and
    configs with the section are saved so that nobody opens them without it.

    Raises:
        ValueError: if something else has registered an attention function of that name.
    """
    if kind.name in KINDS:
        return
    if kind.name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        taken = ALL_ATTENTION_FUNCTIONS[kind.name]
        raise ValueError(
            f'attn_implementation="{kind.name}" must not be registered by something else, got '
            f"{getattr(taken, '__module__', taken)}"
        )
    if not KINDS:
        register_module_module_registration_hook(_equip_when_built)
        wrap_attention_choice(_choosing_kind)
        PreTrainedConfig.to_dict = _with_marks(PreTrainedConfig.to_dict)
        PreTrainedModel.load_state_dict = checking_notes(PreTrainedModel.load_state_dict)
        wrap_module_loading(refusing_other_marks)
        PreTrainedModel.save_pretrained = refusing_lost_sections(PreTrainedModel.save_pretrained)
        # Transformers only warns about weights that a checkpoint lacks, and leaves parameters that
        # it does not know uninitialised. There is no public place to be stricter.
        wrap_missing_keys_check(_with_strict_weights)
        alias_architectures(ARCHITECTURE_PREFIX)
        when_imported("peft", GUARD)
        when_imported("transformers.trainer_callback", TRAINER_GUARD)
        when_imported("accelerate", ACCELERATE_GUARD)
        when_imported(PLANNER, PLANNER_GUARD)
    KINDS[kind.name] = kind
    allow_weights(kind.name)
    AttentionInterface.register(kind.name, kind.forward)
    AttentionMaskInterface.register(kind.name, kind.mask)
    register_fusion(kind.requirement)


def kinds_of(config: Any) -> Iterator[AttentionKind]:
    """The registered kinds that a config, without its parts, has a section of."""
    return (kind for name, kind in KINDS.items() if getattr(config, name, None) is not None)


def section_in(model: Any) -> tuple[str, Mapping[str, Any]] | None:
    """The registered kind that a model's text config has a section of, and the section."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    text_config = config.get_text_config()
    for kind in kinds_of(text_config):
        return kind.name, getattr(text_config, kind.name)
    return None


def check_same_section(rule: str, wanted: tuple[str, Any], found: tuple[str, Any] | None) -> None:
    """Check that a model has a section, each given by its kind; entries that are there for readers
    alone may differ.

    Raises:
        ValueError: which begins with the rule, and names the first entry that differs.
    """
    if found is None:
        raise ValueError(f"{rule}, got one without")
    if found[0] != wanted[0]:
        raise ValueError(f"{rule}, got `config.{found[0]}`")
    if _differ(wanted[1], found[1]):
        raise ValueError(f"{rule}, {_difference(wanted[1], found[1])}")


def _meaning(section: Any) -> Any:
    if isinstance(section, Mapping):
        return {name: _meaning(value) for name, value in section.items() if name != "recipe"}
    if isinstance(section, Iterable) and not isinstance(section, str):
        return [_meaning(value) for value in section]
    return section


def _difference(wanted: Any, found: Any) -> str:
    """A line that names the first entry in which two sections differ, and both values. Whole
    sections of a fitted model fill many screens.
    """
    path = ""
    while True:
        if isinstance(wanted, Mapping) and isinstance(found, Mapping):
            recipes = wanted.get("recipe"), found.get("recipe")
            if None not in recipes and recipes[0] != recipes[1]:
                wanted, found = recipes
                break
            names = sorted({*wanted, *found} - {"recipe"})
            step = next(name for name in names if _differ(wanted.get(name), found.get(name)))
            path += f".{step}" if path else step
            wanted, found = wanted.get(step), found.get(step)
        elif _is_list(wanted) and _is_list(found) and len(wanted) == len(found):
            place = next(i for i, pair in enumerate(zip(wanted, found)) if _differ(*pair))
            path += f"[{place}]"
            wanted, found = wanted[place], found[place]
        else:
            break
    return f"{path} {_short(wanted)}, got {_short(found)}"


def _differ(one: Any, other: Any) -> bool:
    return bool(_meaning(one) != _meaning(other))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def section_changed(model: Any) -> None:
    """Have the PEFT adapters of a model follow what `apply` did to it."""
    adapters = sys.modules.get(ADAPTERS)
    if adapters is not None:
        adapters.follow(model)


def _equip_when_built(parent: torch.nn.Module, name: str, module: Any) -> None:
    """Equip an attention module; called when any module gets a child."""
    if module is None or not is_attention(module):
        return
    for kind in kinds_of(module.config):
        if kind.is_equipped(module):
            continue
        named = attention_name(module.config)
        if named != kind.name:
            # The config may be a live model's, which Transformers has changed already.
            set_attention_name(module.config, kind.name)
            raise ValueError(
                f'`attn_implementation` must be "{kind.name}" for a model with '
                f'`config.{kind.name}`, got "{named}", which would run it without; load it with '
                f'attn_implementation="{kind.name}", or delete `config.{kind.name}` if that is '
                "meant"
            )
        kind.equip(module)
        _forget_loader(module.config)


def _choosing_kind(choose: Callable[..., str]) -> Callable[..., str]:
    """Wrap the choice of a model that is built: its section, where nobody names an implementation.
    Command lines pass `attn_implementation=None` on, which replaces what a saved config names.
    """

    @wraps(choose)
    def chosen(self: Any, attn_implementation: Any, *args: Any, **keywords: Any) -> str:
        if attn_implementation is None:
            found = next((kind.name for kind in kinds_of(self.config)), None)
            # One that lost its section is not dense by default.
            attn_implementation = found or _lost_kind(self.config)
        return choose(self, attn_implementation, *args, **keywords)

    return chosen


def _forget_loader(config: Any) -> None:
    """Take the name of a loader off a live config: Transformers writes it again for a model that
    came through one, together with the module, and must not for any other.
    """
    if _names_loader(getattr(config, "auto_map", None)):
        del config.auto_map


def _names_loader(auto_map: Any) -> bool:
    """True if all classes of an `auto_map` are those of a loader."""
    return bool(auto_map) and all(str(n).startswith(f"{LOADER}.") for n in auto_map.values())


def required_call(saved: Mapping[str, Any]) -> str | None:
    """The call that a saved config asks for, made in this process or not; None for stock attention,
    which needs none.
    """
    for name in saved.get("fusion_config") or ():
        call = str(name).removesuffix(REQUIREMENT).partition(": ")[2]
        if str(name).endswith(REQUIREMENT) and call in CALLS:
            return call
    return None


def _with_strict_weights(adjust: Callable[..., None]) -> Callable[..., None]:
    @wraps(adjust)
    def strict(self: Any, loading_info: Any) -> None:
        # Folders of earlier versions hold no marks, or shorter ones.
        marks = {name for name, _ in self.named_buffers() if is_mark(name)}
        reshaped = {found for found in loading_info.mismatched_keys if found[0] in marks}
        unmarked = marks & ({*loading_info.missing_keys} | {key for key, *_ in reshaped})
        for name in marks - unmarked:
            refuse_other_mark(self, name, self.get_buffer(name))
        if unmarked:
            _refuse_renamed_marks(loading_info.unexpected_keys)
            refill_marks(self, unmarked)
        loading_info.missing_keys -= marks
        loading_info.mismatched_keys -= reshaped
        if not _is_meant_dense(self.config):
            _refuse_other_marks(self, loading_info.unexpected_keys)
        for kind in KINDS.values():
            if kind.check_weights is not None:
                kind.check_weights(self, loading_info)
        adjust(self, loading_info)

    return strict


def _is_meant_dense(config: Any) -> bool:
    """True for a saved config whose section was taken off and that is opened with another
    attention than the section's.
    """
    return _lost_kind(config) is not None and KINDS.keys().isdisjoint(_implementations(config))


def _lost_kind(config: Any) -> str | None:
    """The kind that a saved config names among its requirements, if neither it nor a part of it has
    a section.
    """
    if any(_kinds_below(config)):
        return None
    fusions = getattr(config, "fusion_config", None) or {}
    return next((name for name, kind in KINDS.items() if kind.requirement in fusions), None)


def _implementations(config: Any) -> Iterator[str | None]:
    """The attention that a config and its parts were opened with."""
    yield attention_name(config)
    for _, part in _parts(config):
        yield from _implementations(part)


def _refuse_renamed_marks(unexpected: Iterable[str]) -> None:
    """Check that layers have the model's names in a checkpoint, where a model has layers that the
    checkpoint does not mark.
    """
    for key in sorted(filter(is_mark, unexpected)):
        raise ValueError(
            f"the checkpoint must name its layers as the model does, got {key}; a layer that was "
            "replaced by `torch.compile(layer)` has another name, and `layer.compile()` keeps it"
        )


def _refuse_other_marks(model: Any, unexpected: Iterable[str]) -> None:
    """Check that a section names all layers whose weights are marked."""
    modules = dict(model.named_modules())
    for key in sorted(unexpected):
        if is_mark(key) and key.rpartition(".")[0] in modules:
            raise ValueError(
                "the config must name the attention of all layers whose weights the checkpoint "
                f"marks, got {key} and a layer with stock attention; restore the config.json that "
                "the model was saved with"
            )


def _with_marks(to_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @wraps(to_dict)
    def marked(self: Any, *args: Any, **keywords: Any) -> dict[str, Any]:
        data = to_dict(self, *args, **keywords)
        found = list(_kinds_below(self))
        known = {kind.requirement for kind in KINDS.values()}
        fusions = {k: v for k, v in (data.get("fusion_config") or {}).items() if k not in known}
        fusions.update({kind.requirement: False for kind in found})
        if fusions:
            data["fusion_config"] = fusions
        elif data.get("fusion_config"):
            del data["fusion_config"]
        if data.get("architectures"):
            # The section may be of a kind that this process does not know.
            prefix = ARCHITECTURE_PREFIX if any(REQUIREMENT in name for name in fusions) else ""
            plain = [name.removeprefix(ARCHITECTURE_PREFIX) for name in data["architectures"]]
            data["architectures"] = [prefix + name for name in plain]
        if found:
            data["attn_implementation"] = _implementation(self)
            # Readers of `architectures` that find no such class look here next, TRL without a check
            # that it is there; an empty one sends them to `from_pretrained`.
            data.setdefault("auto_map", {})
        elif data.get("auto_map") == {}:
            del data["auto_map"]
        if _names_loader(data.get("auto_map")):
            data["auto_map"] = CONFIG_LOADER | data["auto_map"]
        return data

    return marked


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    for key in getattr(config, "sub_configs", ()):
        part = getattr(config, key, None)
        if part is not None:
            yield key, part


def _kinds_below(config: Any) -> Iterator[AttentionKind]:
    """The kinds that a config or one of its parts has a section of."""
    yield from kinds_of(config)
    for _, part in _parts(config):
        yield from _kinds_below(part)


def _implementation(config: Any) -> str | dict[str, Any] | None:
    """`attn_implementation` of a config: the name, or one per part where only parts have a section,
    as Transformers reads it.
    """
    for kind in kinds_of(config):
        return kind.name
    found = {key: _implementation(part) for key, part in _parts(config)}
    return {key: name for key, name in found.items() if name is not None} or None
