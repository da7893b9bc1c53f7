"""Internals of Triton's launches, seen in 3.6.0, 3.7.1, 3.8.0 and 3.9.0."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, TypeAlias

import torch
import triton
from triton import knobs

RecordedLaunch: TypeAlias = "tuple[DirectLaunch, int, tuple[Any, ...]]"

RELEASES = ("3.6", "3.7", "3.8", "3.9")
MAX_ENCODED = 4096  # tensor maps that a kernel keeps for an argument


class DirectLaunch:
    """Launches a compiled kernel as `kernel[grid](*arguments)` does, in a third of the host time.

    That call runs hooks that nobody has set and encodes each tensor descriptor again. Here the
    encoded form of a descriptor is kept by address and `box`: the descriptor has the tensor as
    `base`, and everything else that its encoded form depends on in the hashable `box`.

    Args:
        kernel: what `function[grid](...)` returned.
        launcher: the kernel's launcher, which takes encoded descriptors.
        encode: gives the arguments that a descriptor becomes.
        descriptors: index of each descriptor among the arguments, and its metadata.
    """

    def __init__(
        self,
        kernel: Any,
        launcher: Callable[..., None],
        encode: Callable[[Any, Any], Sequence[Any]],
        descriptors: Sequence[tuple[int, Any]],
    ) -> None:
        self.kernel, self.launcher, self.encode = kernel, launcher, encode
        # The last first: an encoded descriptor is several arguments.
        self.descriptors: list[tuple[int, Any, dict[Any, Sequence[Any]]]] = [
            (index, metadata, {}) for index, metadata in reversed(descriptors)
        ]

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Launch on the current device and stream."""
        kernel = self.kernel
        if _recording.launches is not None:
            _recording.launches.append((self, programs, arguments))
        if has_hooks():
            kernel[(programs, 1, 1)](*arguments)
            return
        _, stream = device_and_stream()
        given = [*arguments]
        for index, metadata, known in self.descriptors:
            descriptor = given[index]
            key = (descriptor.base.data_ptr(), descriptor.box)
            encoded = known.get(key)
            if encoded is None:
                if len(known) >= MAX_ENCODED:
                    known.clear()
                encoded = known[key] = self.encode(descriptor, metadata)
            given[index : index + 1] = encoded
        self.call(self.launcher, programs, stream, given)

    def call(
        self, launcher: Callable[..., None], programs: int, stream: Any, given: Sequence[Any]
    ) -> None:
        """Call a launcher of this kernel, without hooks, on encoded arguments."""
        kernel = self.kernel
        launcher(
            programs,
            1,
            1,
            stream,
            kernel.function,
            kernel.packed_metadata,
            None,
            None,
            None,
            *given,
        )

    def can_bind(self) -> bool:
        """True if the launcher allocates nothing for a launch, and nobody wants to see it."""
        launcher: Any = self.launcher
        sizes = launcher.global_scratch_size, launcher.profile_scratch_size
        return sizes == (0, 0) and not getattr(launcher, "gsan_enabled", False)


class BoundLaunch:
    """A `DirectLaunch` with the arguments of an earlier launch, except for addresses.

    Args:
        direct: the launch.
        programs: number of programs.
        arguments: those of the earlier launch.
        place: gives the index of a tensor's address among those of each call, or None for a tensor
            that is the same in every call.
    """

    def __init__(
        self,
        direct: DirectLaunch,
        programs: int,
        arguments: Sequence[Any],
        place: Callable[[torch.Tensor], int | None],
    ) -> None:
        self.programs, self.direct = programs, direct
        self.launch, self.between, self.nested = _driver_call(direct, programs)
        self.given: list[Any] = []
        self.pointers: list[tuple[int, int]] = []
        self.tuples: list[tuple[int, itemgetter[Any], list[Any]]] = []
        self.descriptors: list[tuple[int, int, Any, Any, dict[int, Any]]] = []
        self.constants: list[torch.Tensor] = []  # they must outlive the addresses here
        metadata = {index: each for index, each, _ in direct.descriptors}

        def place_of(tensor: torch.Tensor) -> int | None:
            found = place(tensor)
            if found is None:
                self.constants.append(tensor)
            return found

        for index, argument in enumerate(arguments):
            at = len(self.given)
            if index in metadata:
                at_address = place_of(argument.base)
                assert at_address is not None
                form = copy.copy(argument)
                form.base = None
                self.descriptors.append((at, at_address, form, metadata[index], {}))
                self.given += [None, *argument.shape, *argument.strides]
            elif isinstance(argument, torch.Tensor):
                at_address = place_of(argument)
                if at_address is None:
                    self.given.append(argument.data_ptr())
                else:
                    self.given.append(None)
                    self.pointers.append((at, at_address))
            elif isinstance(argument, tuple) and any(isinstance(x, torch.Tensor) for x in argument):
                places = [place_of(x) if isinstance(x, torch.Tensor) else None for x in argument]
                rest = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in argument]
                order = [n - len(rest) if at is None else at for n, at in enumerate(places)]
                self.given.append(None)
                self.tuples.append((at, itemgetter(*order), rest))
            else:
                self.given.append(argument)

    def __call__(self, stream: int, addresses: list[int]) -> None:
        """Launch on a stream of the current device, with these addresses."""
        given = self.given.copy()
        for index, place in self.pointers:
            given[index] = addresses[place]
        for index, members, rest in self.tuples:
            given[index] = members(addresses + rest)
        for index, place, form, metadata, known in self.descriptors:
            encoded = known.get(addresses[place])
            if encoded is None:
                if len(known) >= MAX_ENCODED:
                    known.clear()
                form = copy.copy(form)
                form.base = _Address(addresses[place])
                encoded = known[addresses[place]] = self.direct.encode(form, metadata)[0]
            given[index] = encoded
        if self.nested:
            self.launch(self.programs, 1, 1, stream, *self.between, given)
        else:
            self.launch(self.programs, 1, 1, stream, *self.between, *given)


class _Address:
    """An address, in place of a tensor."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        """The address."""
        return self.address


def _driver_call(
    direct: DirectLaunch, programs: int
) -> tuple[Callable[..., None], list[Any], bool]:
    """The driver's launch function, what a launcher gives it between the stream and the kernel's
    arguments, and whether these are one argument.
    """
    found: list[Any] = []
    launcher = copy.copy(direct.launcher)
    function = launcher.launch  # type: ignore[attr-defined]
    launcher.launch = lambda *given: found.extend(given)  # type: ignore[attr-defined]
    stream, argument = object(), object()
    direct.call(launcher, programs, stream, [argument])
    assert found[3] is stream
    nested = found[-1] is not argument
    assert not nested or [*found[-1]] == [argument]
    return function, found[4:-1], nested


def _cannot_record() -> None:
    if _recording.launches is not None:
        _recording.launches.append(None)


class _Recording(threading.local):
    """The launches of this thread that `recorded_launches` collects."""

    launches: list[RecordedLaunch | None] | None = None


_recording = _Recording()


@contextmanager
def recorded_launches() -> Iterator[list[RecordedLaunch | None]]:
    """The launches of this thread inside the context; None for one that cannot be bound."""
    before = _recording.launches
    found: list[RecordedLaunch | None] = []
    _recording.launches = found
    try:
        yield found
    finally:
        _recording.launches = before


def bind_launches(
    recorded: Sequence[RecordedLaunch | None],
    place: Callable[[torch.Tensor], int | None],
) -> list[BoundLaunch] | None:
    """The recorded launches as `BoundLaunch`, or None if one of them cannot be."""
    found = []
    for each in recorded:
        if each is None or not each[0].can_bind():
            return None
        found.append(BoundLaunch(*each, place))
    return found


def has_hooks() -> bool:
    """True if someone wants to see every launch."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def device_and_stream() -> tuple[int, int]:
    """Number of the current device, and its current stream."""
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    return device, driver.get_current_stream(device)


def direct_launch(kernel: Any, arguments: Sequence[Any]) -> Callable[..., None]:
    """A function `launch(programs, *arguments)` of a compiled kernel, which `function[grid](...)`
    returned for some arguments. It is a `DirectLaunch` where the internals are known: on NVIDIA
    GPUs, with one of `RELEASES`."""

    _cannot_record()

    def documented(programs: int, *arguments: Any) -> None:
        _cannot_record()
        kernel[(programs, 1, 1)](*arguments)

    run: Any = getattr(kernel, "run", None)
    if not is_known() or type(run).__name__ != "CudaLauncher":
        return documented
    from triton.backends.nvidia import driver

    found = getattr(kernel.metadata, "tensordesc_meta", None) or []
    places = [index for index, each in enumerate(arguments) if hasattr(each, "box")]
    if len(places) != len(found) or None in found:
        return documented
    launcher = copy.copy(run)
    if places:
        names = run.launch.__code__.co_freevars
        launcher.launch = run.launch.__closure__[names.index("launcher")].cell_contents
    many = driver.make_tensordesc_arg.__code__.co_argcount

    def encode(descriptor: Any, metadata: Any) -> Sequence[Any]:
        rest = (None,) * (many - 2)  # the launch's other arguments, which are not used
        encoded: Sequence[Any] = driver.make_tensordesc_arg(descriptor, metadata, *rest)
        return encoded

    return DirectLaunch(kernel, launcher, encode, list(zip(places, found)))


def is_known() -> bool:
    """True if this release of Triton is one of `RELEASES`."""
    major, minor, *_ = triton.__version__.split(".")
    return f"{major}.{minor}" in RELEASES
