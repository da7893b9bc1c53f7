"""A call that is launched from a record launches what the implementation would have launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton import knobs
from without_gpu import launches_to

import spattention as spa
from spattention import binding
from spattention.compat import triton as direct
from spattention.compat.triton import DirectLaunch
from spattention.impl import replay
from spattention.impl.triton.hopper import planning

pytestmark = pytest.mark.skipif(
    not direct.is_known(), reason="internals of this Triton are unknown"
)
Arguments = list[Any]


class Launcher:
    """A launcher of Triton 3.6, or of a later one, whose driver gets `launch`."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, launch: Callable[..., None], nested: bool) -> None:
        self.launch, self.nested = launch, nested

    def __call__(
        self, x: int, y: int, z: int, stream: Any, function: str, packed: Any, *rest: Any
    ) -> None:
        around = x, y, z, stream, function, False, True, packed
        metadata, enter, leave, *arguments = rest
        if self.nested:
            self.launch(*around, metadata, enter, leave, None, None, "signature", arguments)
        else:
            self.launch(*around, None, None, metadata, enter, leave, *arguments)


class Machine:
    """A GPU that records what its driver gets, with descriptors as their address and form."""

    def __init__(self, nested: bool) -> None:
        self.nested, self.stream = nested, 7
        self.launched: list[Arguments] = []
        self.kernels: dict[Any, DirectLaunch] = {}

    def driver(self, *given: Any) -> None:
        *around, last = given
        self.launched.append([*around, *last] if self.nested else [*given])

    def launch(
        self, cache: Any, programs: int, key: Any, *arguments: Any, **constants: Any
    ) -> None:
        """What `CompiledKernelCache` does with a kernel that is compiled."""
        key = (cache, key, *constants.values())
        if key not in self.kernels:
            places = [index for index, each in enumerate(arguments) if hasattr(each, "box")]
            name = f"{cache.function.__name__} {sorted(constants)}"
            kernel = SimpleNamespace(function=name, packed_metadata=("packed",))
            launcher = Launcher(self.driver, self.nested)
            found = DirectLaunch(kernel, launcher, encode, [(index, "map") for index in places])
            self.kernels[key] = found
        self.kernels[key](programs, *arguments)

    def get_current_device(self) -> int:
        return -1  # that of a tensor on the CPU

    def get_current_stream(self, device: int) -> int:
        return self.stream


def encode(descriptor: Any, metadata: str) -> Arguments:
    form = (metadata, descriptor.base.data_ptr(), *descriptor.block_shape, descriptor.layout)
    return [form, *descriptor.shape, *descriptor.strides]


@pytest.fixture(params=[False, True], ids=["3.6", "later"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    found = Machine(request.param)
    binding._form.cache_clear()
    with launches_to(found.launch), mock.patch.object(type(triton.runtime.driver), "active", found):
        yield found
    binding._form.cache_clear()


def named(launched: list[Arguments], tensors: dict[str, torch.Tensor]) -> list[Any]:
    """Arguments with addresses as names: that of a tensor and the distance from its start, or the
    order in which others are met.
    """
    starts = {
        name: (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        for name, tensor in tensors.items()
    }
    others: dict[int, str] = {}

    def name(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            return name(each.data_ptr())
        if isinstance(each, (tuple, list)):
            return [name(part) for part in each]
        if not isinstance(each, int) or each < 1 << 32:
            return each
        for owner, (start, size) in starts.items():
            if start <= each < start + size:
                return f"{owner} + {each - start}"
        return others.setdefault(each, f"other {len(others)}")

    return name(launched)


def inputs(heads: int = 4, key_heads: int = 4, tokens: int = 192, head_dim: int = 64) -> Any:
    """Query, key, value and a gradient, in memory as projections give them."""
    shapes = [(2, tokens, n, head_dim) for n in (heads, key_heads, key_heads, heads)]
    tensors = [torch.zeros(shape, dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]
    return [each.requires_grad_(index < 3) for index, each in enumerate(tensors)]


def step(
    machine: Machine, tensors: Any, pattern: spa.BandPattern, **options: Any
) -> tuple[list[Any], list[Any]]:
    """What the driver gets in a forward and in a backward pass."""
    machine.launched.clear()
    *leaves, d_out = tensors
    out = spa.band_attention(*leaves, pattern, impl="triton", **options)
    names = dict(zip(("query", "key", "value", "d_out", "out"), (*tensors, out)))
    names |= {name: each for name, each in options.items() if isinstance(each, torch.Tensor)}
    forward = named(machine.launched, names)
    machine.launched.clear()
    gradients = torch.autograd.grad(out, leaves, d_out)
    names |= dict(zip(("d_query", "d_key", "d_value"), gradients))
    return forward, named(machine.launched, names)


def replays(pattern: spa.BandPattern, tensors: Any, *starts: Any) -> dict[bool, replay.Replay]:
    """What is known of calls with these tensors, and with this `query_start` and `key_start`."""
    starts = starts or (None, None)
    form = binding.form_of(*tensors[:3], pattern, None, (None, *starts))
    assert form is not None
    return {key: found for key, found in form.replays.items() if found is not None}


CASES = {
    "plain": ({}, {}, {}),
    "grouped": ({"key_heads": 2}, {}, {}),
    "pitch": ({"tokens": 100}, {}, {}),
    "short prefix": ({}, {"prefix": 4}, {}),
    "long prefix": ({}, {"prefix": 40}, {}),
    "portable": ({"head_dim": 32}, {}, {}),
    "portable prefix": ({"head_dim": 32}, {"prefix": 4}, {}),
    "five products": ({"head_dim": 128}, {}, {"deterministic": False}),
    "five products in turn": ({"head_dim": 128}, {}, {}),
    "padding": ({}, {}, {"key_start": (2,)}),
    "documents": ({}, {}, {"key_start": (2, 192)}),
    "portable documents": ({"head_dim": 32}, {"prefix": 4}, {"key_start": (2, 192)}),
    "start": ({"tokens": 100}, {}, {"query_start": ()}),
    "starts": ({}, {}, {"query_start": (2,), "key_start": (2,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_replays_launch_what_was_recorded(
    machine: Machine, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "use_fused", lambda call: call.head_dim == 128)
    monkeypatch.setattr(planning, "MIN_ROW_QUERIES", 0)
    sizes, prefix, given = CASES[case]
    first, second = inputs(**sizes), inputs(**sizes)
    pattern = spa.BandPattern.shared_local(4, first[0].shape[2], **prefix)

    def options() -> dict[str, Any]:
        return {
            name: torch.zeros(each, dtype=torch.int32) if isinstance(each, tuple) else each
            for name, each in given.items()
        }

    recorded = step(machine, first, pattern, **options())
    assert step(machine, first, pattern, **options()) == recorded
    starts = [options().get(name) for name in ("query_start", "key_start")]
    found = replays(pattern, first, *starts)[given.get("deterministic", True)]
    assert [*recorded[0], *recorded[1]]
    assert not found.backward  # its forward pass came before there was a record
    assert step(machine, first, pattern, **options()) == recorded
    assert len(found.backward) == 1
    with mock.patch.multiple(found, compute=None, differentiate=None):
        assert step(machine, second, pattern, **options()) == recorded


def test_streams_are_those_of_the_call(machine: Machine) -> None:
    tensors = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    for machine.stream in (5, 5, 5, 5, 6):
        forward, backward = step(machine, tensors, pattern)
    assert {each[3] for each in (*forward, *backward)} == {6}


@pytest.mark.parametrize("change", ["address", "hook", "device", "capture"])
def test_other_calls_go_the_long_way(
    machine: Machine, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that may need another kernel, or has to be seen, is not one of the record."""
    tensors = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    for _ in range(4):
        step(machine, tensors, pattern)
    (found,) = replays(pattern, tensors).values()
    taken = found.forward.run
    if change == "address":
        room = torch.zeros(tensors[0].numel() + 1, dtype=torch.bfloat16)
        tensors[0] = room.as_strided(tensors[0].shape, tensors[0].stride(), 1)
    if change == "hook":
        monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None])
    if change == "device":
        monkeypatch.setattr(machine, "get_current_device", lambda: 0)
    if change == "capture":
        monkeypatch.setattr(replay, "_is_capturing", lambda tensor: True)
    machine.launched.clear()
    assert not taken([*tensors[:3], torch.zeros(1), torch.zeros(1)])
    assert not machine.launched
    assert replays(pattern, tensors) == {True: found}


def test_other_strides_are_another_record(machine: Machine) -> None:
    """Hooks on saved tensors, and whoever gives a gradient, choose their strides."""
    tensors = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    for _ in range(4):
        step(machine, tensors, pattern)
    (found,) = replays(pattern, tensors).values()
    _, expected = step(machine, tensors, pattern)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        _, other = step(machine, tensors, pattern)
    assert other != expected
    assert len(found.backward) == 2
    *leaves, d_out = tensors
    _, dense = step(machine, [*leaves, d_out.contiguous()], pattern)
    assert dense != expected
    assert step(machine, tensors, pattern)[1] == expected


def test_a_tensor_given_twice_is_not_recorded(machine: Machine) -> None:
    """Its address would not tell which argument a launch had."""
    query, *_ = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    for _ in range(4):
        spa.band_attention(query, query, query, pattern, impl="triton")
    assert not replays(pattern, [query] * 3)


@pytest.mark.parametrize("case", ["zero scale", "strided starts", "sinks", "log-sum-exp"])
def test_calls_that_need_more_are_not_recorded(machine: Machine, case: str) -> None:
    """PyTorch fills or copies a tensor besides the launches, or has one more result."""
    tensors = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    starts = torch.zeros(2, 384, dtype=torch.int32)[:, ::2]
    options: dict[str, Any] = {
        "zero scale": {"scale": 0.0},
        "strided starts": {"key_start": starts},
        "sinks": {"sinks": torch.zeros(4, dtype=torch.bfloat16)},
        "log-sum-exp": {"return_lse": True},
    }[case]
    for _ in range(4):
        result = spa.band_attention(*tensors[:3], pattern, impl="triton", **options)
        assert isinstance(result, tuple) == (case == "log-sum-exp")
    optional = options.get("sinks"), None, options.get("key_start")
    form = binding.form_of(*tensors[:3], pattern, options.get("scale"), optional)
    assert form is not None
    assert (form.replays.get(True) is None) == (case != "log-sum-exp")


def test_a_form_that_comes_once_is_not_recorded(machine: Machine) -> None:
    """Lengths that vary would pay for a record in every call."""
    tensors = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    for deterministic in (True, False):
        step(machine, tensors, pattern, deterministic=deterministic)
        assert not replays(pattern, tensors)
    step(machine, tensors, pattern)
    assert [*replays(pattern, tensors)] == [True]


def test_few_queries_are_not_recorded(machine: Machine) -> None:
    """Without gradients they are decoded, by other kernels."""
    tensors = inputs(tokens=16)
    pattern = spa.BandPattern.exclusive(4, 16)
    for _ in range(4):
        step(machine, tensors, pattern)
    assert not replays(pattern, tensors)


def test_second_derivatives_are_refused(machine: Machine) -> None:
    tensors = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    for _ in range(4):
        step(machine, tensors, pattern)
    *leaves, d_out = tensors
    out = spa.band_attention(*leaves, pattern, impl="triton")
    first = torch.autograd.grad(out, leaves, d_out, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives"):
        torch.autograd.grad(first[0].sum(), leaves[0])


def test_checkpoints_compute_again_by_a_record(machine: Machine) -> None:
    """A tensor that a call without a record saved is one that a call with a record saves."""
    tensors = inputs(key_heads=2)
    pattern = spa.BandPattern.exclusive(4, 192)

    def attend(*leaves: torch.Tensor) -> Any:
        start = torch.zeros(2, dtype=torch.int32)
        return spa.band_attention(*leaves, pattern, key_start=start, impl="triton")

    *leaves, d_out = tensors
    attend(*leaves)  # the first of the checkpoints comes without a record, its second pass with one
    for _ in range(3):
        out = torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=False)
        torch.autograd.grad(out, leaves, d_out)
    assert replays(pattern, tensors, None, torch.zeros(2, dtype=torch.int32))


def test_modes_see_the_operator_of_a_known_form(machine: Machine) -> None:
    """Among them those that count floating point operations."""
    tensors = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    for _ in range(4):
        step(machine, tensors, pattern)
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        step(machine, tensors, pattern)
    forward, backward = (f"spattention.triton_{name}.default" for name in ("forward", "backward"))
    assert {forward, backward} <= {*seen}
    seen.clear()
    *leaves, d_out = tensors
    out = spa.band_attention(*leaves, pattern, impl="triton")
    assert not seen
    with Mode():
        torch.autograd.grad(out, leaves, d_out)
    assert backward in seen


def test_autocast_of_other_dtypes_is_another_form(machine: Machine) -> None:
    tensors = [each.detach().half() for each in inputs()[:3]]
    pattern = spa.BandPattern.exclusive(4, 192)
    for _ in range(4):
        assert spa.band_attention(*tensors, pattern, impl="triton").dtype == torch.float16
        with torch.autocast("cpu", torch.bfloat16):
            assert binding.form_of(*tensors, pattern, None, (None, None, None)) is None
            assert spa.band_attention(*tensors, pattern, impl="triton").dtype == torch.bfloat16


def test_a_tensor_that_is_copied_first_is_not_recorded(machine: Machine) -> None:
    """A launch reads the copy, which PyTorch fills in each call."""
    *leaves, d_out = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    expanded = d_out.new_ones(()).expand(d_out.shape)  # the gradient of a sum
    for _ in range(4):
        step(machine, [*leaves, expanded], pattern)
    (found,) = replays(pattern, leaves).values()
    assert not found.backward
    rows = [each.detach().transpose(2, 3).contiguous().transpose(2, 3) for each in leaves]
    for _ in range(4):
        spa.band_attention(*rows, pattern, impl="triton")
    assert not replays(pattern, rows)


@pytest.mark.parametrize("change", ["dtype", "negated"])
def test_saved_tensors_of_another_kind_are_seen(machine: Machine, change: str) -> None:
    """Hooks on saved tensors may give back what the recorded launches cannot read."""
    tensors = inputs()
    pattern = spa.BandPattern.exclusive(4, 192)
    for _ in range(4):
        step(machine, tensors, pattern)
    (found,) = replays(pattern, tensors).values()
    assert len(found.backward) == 1
    changes = {"dtype": lambda t: t.float(), "negated": torch._neg_view}
    *leaves, d_out = tensors
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, changes[change]):
        out = spa.band_attention(*leaves, pattern, impl="triton")
    machine.launched.clear()
    other = mock.patch.object(found, "differentiate", side_effect=KeyError("seen"))
    with other, pytest.raises(KeyError, match="seen"):
        torch.autograd.grad(out, leaves, d_out)
    assert not machine.launched
