"""`torch.func`'s transforms of the operators: right, or refused by name, eager and compiled.

The yardstick is the reference in float64, which PyTorch differentiates itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad

import spattention as spa

Function = Callable[[Tensor], Tensor]
HAS_INTERPRETER = find_spec("triton") is not None and not torch.cuda.is_available()
triton = pytest.mark.skipif(not HAS_INTERPRETER, reason="runs in Triton's interpreter")
TOKENS, PATTERN = 5, spa.BandPattern.shared_local(2, 5)
# Functions of one tensor `[2, 2, 5, 16]` that goes into every argument.
KINDS = ["query", "key and value", "log-sum-exp", "sinks", "packed"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about compiling what is compiled
        yield
    torch._dynamo.reset()


def draw(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, TOKENS, 16, generator=generator, dtype=torch.float64).to(dtype)


def function(kind: str, impl: str | None, dtype: torch.dtype) -> Function:
    q, k, v = (draw(seed, dtype) for seed in (1, 2, 3))
    starts = torch.tensor([0, 2], dtype=torch.int32)
    cu = torch.tensor([0, 2, TOKENS], dtype=torch.int32)

    def attend(x: Tensor) -> Any:
        if kind == "query":
            return spa.band_attention(x, k, v, PATTERN, impl=impl)
        if kind == "key and value":
            return spa.band_attention(q, x, v * x, PATTERN, key_start=starts, impl=impl)
        if kind == "log-sum-exp":
            found = spa.band_attention(q * x, x, v, PATTERN, return_lse=True, impl=impl)
            return torch.cat([found[0], found[1][..., None]], dim=-1)
        if kind == "sinks":
            return spa.band_attention(q, k * x, v, PATTERN, sinks=x[0, :, 0, 0], impl=impl)
        tokens = (each[0].transpose(0, 1) for each in (q * x, k, v + x))
        return spa.band_attention_varlen(*tokens, PATTERN, cu, cu, 3, 3, impl=impl)

    return attend


def loss(f: Function) -> Function:
    return lambda x: f(x).square().sum()


FIRST: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: func.grad(loss(f)),
    "vjp": lambda f: lambda x: func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jacrev": lambda f: func.jacrev(f),
    "vmap": lambda f: lambda x: func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f: lambda x: func.vmap(func.grad(loss(f)), 1)(torch.stack([x, -x], 1)),
    "grad of vmap": lambda f: func.grad(
        lambda x: func.vmap(f)(torch.stack([x, 2 * x])).square().sum()
    ),
}


def dual(f: Function) -> Function:
    def tangent(x: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent

    return tangent


def twice(f: Function) -> Function:
    def second(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(f)(x), x, create_graph=True)
        return torch.autograd.grad(gradient.sum(), x)[0]

    return second


OTHERS: dict[str, Callable[[Function], Function]] = {
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (x,))[1],
    "dual numbers": dual,
    "jacfwd": lambda f: func.jacfwd(f),
    "hessian": lambda f: func.hessian(loss(f)),
    "grad of grad": lambda f: func.grad(lambda x: func.grad(loss(f))(x).sum()),
    "jacrev of jacrev": lambda f: func.jacrev(func.jacrev(loss(f))),
    "double backward": twice,
}

BATCHED: dict[str, Callable[[Function], Function]] = {
    "jvp of vmap": lambda f: lambda x: func.jvp(func.vmap(f), (x[None],), (x[None],))[1][0],
    "jacfwd of vmap": lambda f: lambda x: func.jacfwd(func.vmap(f))(x[None]),
    "vmap of jvp": lambda f: lambda x: func.vmap(OTHERS["jvp"](f))(x[None])[0],
    "vmap of jacfwd": lambda f: lambda x: func.vmap(func.jacfwd(f))(x[None]),
    "jvp of two": lambda f: (
        lambda x: func.jvp(lambda x: func.vmap(func.vmap(f))(x[None, None]), (x,), (x,))[1][0, 0]
    ),
    "hessian of vmap": lambda f: (
        lambda x: func.hessian(lambda x: func.vmap(f)(x[None]).square().sum())(x)
    ),
    "dual numbers of vmap": lambda f: lambda x: dual(func.vmap(f))(x[None])[0],
}
"""The same around `torch.vmap` and inside it."""


def check_first(name: str, kind: str, impl: str | None, dtype: torch.dtype) -> None:
    found = FIRST[name](function(kind, impl, dtype))(draw(0, dtype))
    expected = FIRST[name](function(kind, "reference", torch.float64))(draw(0, torch.float64))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["blockwise", None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FIRST)
def test_first_derivatives_and_vmap(name: str, kind: str, impl: str | None) -> None:
    """The whole of reverse mode, and vmap of it, on each argument."""
    check_first(name, kind, impl, torch.float64)


@triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["grad", "vmap of grad", "grad of vmap"])
def test_transforms_of_the_kernels(name: str, kind: str) -> None:
    check_first(name, kind, "triton", torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FIRST)
def test_transforms_of_the_reference(name: str, kind: str) -> None:
    """Against the same computed one after the other, by the autograd that everybody uses."""
    f, x = function(kind, "reference", torch.float64), draw(0, torch.float64)

    def gradient(x: Tensor, rows: Tensor | None = None) -> Tensor:
        x = x.clone().requires_grad_()
        out = f(x)
        rows = 2 * out.detach() if rows is None else rows  # of the loss
        return torch.autograd.grad(out, x, rows)[0]

    expected = {
        "grad": lambda: gradient(x),
        "vjp": lambda: gradient(x, torch.ones_like(f(x))),
        "jacrev": lambda: torch.stack(
            [
                gradient(x, row)
                for row in torch.eye(f(x).numel(), dtype=x.dtype).unflatten(1, f(x).shape)
            ]
        ).unflatten(0, f(x).shape),
        "vmap": lambda: torch.stack([f(x), f(2 * x)]),
        "vmap of grad": lambda: torch.stack([gradient(x), gradient(-x)]),
        "grad of vmap": lambda: gradient(x) + 2 * gradient(2 * x),
    }
    torch.testing.assert_close(FIRST[name](f)(x), expected[name](), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize(
    ("name", "kind"), [("grad", "packed"), ("jacrev", "sinks"), ("vmap of grad", "key and value")]
)
def test_compiled_transforms(name: str, kind: str, impl: str) -> None:
    transformed = FIRST[name](function(kind, impl, torch.float64))
    x = draw(0, torch.float64)
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), transformed(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["log-sum-exp", "packed"])
@pytest.mark.parametrize("name", OTHERS)
def test_reference_has_every_derivative(name: str, kind: str) -> None:
    """Against differences of what is one derivative lower."""
    f, x = function(kind, "reference", torch.float64), draw(0, torch.float64)
    found, step = OTHERS[name](f)(x), 1e-5
    if name in ("jvp", "dual numbers"):
        expected = (f(x * (1 + step)) - f(x * (1 - step))) / (2 * step)
    elif name == "jacfwd":
        expected = func.jacrev(f)(x)
    else:
        ones = torch.ones_like(x)
        gradient = func.grad(loss(f))
        expected = (gradient(x + step * ones) - gradient(x - step * ones)) / (2 * step)
        if name in ("hessian", "jacrev of jacrev"):
            found = (found * ones).sum(dim=(-1, -2, -3, -4))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["blockwise", None, pytest.param("triton", marks=triton)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*OTHERS, *BATCHED])
def test_other_derivatives_are_refused(name: str, kind: str, impl: str | None) -> None:
    """Never a derivative of zero."""
    transformed = {**OTHERS, **BATCHED}[name](function(kind, impl, torch.float32))
    with pytest.raises(NotImplementedError, match="`band_attention`"):
        transformed(draw(0, torch.float32))


@pytest.mark.parametrize("kind", ["query", "packed"])
@pytest.mark.parametrize(
    # PyTorch compiles no product inside the last one.
    "name",
    [n for n in (*OTHERS, *BATCHED) if n not in ("double backward", "vmap of jacfwd")],
)
def test_compiled_ones_are_refused(name: str, kind: str) -> None:
    """torch.compile runs as it is what it cannot compile, or says with `fullgraph` why not."""
    transformed = {**OTHERS, **BATCHED}[name](function(kind, None, torch.float32))
    x = draw(0, torch.float32)
    with pytest.raises(NotImplementedError, match="`band_attention`"):
        torch.compile(transformed, backend="aot_eager")(x)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="`band_attention`"):
        torch.compile(transformed, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize(
    "name", ["jvp of vmap", "vmap of jvp", "jvp of two", "dual numbers of vmap"]
)
def test_reference_has_tangents_of_vmap(name: str) -> None:
    f, x = function("query", "reference", torch.float64), draw(0, torch.float64)
    torch.testing.assert_close(BATCHED[name](f)(x), OTHERS["jvp"](f)(x))


def test_no_tangent_is_found_where_none_is() -> None:
    """Within `jvp`, calls on what it does not follow have their values."""
    f, x = function("query", None, torch.float64), draw(0, torch.float64)
    several = torch.stack([x, 2 * x])

    def constant(y: Tensor) -> Tensor:
        return y * func.vmap(f)(several).sum()

    found = func.jvp(constant, (x,), (x,))[1]
    torch.testing.assert_close(found, x * func.vmap(f)(several).sum())


def test_compiled_reference_has_tangents() -> None:
    f, x = function("query", "reference", torch.float64), draw(0, torch.float64)
    for name in ("jvp", "dual numbers", "hessian"):
        torch._dynamo.reset()
        compiled = torch.compile(OTHERS[name](f), backend="aot_eager")
        torch.testing.assert_close(compiled(x), OTHERS[name](f)(x))


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("batched", ["query", "key", "sinks", "query_start", "key_start"])
def test_vmap_over_one_argument(batched: str, impl: str) -> None:
    """Each on its own, with values that may not be read while they are batched."""
    arguments: dict[str, Any] = {
        name: draw(seed, torch.float64) for seed, name in enumerate(("query", "key", "value"))
    }
    arguments["sinks"] = arguments["query"][0, :, 0, 0]
    arguments["query_start"] = torch.tensor(0, dtype=torch.int32)
    arguments["key_start"] = torch.tensor([0, 1], dtype=torch.int32)
    given = arguments[batched]
    several = torch.stack([given, given + 1 if batched == "query_start" else given.flip(0)])

    def attend(each: Tensor) -> Any:
        return spa.band_attention(**arguments | {batched: each}, pattern=PATTERN, impl=impl)

    expected = torch.stack([attend(each) for each in several])
    torch.testing.assert_close(func.vmap(attend)(several), expected)


def test_gradient_inside_and_outside_a_transform() -> None:
    """An outer graph gets its gradient through the inner transform's result."""
    f, x = function("query", "blockwise", torch.float64), draw(0, torch.float64).requires_grad_()
    out = func.vmap(f)(torch.stack([x, 2 * x]))
    (found,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(found, FIRST["grad of vmap"](f)(x.detach()))
    with pytest.raises(NotImplementedError, match="`band_attention`"):
        torch.autograd.grad(func.grad(loss(f))(x).sum(), x)
