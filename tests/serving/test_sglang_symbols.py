"""SGLang itself has every name that the plugin uses, with the form that it expects.

Runs where SGLang can be imported; elsewhere `fake_sglang` stands for it.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import pytest

from spattention.serving.checks import SGLANG_FAMILIES
from spattention.serving.sglang_plugin import REFUSED, find_model

from . import fake_sglang

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang")


def symbol(path: str) -> Any:
    """An attribute of SGLang, such as `srt.plugins.load_plugins`."""
    module, _, name = f"sglang.{path}".rpartition(".")
    return getattr(import_module(module), name)


def takes(function: Any, *names: str) -> bool:
    return {*names} <= {*signature(function).parameters}


def test_the_base_class_asks_for_what_is_given() -> None:
    """Each method that the back end has takes the base class's arguments, by name and order."""
    base = symbol("srt.layers.attention.base_attn_backend.AttentionBackend")
    ours = import_module("spattention.serving.sglang_backend").BandAttentionBackend
    assert issubclass(ours, base)
    for name in (
        "init_forward_metadata",
        "init_forward_metadata_out_graph",
        "init_forward_metadata_in_graph",
        "init_cuda_graph_state",
        "get_cuda_graph_seq_len_fill_value",
        "forward_extend",
        "forward_decode",
    ):
        wanted = [n for n in signature(getattr(base, name)).parameters if n != "kwargs"]
        assert list(signature(getattr(ours, name)).parameters) == wanted, name
    # Legacy methods, which SGLang no longer calls, would be dead code.
    assert not hasattr(base, "init_forward_metadata_replay_cuda_graph")


def test_batches_have_the_fields_that_are_read() -> None:
    batch = symbol("srt.model_executor.forward_batch_info.ForwardBatch")
    fields = {field.name for field in dataclasses.fields(batch)}
    assert {field.name for field in dataclasses.fields(fake_sglang.ForwardBatch)} <= fields
    mode = symbol("srt.model_executor.forward_batch_info.ForwardMode")
    for fake in fake_sglang.ForwardMode:
        real = mode[fake.name]
        for name in ("is_extend", "is_decode", "is_idle", "is_target_verify"):
            assert getattr(real, name)() == getattr(fake, name)(), (fake, name)


def test_layers_have_the_attributes_that_are_read() -> None:
    real = symbol("srt.layers.radix_attention.RadixAttention")
    fake = fake_sglang.RadixAttention(4, 16, 0.25, 2, 1)
    made = real(4, 16, 0.25, num_kv_heads=2, layer_id=1)
    for name, value in vars(fake).items():
        if not name.startswith("_") and name not in ("training", "attn_type"):
            assert getattr(made, name) == value, name
    assert made.attn_type == symbol("srt.layers.radix_attention.AttentionType").DECODER


def test_pools_have_the_methods_that_are_called() -> None:
    pool = symbol("srt.mem_cache.memory_pool.MHATokenToKVPool")
    assert takes(pool.set_kv_buffer, "layer", "loc_info", "cache_k", "cache_v")
    assert takes(pool.get_key_buffer, "layer_id")
    assert takes(pool.get_value_buffer, "layer_id")
    assert isinstance(pool.is_quantized_kv_cache, property)
    loc = symbol("srt.mem_cache.memory_pool.KVWriteLoc")
    assert takes(loc.for_batch, "forward_batch")


def test_the_plugin_finds_its_seams() -> None:
    hooks = symbol("srt.plugins.hook_registry.HookRegistry")
    assert takes(hooks.register, "target", "hook", "hook_type")
    assert symbol("srt.plugins.hook_registry.HookType").AROUND
    assert takes(symbol("srt.model_loader.utils.get_model_architecture"), "model_config")
    assert list(signature(find_model).parameters) == ["original", "model_config"]
    assert takes(symbol("srt.layers.attention.attention_registry.register_attention_backend"))
    assert isinstance(symbol("srt.layers.attention.attention_registry.ATTENTION_BACKENDS"), dict)
    base = "srt.arg_groups.model_override_base"
    assert takes(symbol(f"{base}.register_model_override_predicate"), "predicate")
    assert takes(symbol(f"{base}.resolving_view"), "server_args")
    assert callable(symbol("srt.arg_groups.choices.add_attention_backend_choices"))
    registry = symbol("srt.models.registry.ModelRegistry")
    assert takes(registry.register, "package_name", "strict")
    assert takes(registry.is_arch_supported, "architecture")
    assert callable(symbol("srt.runtime_context.attention_backends"))
    assert symbol("srt.plugins.GENERAL_PLUGINS_GROUP") == "sglang.srt.plugins"


def test_refused_settings_have_these_defaults() -> None:
    """A renamed setting would otherwise no longer be refused."""
    settings = symbol("srt.server_args.ServerArgs")(model_path="none")
    for name, wanted in REFUSED.items():
        assert getattr(settings, name) == wanted, name
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        assert getattr(settings, name) is None
    for name, wanted in (("kv_cache_dtype", "auto"), ("tp_size", 1), ("model_impl", "auto")):
        assert getattr(settings, name) == wanted, name


def test_all_families_extend_sglangs_own_models() -> None:
    families = import_module("spattention.serving.sglang_models.families")
    assert {entry.__name__ for entry in families.EntryClass} == {
        f"Spattention{family}" for family in SGLANG_FAMILIES
    }
    for entry in families.EntryClass:
        stock = entry.__mro__[2]
        assert stock.__module__.startswith("sglang.srt.models."), entry
        assert takes(stock, "config", "quant_config", "prefix"), entry
        assert takes(stock.load_weights, "weights"), entry
