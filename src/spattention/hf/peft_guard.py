"""Have PEFT go through `peft_adapters`: wrappers of its methods, as they are from PEFT 0.21 on.

Imported as soon as both PEFT and a registered kind are there, never without PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import peft
from packaging.version import Version
from peft.config import PeftConfigMixin
from peft.tuners.lora import conversion
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap, save_and_load
from transformers import PreTrainedModel
from transformers.utils import peft_utils

from ..compat.huggingface import UNLOAD, adapters_disabled, download_keywords, set_adapters_disabled
from ..compat.pytorch import copy_state_dict
from .adapter_files import check_config_file, checking_configs, checking_weights, naming_weights
from .decoder import has_sinks, plan_of
from .import_hooks import replace_everywhere
from .peft_adapters import (
    READ,
    WRITTEN,
    AdapterSection,
    AdapterSinks,
    adapter_section,
    adapter_sinks,
    base_model,
    bring_back,
    check_same,
    follow,
    marked,
    meet,
    unmarked,
    unwrap_sinks,
)
from .weights import (
    MARK,
    is_mark,
    live_marks,
    refill_marks,
    refuse_lost_section,
    refuse_other_mark,
)

SINKS = ".sinks."  # in the names of an adapter's weights
INSIDE = "base_model.model."  # begins the names of what is inside a `PeftModel`
OLDEST = "0.21"

if Version(peft.__version__) < Version(OLDEST):
    raise ImportError(
        f"`spattention.hf` needs PEFT {OLDEST} or newer for adapters, got {peft.__version__}"
    )


def _saving_section(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    @wraps(save_pretrained)
    def save(self: Any, save_directory: Any, **keywords: Any) -> None:
        # A config that was read from a file and is in no model keeps its section.
        section: AdapterSection | None = vars(self).get(WRITTEN, vars(self).get(READ))
        if section is None:
            return save_pretrained(self, save_directory, **keywords)
        to_dict = self.to_dict
        # `save_pretrained` writes what this returns, so that no file ever lacks the section.
        self.to_dict = lambda: marked(to_dict(), section)
        try:
            return save_pretrained(self, save_directory, **keywords)
        finally:
            del self.to_dict

    return save


def _reading_section(
    from_json_file: Callable[..., dict[str, Any]],
) -> Callable[..., dict[str, Any]]:
    @wraps(from_json_file)
    def read(cls: type, path_json_file: Any, **keywords: Any) -> dict[str, Any]:
        check_config_file(path_json_file)
        data = from_json_file(cls, path_json_file, **keywords)
        data, section = unmarked(data, str(path_json_file))
        return {**data, READ: section}

    return read


def _keeping_section(from_peft_type: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(from_peft_type)
    def make(cls: type, **keywords: Any) -> Any:
        is_from_file, section = READ in keywords, keywords.pop(READ, None)
        config = from_peft_type(cls, **keywords)
        if is_from_file:
            setattr(config, READ, section)
        return config

    return make


def _meeting_model(inject: Callable[..., None]) -> Callable[..., None]:
    """Wrap a method that puts an adapter into a model."""
    parameters = signature(inject)

    @wraps(inject)
    def prepared(self: Any, *args: Any, **keywords: Any) -> None:
        given = parameters.bind(self, *args, **keywords).arguments
        adapter_name = given.get("adapter_name", "default")
        config = given.get("peft_config") or self.peft_config
        config = config[adapter_name] if isinstance(config, dict) else config
        model = given["model"] if "model" in given else base_model(self)
        meet(model, config, adapter_name)
        inject(self, *args, **keywords)
        if isinstance(self, peft.PeftModel):
            follow(self)  # some kinds of adapters freeze whatever is not theirs

    return prepared


def _unwrapping_sinks(unload: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(unload)
    def unwrapped(self: Any, *args: Any, **keywords: Any) -> Any:
        model = unload(self, *args, **keywords)
        unwrap_sinks(model)
        return model

    return unwrapped


def _refusing_sinks(add_weighted_adapter: Callable[..., None]) -> Callable[..., None]:
    """Wrap `add_weighted_adapter`, which mixes weights of PEFT's layers alone."""

    @wraps(add_weighted_adapter)
    def add(self: Any, *args: Any, **keywords: Any) -> None:
        for sinks in adapter_sinks(self)[:1]:
            raise ValueError(
                "`add_weighted_adapter` must not be called for a model with sinks, which it does "
                f"not mix, got sinks of each adapter of {sorted(sinks.modules_to_save)}"
            )
        add_weighted_adapter(self, *args, **keywords)

    return add


def _merging_active(merge_adapter: Callable[..., None]) -> Callable[..., None]:
    """Wrap `BaseTuner.merge_adapter`, after which the active adapter's sinks stay active."""
    parameters = signature(merge_adapter)

    @wraps(merge_adapter)
    def merge(self: Any, *args: Any, **keywords: Any) -> None:
        names = parameters.bind(self, *args, **keywords).arguments.get("adapter_names")
        for sinks in adapter_sinks(self)[:1]:
            if names is not None and list(names) != list(sinks.active_adapters):
                raise ValueError(
                    "`adapter_names` must be the active adapter for a model with sinks, of which "
                    f"each adapter has its own, {list(sinks.active_adapters)}, got {list(names)}"
                )
        merge_adapter(self, *args, **keywords)

    return merge


def _checking_folder(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PeftModel.load_adapter`, which reads only the weights of an adapter that it has."""

    @wraps(load_adapter)
    def load(self: Any, model_id: Any, adapter_name: str, *args: Any, **keywords: Any) -> Any:
        if adapter_name in self.peft_config:
            where = download_keywords(self, keywords)
            config = peft.PeftConfig.from_pretrained(model_id, **where)
            bring_back(base_model(self), config, adapter_name)
            follow(self)
            for sinks in adapter_sinks(self):
                change = sinks.absent.discard if vars(config)[READ] else sinks.absent.add
                change(adapter_name)
        try:
            result = load_adapter(self, model_id, adapter_name, *args, **keywords)
        except KeyError as error:
            if SINKS not in str(error):
                raise
            raise ValueError(
                f"the adapter of {model_id} must hold the sinks that its config names, got no "
                f"{error.args[0]}"
            ) from error
        _refuse_missing(self, adapter_name, model_id, result.missing_keys)
        return result

    return load


def _refuse_missing(model: Any, name: str, adapter: Any, missing: Iterable[str]) -> None:
    """Check that an adapter that was trained on bands has all of its weights."""
    if vars(model.peft_config[name]).get(READ) is None:
        return
    for key in sorted(missing):
        what = "sinks" if SINKS in key else "weights"
        raise ValueError(
            f"the adapter of {adapter} must hold the {what} that its config names, got no {key}"
        )


def _requiring_weights(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedModel.load_adapter`, which only warns about weights that are missing, and
    takes those of any attention."""

    parameters = signature(load_adapter)

    @wraps(load_adapter)
    def load(self: Any, *args: Any, **keywords: Any) -> Any:
        given = parameters.bind(self, *args, **keywords)
        adapter = given.arguments.get("peft_model_id")
        weights = given.arguments.get("adapter_state_dict")
        if weights is not None:
            given.arguments["adapter_state_dict"] = _without_marks(self, weights)
        with naming_weights(adapter):
            loading_info = load_adapter(*given.args, **given.kwargs)
        name = given.arguments.get("adapter_name") or "default"
        marks = [each for each, _ in self.named_buffers() if is_mark(each)]
        for mark in marks:
            refuse_other_mark(self, mark, self.get_buffer(mark))
        refill_marks(self, marks)
        for key in filter(is_mark, sorted(loading_info.unexpected_keys)):
            raise ValueError(
                "an adapter must be loaded into a model with the attention that its weights were "
                f"trained with, got {key} of {adapter} for a model without"
            )
        _refuse_missing(self, name, adapter, loading_info.missing_keys)
        return loading_info

    return load


def _disabling_sinks(disable_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PeftModel.disable_adapter`, which leaves alone what is trained beside prompts."""

    @wraps(disable_adapter)
    @contextmanager
    def disabled(self: Any) -> Iterator[None]:
        found = adapter_sinks(self)
        before = [adapters_disabled(sinks) for sinks in found]
        with disable_adapter(self):
            for sinks in found:
                set_adapters_disabled(sinks, True)
            try:
                yield
            finally:
                for sinks, was in zip(found, before):
                    set_adapters_disabled(sinks, was)

    return disabled


def _enabling_sinks(enable_adapters: Callable[..., None]) -> Callable[..., None]:
    """Wrap `PreTrainedModel.enable_adapters`, which leaves disabled what is trained beside layers
    of PEFT, though `disable_adapters` disables it.
    """

    @wraps(enable_adapters)
    def enable(self: Any) -> None:
        enable_adapters(self)
        for sinks in adapter_sinks(self):
            sinks.enable_adapters(True)

    return enable


def _checking_swap(check: Callable[..., None]) -> Callable[..., None]:
    """Wrap PEFT's check of two configs whose weights are to be exchanged in a live model."""

    @wraps(check)
    def compare(config0: Any, config1: Any) -> None:
        check(config0, config1)
        wanted: AdapterSection | None = vars(config1).get(READ)
        if wanted is None:
            return
        check_same(wanted, vars(config0).get(WRITTEN))
        if wanted.data.get("sinks"):
            raise ValueError(
                "an adapter with sinks must not be hot-swapped, which would leave the sinks as "
                f"they are, got the adapter of {wanted.file}"
            )

    return compare


def _writing_marks(get_state: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_peft_model_state_dict`: weights of an adapter are marked as their model's are."""

    @wraps(get_state)
    def get(model: Any, *args: Any, **keywords: Any) -> Any:
        refuse_lost_section(model)
        return {**get_state(model, *args, **keywords), **live_marks(model)}

    return get


def _reading_marks(set_state: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `set_peft_model_state_dict`, which passes over what a model has no place for."""

    @wraps(set_state)
    def load(model: Any, peft_model_state_dict: Any, *args: Any, **keywords: Any) -> Any:
        weights = _without_marks(model, peft_model_state_dict)
        return set_state(model, weights, *args, **keywords)

    return load


def _without_marks(model: Any, weights: Any) -> Any:
    """An adapter's weights without marks, which are those of the model; raises `ValueError`."""
    marks = [name for name in weights if is_mark(name)]
    for name in marks:
        refuse_other_mark(model, _own_name(model, name), weights[name])
    for name in weights:
        _refuse_lost_sinks(model, name)
    return copy_state_dict(weights, without=marks)


def _refuse_lost_sinks(model: Any, name: str) -> None:
    """Check that sinks among an adapter's weights have a place: PEFT passes over others."""
    module_name, is_sinks, _ = name.partition(".sinks.")
    if not is_sinks:
        return
    own = _own_name(model, f"{module_name}.{MARK}").rpartition(".")[0]
    module = dict(model.named_modules()).get(own)
    if module is not None and plan_of(module) is not None and not has_sinks(module):
        raise ValueError(
            f"the model must have the sinks that the adapter's weights hold, got {name} for a "
            "layer without sinks: apply its bands with `sinks=True` first"
        )


def _own_name(model: Any, name: str) -> str:
    """The name of a mark in a model, which may be inside a `PeftModel` where it was not before."""
    modules = {each for each, _ in model.named_modules()}
    names = (name, name.removeprefix(INSIDE), f"{INSIDE}{name}")
    return next((each for each in names if each.rpartition(".")[0] in modules), name)


def _swapping_without_marks(swap: Callable[..., None]) -> Callable[..., None]:
    """Wrap the hot-swap of weights whose configs were compared, which takes no other tensors."""

    @wraps(swap)
    def swapped(model: Any, state_dict: Any, *args: Any, **keywords: Any) -> None:
        marks = [name for name in state_dict if is_mark(name)]
        swap(model, copy_state_dict(state_dict, without=marks), *args, **keywords)

    return swapped


def _keeping_all(convert_to_lora: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap PEFT's conversion of an adapter to LoRA, which makes a new config."""

    parameters = signature(convert_to_lora)

    @wraps(convert_to_lora)
    def convert(model: Any, *args: Any, **keywords: Any) -> Any:
        given = parameters.bind(model, *args, **keywords).arguments
        adapter_name = given.get("adapter_name", "default")
        config, weights = convert_to_lora(model, *args, **keywords)
        setattr(config, WRITTEN, adapter_section(base_model(model)))
        for name, module in model.named_modules():
            if isinstance(module, AdapterSinks):
                weights[f"{name}.weight"] = module.modules_to_save[adapter_name].weight.detach()
        return config, weights

    return convert


def _tuners(kind: Any) -> Iterator[Any]:
    yield kind
    for each in kind.__subclasses__():
        yield from _tuners(each)


def _around(owner: Any, name: str, make: Callable[..., Any]) -> None:
    inner = vars(owner)[name]
    if isinstance(inner, classmethod):
        setattr(owner, name, classmethod(make(inner.__func__)))
    else:
        setattr(owner, name, make(inner))


def _install() -> None:
    _around(PeftConfigMixin, "save_pretrained", _saving_section)
    _around(PeftConfigMixin, "from_json_file", _reading_section)
    _around(PeftConfigMixin, "from_peft_type", _keeping_section)
    _around(peft.PeftModel, "__init__", _meeting_model)
    _around(peft.PeftModel, "add_adapter", _meeting_model)
    _around(BaseTuner, "__init__", _meeting_model)
    _around(BaseTuner, "merge_adapter", _merging_active)
    for tuner in set(_tuners(BaseTuner)):
        for name, make in (
            ("inject_adapter", _meeting_model),
            (UNLOAD, _unwrapping_sinks),
            ("add_weighted_adapter", _refusing_sinks),
        ):
            if name in vars(tuner):
                _around(tuner, name, make)
    _around(peft.PeftModel, "disable_adapter", _disabling_sinks)
    _around(peft.PeftModel, "load_adapter", _checking_folder)
    PreTrainedModel.enable_adapters = _enabling_sinks(PreTrainedModel.enable_adapters)
    PreTrainedModel.load_adapter = _requiring_weights(PreTrainedModel.load_adapter)
    finding = checking_configs(peft_utils.find_adapter_config_file)
    replace_everywhere("find_adapter_config_file", peft_utils, finding)
    reading = checking_weights(save_and_load.load_peft_weights)
    replace_everywhere("load_peft_weights", save_and_load, reading)
    converting = _keeping_all(conversion.convert_to_lora)
    replace_everywhere("convert_to_lora", conversion, converting)
    getting = _writing_marks(save_and_load.get_peft_model_state_dict)
    replace_everywhere("get_peft_model_state_dict", save_and_load, getting)
    setting = _reading_marks(save_and_load.set_peft_model_state_dict)
    replace_everywhere("set_peft_model_state_dict", save_and_load, setting)
    _around(hotswap, "check_hotswap_configs_compatible", _checking_swap)
    swapping = _swapping_without_marks(hotswap.hotswap_adapter_from_state_dict)
    replace_everywhere("hotswap_adapter_from_state_dict", hotswap, swapping)


_install()
