"""How implementations register PyTorch operators: shapes, first derivatives and batching.

An operator's schema takes no Python objects, so bands come as a flat `int[]`. Autograd, functorch's
transforms (`torch.func`) and torch.compile all meet the operator in PyTorch's dispatcher, so each
transform that works eagerly works compiled. Derivatives are of first order and reverse mode;
every other one raises `NotImplementedError` and never is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import pytorch as private

_library = torch.library.Library("spattention", "FRAGMENT")


def register(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    keys: Sequence[str] = ("CPU", "CUDA"),
) -> private.Operator:
    """Register `spattention::name` without the per-call overhead of `torch.library.custom_op`.

    Args:
        name: the operator's name.
        schema: arguments and results, `"(...) -> (...)"`.
        compute: the operator on tensors of these dispatch keys.
        fake: the same for tensors without values: shapes, dtypes and strides of the results.
        keys: dispatch keys of `compute`; by default the devices of Triton and its interpreter.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    # A frame that torch.compile gave up runs eagerly, and what it calls would be compiled again.
    compute = private.without_dynamo(compute)
    for key in keys:
        _library.impl(name, compute, key)
    torch.library.register_fake(f"spattention::{name}", fake, lib=_library)
    return getattr(torch.ops.spattention, name).default


def differentiable(
    operator: private.Operator,
    save: Callable[..., None] | None = None,
    gradients: Callable[..., Any] | None = None,
    tangents: Callable[..., Any] | None = None,
    *,
    compute: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the operator's derivatives.

    Args:
        operator: what `register` returned.
        save: `setup_context` of a `torch.autograd.Function`.
        gradients: its `backward`. None for an operator without a derivative, such as one that
            computes gradients itself. `torch.func.grad` records those too, so only going backward
            through them raises.
        tangents: its `jvp`. Without it, forward-mode differentiation raises.
        compute: what the operator was registered with, where its host time matters.

    Returns:
        The operator. With `compute`, eager calls run that without the dispatcher, unless something
        has to see the operator: a compiler, a transform, a mode or a tensor subclass.
    """

    def below(*inputs: Any) -> Any:
        with private.below_autograd():
            return operator(*inputs)

    def below_one_transform(*inputs: Any) -> Any:
        # The transforms outside this one record too, as they do for PyTorch's own operators.
        with torch.enable_grad(), private.forward_grad_enabled(True):
            return below(*inputs)

    save = save or _save_nothing
    methods = {
        "setup_context": save,
        "backward": gradients or _refuse,
        "jvp": tangents or _refuse,
    }
    static = {name: staticmethod(method) for name, method in methods.items()}
    name = private.schema(operator).name.partition("::")[2]

    def recorded(function: Callable[..., Any]) -> Any:
        def run_and_save(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            save(ctx, inputs, output)
            return output

        # With `setup_context`, PyTorch would examine the signature of `forward` in every call.
        body = static | {"forward": staticmethod(run_and_save)}
        del body["setup_context"]
        return type(name, (torch.autograd.Function,), body)

    recorded_below = recorded(below)
    # The dispatcher visits one functorch transform at a time: so does what records there.
    recorded_in_transform: Any = type(
        name,
        (private.SingleLevelFunction,),
        {**static, "forward": staticmethod(below_one_transform)},
    )

    def dispatch(*inputs: Any) -> Any:
        if private.in_transform():
            with private.single_level():
                return recorded_in_transform.apply(*inputs)
        # PyTorch looks for tangents itself. A compiled graph has them without a level,
        # but it was traced with one, so an operator that refuses them has refused by then.
        forward_mode = tangents is not None or private.forward_mode_active()
        if forward_mode or _records(inputs):
            return recorded_below.apply(*inputs)
        return below(*inputs)

    _library.impl(name, private.without_dynamo(dispatch), "Autograd")

    if compute is None:
        return operator
    recorded_compute = recorded(compute)

    def eager(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or private.needs_dispatcher(inputs):
            return operator(*inputs)
        return recorded_compute.apply(*inputs) if _records(inputs) else compute(*inputs)

    return eager


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _refuse(ctx: Any, *given: Any) -> Any:
    """Raise where a result without a derivative would be taken for a constant."""
    raise NotImplementedError(
        "`band_attention` has first derivatives in reverse mode alone (no jvp, jacfwd, hessian or "
        'gradient of a gradient) except with `impl="reference"`'
    )


def batched(operator: private.Operator, *, packed: str, sums_sinks: bool = False) -> None:
    """Register `torch.vmap`: the batch joins the batch entries of one call where it can, and is
    computed one call after the other elsewhere.

    Args:
        operator: what `register` returned. Its tensors have the batch entry as dimension 0, except
            `sinks`, those of packed calls, and an index without dimensions, which holds for all.
        packed: the argument that is given in packed calls alone, which have no batch entries.
        sums_sinks: the last result is the gradient of `sinks`, a sum over batch entries.
    """
    names = [argument.name for argument in private.schema(operator).arguments]

    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> Any:
        size = info.batch_size
        given = dict(zip(names, inputs))
        dims = dict(zip(names, in_dims))
        sinks = given["sinks"] is not None
        if given[packed] is None and not (sinks and (sums_sinks or dims["sinks"] is not None)):
            query = given["query"]
            entries = query.shape[0] if dims["query"] != 0 else query.shape[1]
            joined = {
                name: value if name == "sinks" else _joined(value, dims[name], size, entries)
                for name, value in given.items()
            }
            found = operator(**joined)
            rows = len(found) - sums_sinks
            results = [result.unflatten(0, (size, entries)) for result in found[:rows]]
            results += [result.expand(size, *result.shape) for result in found[rows:]]
        else:
            each = (
                operator(
                    *(v.select(d, i) if isinstance(d, int) else v for v, d in zip(inputs, in_dims))
                )
                for i in range(size)
            )
            results = [torch.stack(same) for same in zip(*each)]
        return tuple(results), (0,) * len(results)

    torch.library.register_vmap(private.schema(operator).name, vmap, lib=_library)


def _joined(value: Any, dim: int | None, size: int, entries: int) -> Any:
    """`[entries, ...]`, batched or not, as `[size * entries, ...]`."""
    if not isinstance(value, Tensor) or (dim is None and value.dim() == 0):
        return value
    value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    if value.dim() == 1:
        value = value[:, None].expand(size, entries)
    return value.flatten(0, 1)


def _records(inputs: Sequence[Any]) -> bool:
    """True if autograd records a call on these inputs."""
    return torch.is_grad_enabled() and any(
        each.requires_grad for each in inputs if isinstance(each, Tensor)
    )
