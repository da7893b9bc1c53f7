"""Private symbols of other libraries are still there: a new release that drops one fails here."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from test_house import ROOT, SOURCE, private_names

from spattention.compat import huggingface, pytorch

COMPAT = SOURCE / "compat"


def _wrapper() -> ModulesToSaveWrapper:
    return ModulesToSaveWrapper(torch.nn.Linear(2, 2), "default")


def _offloaded() -> torch.nn.Module:
    return add_hook_to_module(torch.nn.Linear(2, 2), ModelHook())


PYTORCH = {
    "_ops": lambda: torch._ops.OpOverload,
    "_disable_dynamo": lambda: pytorch.without_dynamo,
    "_C": lambda: torch._C,
    "_AutoDispatchBelowAutograd": lambda: pytorch.below_autograd,
    "_are_functorch_transforms_active": lambda: pytorch.in_transform,
    "_is_tracing": lambda: pytorch._tracing,
    "_len_torch_dispatch_stack": lambda: torch._C._len_torch_dispatch_stack(),
    "_len_torch_function_stack": lambda: pytorch.torch_function_modes,
    "torch._functorch.utils.enable_single_level_autograd_function": lambda: pytorch.single_level,
    "_SingleLevelFunction": lambda: pytorch.SingleLevelFunction,
    "_set_fwd_grad_enabled": lambda: pytorch.forward_grad_enabled,
    "_current_level": lambda: torch.autograd.forward_ad._current_level,
    "_functorch": lambda: torch._C._functorch.is_batchedtensor,
    "torch._functorch.pyfunctorch.coerce_cinterpreter": lambda: pytorch.coerce_cinterpreter,
    "_scaled_dot_product_flash_attention_for_cpu": lambda: pytorch.cpu_attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda: pytorch.cpu_attention_backward,
    "_foreach_add_": lambda: pytorch.add_each,
    "_foreach_copy_": lambda: pytorch.copy_each,
    "_foreach_zero_": lambda: pytorch.zero_each,
    "_nn": lambda: pytorch.STOCK_ATTENTION,
    "_schema": lambda: torch.ops.aten.mm.default._schema.arguments,
    "_forward_pre_hooks": lambda: torch.nn.Linear(2, 2)._forward_pre_hooks,
    "_forward_pre_hooks_with_kwargs": lambda: (
        torch.nn.Linear(2, 2)._forward_pre_hooks_with_kwargs is not None
    ),
    "_metadata": lambda: torch.nn.Linear(2, 2).state_dict()._metadata,
    "_dynamo": lambda: torch._dynamo.mark_static_address,
}
HUGGINGFACE = {
    "_attn_implementation": lambda: transformers.LlamaConfig()._attn_implementation,
    "_attn_implementation_internal": lambda: vars(transformers.LlamaConfig()),
    "_can_set_attn_implementation": lambda: (
        transformers.PreTrainedModel._can_set_attn_implementation
    ),
    "_no_split_modules": lambda: transformers.LlamaPreTrainedModel._no_split_modules,
    "_is_hf_initialized": lambda: "_is_hf_initialized" in _source(transformers.modeling_utils),
    "_adjust_missing_and_unexpected_keys": lambda: (
        transformers.PreTrainedModel._adjust_missing_and_unexpected_keys
    ),
    "_load_from_state_dict": lambda: transformers.PreTrainedModel._load_from_state_dict,
    "transformers.fusion_mapping._FUSION_REGISTRY": lambda: huggingface._FUSION_REGISTRY,
    "_disable_adapters": lambda: _wrapper()._disable_adapters is False,
    "_split_kwargs": lambda: peft.PeftModel._split_kwargs,
    "_prepare_inputs": lambda: transformers.Trainer._prepare_inputs,
    "_check_and_adjust_attn_implementation": lambda: (
        transformers.PreTrainedModel._check_and_adjust_attn_implementation
    ),
    "_hf_hook": lambda: _offloaded()._hf_hook,
    "_unload_and_optionally_merge": lambda: BaseTuner._unload_and_optionally_merge,
}
MODULES = set(pytorch.CONTEXT_PARALLEL_MODULES)


def _source(module: object) -> str:
    return Path(str(module.__file__)).read_text()


@pytest.mark.parametrize("symbol", [*PYTORCH, *HUGGINGFACE])
def test_private_symbol_exists(symbol):
    assert {**PYTORCH, **HUGGINGFACE}[symbol]() is not False


@pytest.mark.parametrize("file", ["pytorch", "huggingface"])
def test_every_private_symbol_is_tested(file):
    found = set(private_names(ast.parse((COMPAT / f"{file}.py").read_text())))
    tested = set(PYTORCH if file == "pytorch" else HUGGINGFACE)
    known = {"_FUSION_REGISTRY"} | MODULES
    assert found - known == tested - known


def test_context_parallel_is_one_of_the_modules():
    """PyTorch moved it once: one of the two names is today's."""
    found = []
    for name in MODULES:
        try:
            found.append(import_module(name))
        except ModuleNotFoundError:
            continue
    assert found


def test_names_of_attention_are_read_and_set():
    config = transformers.LlamaConfig(attn_implementation="eager")
    assert huggingface.attention_name(config) == "eager"
    huggingface.set_attention_name(config, "sdpa")
    assert huggingface.attention_name(config) == "sdpa"


def test_hooks_and_marks_are_found():
    module = torch.nn.Linear(2, 2)

    def hook(*_):
        return None

    assert not pytorch.has_pre_hook(module, hook)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    assert pytorch.has_pre_hook(module, hook)
    pytorch.remove_pre_hook(module, hook)
    assert not pytorch.has_pre_hook(module, hook)
    module.register_forward_pre_hook(hook)
    assert pytorch.has_pre_hook(module, hook)
    assert huggingface.offload_hook(_offloaded()) is not None
    assert huggingface.offload_hook(module) is None


def test_transforms_are_noticed():
    seen = []

    def look(x):
        seen.append((pytorch.in_transform(), pytorch.is_batched(x)))
        return x

    look(torch.zeros(2))
    torch.vmap(look)(torch.zeros(2))
    torch.vmap(torch.func.grad(lambda x: look(x).sum()))(torch.zeros(2))
    assert seen == [(False, False), (True, True), (True, True)]


def test_forward_mode_is_noticed():
    assert not pytorch.forward_mode_active()
    with torch.autograd.forward_ad.dual_level():
        assert pytorch.forward_mode_active()


def test_docstrings_name_the_pinned_versions():
    """Whoever pins another version looks at these symbols again."""
    pins = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert pins["torch"] in pytorch.__doc__
    for library in ("transformers", "peft", "accelerate"):
        assert pins[library] in huggingface.__doc__
