"""PEFT adapters of models with bands (or a baseline) carry the section, and train the sinks.

The `adapter_config.json` of such a model has

    "peft_type": "LORA (spattention: spattention.hf.register() must be called before ...)"
    "spattention": the section of the model's config
    "modules_to_save": [..., "spattention"]

PEFT does not know that type: a process that has not registered the kind fails by that name. vLLM
refuses adapters with `modules_to_save`. Where the kind is registered, `peft_guard` has the section
checked against the model wherever PEFT opens the adapter, and a dense base gets the section back.

Each adapter has sinks of its own, as PEFT's `modules_to_save` do: they are trained, saved, merged,
and switched by `set_adapter` and `disable_adapter`.

Imported with PEFT, never without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from transformers import PreTrainedModel

from .config import NAME
from .dealable import refuse_dealt
from .decoder import has_sinks, is_attention
from .section import KINDS, AttentionKind, check_same_section, section_in
from .sinks import Sinks

LEARNED_KEYS = ("PREFIX_TUNING", "CARTRIDGE")  # types of adapters that learn keys and values
WRITTEN = "_spattention_written"  # of a PEFT config: the section of the model that it is in
READ = "_spattention_read"  # of a PEFT config from a file: the section there, None for none


@dataclass(frozen=True)
class AdapterSection:
    """A section, of a kind in `KINDS`, as an adapter's folder holds it: the file that it was read
    from, or None for the section of a live model."""

    kind: str
    data: Mapping[str, Any]
    file: str | None = None


class AdapterSinks(ModulesToSaveWrapper):
    """The sinks of one attention module: the base model's, and those of each adapter. Those of
    `absent` adapters start as the base model's: their folders hold none, because they were trained
    without bands or saved before adapters carried sinks."""

    def __init__(self, module_to_save: Sinks, adapter_name: str) -> None:
        super().__init__(module_to_save, adapter_name)
        self.absent: set[str] = set()

    def update(self, adapter_name: str, **keywords: Any) -> None:
        """Add an adapter's sinks, in float32 as PEFT has the weights of its own layers: near 4,
        values of bfloat16 are .03 apart, and steps of training are smaller.
        """
        super().update(adapter_name, **keywords)
        weight = self.modules_to_save[adapter_name].weight
        if weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name in self.absent:
            return {}
        return super().adapter_state_dict_load_map(adapter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> Any:
        """The sinks that stay when PEFT takes its layers out: those of the adapter that is merged,
        or the base model's. PEFT's own `modules_to_save` always leave the active adapter's.
        """
        if not merge:
            return self.original_module
        if adapter_names is None:
            found = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            return self._of_base_dtype(found)
        if len(adapter_names) != 1:
            raise ValueError(
                "`adapter_names` must name one adapter to merge into a model with sinks, of which "
                f"each adapter has its own, got {adapter_names}"
            )
        return self._of_base_dtype(self.modules_to_save[adapter_names[0]])

    def _of_base_dtype(self, sinks: Any) -> Any:
        sinks.weight.data = sinks.weight.data.to(self.original_module.weight.dtype)
        return sinks

    def _mixed_batch_forward(self, *args: Any, adapter_names: list[str], **keywords: Any) -> Any:
        raise ValueError(
            "`adapter_names` must be None for a model with sinks, which differ by adapter and not "
            f"by row, got {sorted(set(adapter_names))}"
        )


def adapter_sinks(model: Any) -> list[AdapterSinks]:
    """The sinks of all attention modules of a model that has adapters."""
    return [module for module in model.modules() if isinstance(module, AdapterSinks)]


def base_model(model: Any) -> Any:
    """The model of Transformers inside PEFT's."""
    if isinstance(model, peft.PeftModel):
        model = model.base_model
    return model if isinstance(model, PreTrainedModel) else getattr(model, "model", model)


def follow(model: Any) -> None:
    """Have the adapters of a model save the section that it has now, and train its sinks."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    base = base_model(model)
    for name, config in configs.items():
        setattr(config, WRITTEN, adapter_section(base))
        _wrap_sinks(base, name, config)
    active = _active(model)
    frozen = all(configs[name].inference_mode for name in active)
    for sinks in adapter_sinks(base):
        sinks.set_adapter(active, inference_mode=frozen)


def meet(model: Any, config: Any, adapter_name: str) -> None:
    """Prepare a model for an adapter that is about to be put into it: it gets the section that the
    adapter was trained with, and sinks for the adapter.

    Args:
        model: of Transformers, or any other, which is left alone.
        config: PEFT's.
        adapter_name: in the model.

    Raises:
        ValueError: if the model has another section, or is dense and cannot get it, if its heads
            are dealt (an adapter is saved in the order that it was trained in), or if the adapter
            learns keys and the model has bands.
    """
    refuse_dealt(model, "to be given an adapter")
    bring_back(model, config, adapter_name)
    section = adapter_section(model)
    if section is not None and section.kind == NAME and config.peft_type in LEARNED_KEYS:
        raise ValueError(
            f"`peft_type` must be one that learns no keys for a model with `config.{NAME}`, where "
            f"a key is attended by its distance, got {config.peft_type.value}; LoRA and "
            "prompt tuning learn none"
        )
    setattr(config, WRITTEN, section)
    _wrap_sinks(model, adapter_name, config)


def bring_back(model: Any, config: Any, adapter_name: str) -> None:
    """Give a dense model the section that an adapter was trained with; arguments as in `meet`."""
    wanted: AdapterSection | None = vars(config).get(READ)
    if wanted is None:
        return
    found = adapter_section(model)
    if found is not None:
        check_same(wanted, found)
        return
    others = [name for name in getattr(model, "peft_config", None) or {} if name != adapter_name]
    if others:
        raise ValueError(
            f"the model must have `config.{wanted.kind}` before the adapter of {wanted.file} is "
            f"loaded, since it holds adapters that were made without, got {others}"
        )
    try:
        KINDS[wanted.kind].restore(model, wanted.data)
    except ValueError as error:
        raise ValueError(f"`{wanted.kind}` of {wanted.file}: {error}") from error


def check_same(wanted: AdapterSection, found: AdapterSection | None) -> None:
    """Check that a model has the section that an adapter was trained with."""
    rule = (
        f"the adapter of {wanted.file} must be loaded into a model with the `config.{wanted.kind}` "
        "that it was trained with"
    )
    given = None if found is None else (found.kind, found.data)
    check_same_section(rule, (wanted.kind, wanted.data), given)


def adapter_section(model: Any) -> AdapterSection | None:
    """The section of a live model, as its adapters carry it."""
    found = section_in(model)
    return None if found is None else AdapterSection(*found)


def unwrap_sinks(model: Any) -> None:
    """Make parameters of the sinks again, once PEFT has taken its layers out of a model."""
    for module in list(model.modules()):
        sinks = getattr(module, "sinks", None)
        if isinstance(sinks, (Sinks, AdapterSinks)):
            del module.sinks
            module.sinks = sinks()


def marked(data: Mapping[str, Any], section: AdapterSection) -> dict[str, Any]:
    """The entries of an `adapter_config.json`, with a section."""
    peft_type = getattr(data["peft_type"], "value", data["peft_type"])
    return {
        **data,
        "peft_type": peft_type + _requirement(KINDS[section.kind]),
        "modules_to_save": [*(data.get("modules_to_save") or ()), section.kind],
        section.kind: dict(section.data),
    }


def unmarked(data: Mapping[str, Any], file: str) -> tuple[dict[str, Any], AdapterSection | None]:
    """Take apart what `marked` made; `file` is for errors. Raises `ValueError`."""
    plain = dict(data)
    found: AdapterSection | None = None
    for kind in KINDS.values():
        peft_type, section = plain.get("peft_type"), plain.pop(kind.name, None)
        requires = isinstance(peft_type, str) and peft_type.endswith(_requirement(kind))
        if section is None and not requires:
            continue
        if not isinstance(section, Mapping):
            raise ValueError(
                f"`{kind.name}` of {file} must be the section of the model that the adapter was "
                f"trained on, got {section!r}"
            )
        plain["peft_type"] = str(peft_type).removesuffix(_requirement(kind))
        names = [name for name in plain.pop("modules_to_save", None) or () if name != kind.name]
        if names:
            plain["modules_to_save"] = names
        found = AdapterSection(kind.name, section, file)
    return plain, found


def _requirement(kind: AttentionKind) -> str:
    return f" ({kind.name}: {kind.call} must be called before this adapter is loaded)"


def _active(model: Any) -> list[str]:
    """Names of the active adapters; PEFT's layers know them where the model does not."""
    if isinstance(model, peft.PeftModel):
        return list(model.active_adapters)
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return next((list(layer.active_adapters) for layer in layers), [])


def _wrap_sinks(model: Any, adapter_name: str, config: Any) -> None:
    """Give an adapter sinks in each attention module that has some; the first one's are active."""
    for module in list(model.modules()):
        if not is_attention(module) or not has_sinks(module):
            continue
        sinks = module.sinks
        if isinstance(sinks, AdapterSinks):
            sinks.update(adapter_name)
        else:
            del module.sinks
            module.sinks = AdapterSinks(Sinks(sinks), adapter_name)
            module.sinks.set_adapter(adapter_name, inference_mode=config.inference_mode)
        if READ in vars(config) and vars(config)[READ] is None:
            module.sinks.absent.add(adapter_name)
