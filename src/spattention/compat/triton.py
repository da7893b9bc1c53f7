"""Internals of Triton's launches, seen in 3.6.0, 3.7.1, 3.8.0 and 3.9.0."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import triton
from triton import knobs

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
        kernel, runtime = self.kernel, knobs.runtime
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            kernel[(programs, 1, 1)](*arguments)
            return
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
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
        self.launcher(
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


def direct_launch(kernel: Any, arguments: Sequence[Any]) -> Callable[..., None]:
    """A function `launch(programs, *arguments)` of a compiled kernel, which `function[grid](...)`
    returned for some arguments. It is a `DirectLaunch` where the internals are known: on NVIDIA
    GPUs, with one of `RELEASES`."""

    def documented(programs: int, *arguments: Any) -> None:
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
