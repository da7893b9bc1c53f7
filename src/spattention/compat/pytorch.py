"""Private symbols of PyTorch, seen in 2.11 and 2.13."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch._functorch.pyfunctorch import coerce_cinterpreter
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

# The type of `torch.ops.<library>.<name>.<overload>`, which has no public name.
Operator: TypeAlias = torch._ops.OpOverload

# Like `torch.compiler.disable`, which imports torch._dynamo (a second) when it is called.
without_dynamo: Callable[[Callable[..., Any]], Callable[..., Any]] = torch._disable_dynamo

# A context in which an operator runs below its autograd key; public for C++ extensions alone.
below_autograd = torch._C._AutoDispatchBelowAutograd

# True inside `torch.func`'s transforms; nothing public tells it without a tensor.
in_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active

# What torch.compile does with the frames that run now; None where it is not in use.
_dynamo_callback: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback

# Number of active `__torch_dispatch__` modes; the public way makes an object for each.
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# Number of active `__torch_function__` modes.
torch_function_modes: Callable[[], int] = torch._C._len_torch_function_stack

# True inside `torch.jit.trace`; the public name is a Python function around it.
_tracing: Callable[[], bool] = torch._C._is_tracing

# The autograd function of one level of transforms, and the context that it needs. Public ones hide
# the levels, so that an operator which is itself an autograd kernel cannot take its turn.
SingleLevelFunction = torch.autograd.function._SingleLevelFunction
single_level = enable_single_level_autograd_function

# A context that sets forward-mode recording; `forward_ad.dual_level` would open a level.
forward_grad_enabled: Callable[[bool], AbstractContextManager[None]] = (
    forward_ad._set_fwd_grad_enabled
)

# CPU flash attention that returns the log-sum-exp; `scaled_dot_product_attention` drops it.
cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Copies a list of tensors in one launch.
copy_each: Callable[[list[torch.Tensor], list[torch.Tensor]], None] = torch._foreach_copy_

# Zeroes a list of tensors in one launch.
zero_each: Callable[[list[torch.Tensor]], None] = torch._foreach_zero_

# `add_` for a list of tensors.
add_each: Callable[[list[torch.Tensor], list[torch.Tensor]], None] = torch._foreach_add_

# `scaled_dot_product_attention` as it is without `context_parallel`, which replaces the public name
# by a function of one of these modules. Nothing else tells that it is active.
STOCK_ATTENTION = torch._C._nn.scaled_dot_product_attention
CONTEXT_PARALLEL_MODULES = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",
)


def forward_mode_active() -> bool:
    """True inside forward-mode differentiation, which has no public test."""
    return forward_ad._current_level >= 0


def is_watched() -> bool:
    """True if a compiler, a transform or a mode below `__torch_function__` sees every operator."""
    return (
        _dynamo_callback() is not None
        or in_transform()
        or forward_ad._current_level >= 0
        or _tracing()
        or _dispatch_modes() > 0
    )


def has_tangent(tensor: torch.Tensor) -> bool:
    """True for a tensor that forward-mode differentiation follows. The public question has no rule
    for `torch.vmap`, below which this looks. That cannot be compiled: there a tensor counts as
    followed if another transform is inside the differentiation.
    """
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():
        if in_transform():
            inner = coerce_cinterpreter(functorch.peek_interpreter_stack())
            if inner.key() != functorch.TransformType.Jvp:
                return True
        return forward_ad.unpack_dual(tensor).tangent is not None
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_batchedtensor(tensor) and not is_batched(tensor):
            break
        if functorch.maybe_get_level(tensor) in _forward_mode_levels():
            break
        tensor = functorch.get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


def _forward_mode_levels() -> set[int]:
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return {each.level() for each in stack if each.key() == functorch.TransformType.Jvp}


def needs_dispatcher(inputs: Sequence[Any]) -> bool:
    """True if a compiler, a transform, a mode or a tensor subclass has to see an operator on these
    inputs, or one of its tensors is lazily negated.
    """
    if is_watched() or torch.overrides.has_torch_function(inputs):
        return True
    for each in inputs:
        kind = type(each)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if each.is_neg():
                return True
        elif isinstance(each, torch.Tensor):
            return True
    return False


def apply_without_transforms(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` where no transform of `torch.func` is active, for which it looks, and whose
    tensors are never left over.
    """
    base: Any = super(torch.autograd.Function, function)
    found: Callable[..., Any] = base.apply
    return found


def is_batched(tensor: torch.Tensor) -> bool:
    """True for a tensor that `torch.vmap` wraps, below whatever other transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def schema(operator: Any) -> Any:
    """Name and arguments of an operator; what is public is text alone."""
    return operator._schema


def has_pre_hook(module: torch.nn.Module, hook: Callable[..., Any]) -> bool:
    """True if `register_forward_pre_hook` was given this hook; hooks cannot be listed publicly."""
    return any(found is hook for found in module._forward_pre_hooks.values())


def remove_pre_hook(module: torch.nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a hook whose handle was not kept."""
    for key, found in list(module._forward_pre_hooks.items()):
        if found is hook:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def state_dict_metadata(state_dict: Any) -> dict[str, Any]:
    """Notes of modules in a state dict, by their names; documented as this attribute."""
    return getattr(state_dict, "_metadata", None) or {}


def copy_state_dict(state_dict: Any, without: Collection[str]) -> Any:
    """A shallow copy without some names; PyTorch's own notes stay attached."""
    left = OrderedDict((name, value) for name, value in state_dict.items() if name not in without)
    if hasattr(state_dict, "_metadata"):
        left._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return left


def mark_static_address(tensor: torch.Tensor) -> None:
    """Promise torch.compile that a tensor stays in place, so that CUDA graphs may write to it."""
    torch._dynamo.mark_static_address(tensor)


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """A context with this limit of graphs per function; no public option sets it."""
    return torch._dynamo.config.patch(recompile_limit=limit)


def raise_recompile_limit(limit: int) -> None:
    """Raise the limit of graphs per function for the whole process; never lower it."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)
