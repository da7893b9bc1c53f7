"""Calls of one form, launched again without finding out how: the launches of an earlier call are
bound to the addresses of new tensors.

Eager calls of small shapes take as long as their host needs. What an implementation decides, from
shapes, strides, dtypes and the pattern, is the same in every call of a form. So a pass of such a
call is recorded once, and later ones launch what was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat.pytorch import apply_without_transforms, needs_dispatcher
from ..compat.triton import (
    BoundLaunch,
    RecordedLaunch,
    bind_launches,
    device_and_stream,
    has_hooks,
    recorded_launches,
)

ALIGNMENT = 16  # bytes that addresses of recorded tensors are multiples of
SCRATCH_ALIGNMENT = 128
MAX_BACKWARD = 16  # recorded backward passes of a form


class Pass:
    """The launches of a forward or a backward pass.

    Args:
        launches: those recorded, in order.
        device: number of the device that the tensors are on.
        scratch: bytes that the launches need besides the tensors of a call.
        offsets: where the tensors that were recorded there start.
    """

    def __init__(
        self, launches: list[BoundLaunch], device: int, scratch: int, offsets: list[int]
    ) -> None:
        self.launches, self.device = launches, device
        self.scratch, self.offsets = scratch, offsets

    def run(self, tensors: Sequence[Tensor]) -> bool:
        """Launch on the tensors of a call, in the order of those recorded. Returns False, and does
        nothing, where the launches may not be those that this call needs.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        first = tensors[0]
        # A captured graph must keep the tables that it reads: the implementation sees to that.
        if bits % ALIGNMENT or has_hooks() or _is_capturing(first):
            return False
        device, stream = device_and_stream()
        if device != self.device:
            return False
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=torch.uint8, device=first.device)
            start = scratch.data_ptr()
            addresses += [start + offset for offset in self.offsets]
        for launch in self.launches:
            launch(stream, addresses)
        return True


def bind_pass(
    recorded: Sequence[RecordedLaunch | None], tensors: Sequence[Tensor], constants: Tensor
) -> Pass | None:
    """The pass whose launches were recorded with some tensors, or None if it cannot be repeated.

    Args:
        recorded: its launches.
        tensors: of the call, each of which a launch had; all others that they had are scratch.
        constants: a tensor that belongs to the form, whose views the launches had.
    """
    addresses = [tensor.data_ptr() for tensor in tensors]
    if not recorded or len({*addresses}) < len(addresses):
        return None  # equal addresses do not tell which tensor a launch had
    if any(address % ALIGNMENT for address in addresses) or _is_capturing(tensors[0]):
        return None
    device = tensors[0].get_device()
    if device_and_stream()[0] != device:
        return None  # the implementation enters it
    places = {id(tensor): index for index, tensor in enumerate(tensors)}
    unseen = {*places}
    used = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    constant = constants.untyped_storage().data_ptr()
    starts: dict[int, int] = {}
    offsets: list[int] = []
    size, known = 0, True

    def place(tensor: Tensor) -> int | None:
        nonlocal size, known
        unseen.discard(id(tensor))
        if id(tensor) in places:
            return places[id(tensor)]
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start == constant:
            return None
        if start in used:
            known = False  # another view of the call's tensors
        if start not in starts:
            starts[start] = size
            size += -(-storage.nbytes() // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        places[id(tensor)] = len(tensors) + len(offsets)
        offsets.append(starts[start] + tensor.data_ptr() - start)
        return places[id(tensor)]

    launches = bind_launches(recorded, place)
    if launches is None or not known or unseen:
        return None  # PyTorch copied a tensor that no launch had, and would have to again
    return Pass(launches, device, size, offsets)


class Replay:
    """Eager calls of one form without sinks, forward and backward.

    A call's *inputs* are query, key, value and the tensors of positions that it has, in order.

    Args:
        forward: the pass that fills `out` and `lse`, the last of its tensors, from the inputs.
        lse_shape: `[B, H, Q]`.
        compute: `out` and `lse` from the inputs, by the implementation.
        differentiate: gradients of query, key and value from `d_out`, query, key, value, `out`,
            `lse` and the tensors of positions, by the implementation.
        constants: a tensor that belongs to the form, whose views the launches have.
    """

    def __init__(
        self,
        forward: Pass,
        lse_shape: tuple[int, ...],
        compute: Callable[..., tuple[Tensor, Tensor]],
        differentiate: Callable[..., Sequence[Tensor]],
        constants: Tensor,
    ) -> None:
        self.forward, self.lse_shape = forward, lse_shape
        self.compute, self.differentiate = compute, differentiate
        self.constants = constants
        self.lse_strides = torch.empty(lse_shape, device="meta").stride()
        self.backward: dict[Any, Pass] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_start: int | Tensor | None,
        key_start: Tensor | None,
    ) -> Tensor:
        """Output of a call, recorded for autograd."""
        positions: tuple[Tensor, ...] = ()
        if query_start is not None or key_start is not None:
            positions = tuple(t for t in (query_start, key_start) if isinstance(t, Tensor))
        if torch.is_grad_enabled() and (
            query.requires_grad or key.requires_grad or value.requires_grad
        ):
            found: Tensor = _record(query, key, value, positions, self)
            return found
        return self.results(query, key, value, *positions)[0]

    def results(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """`out` and `lse` of a call."""
        query = inputs[0]
        out = torch.empty_like(query)
        lse = torch.empty_strided(
            self.lse_shape, self.lse_strides, dtype=torch.float32, device=query.device
        )
        if self.forward.run((*inputs, out, lse)):
            return out, lse
        return self.compute(*inputs)

    def gradients(self, d_out: Tensor, saved: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """Gradients of query, key and value; `saved` as `differentiate` takes it after `d_out`."""
        # With gradients on, someone wants a second derivative, which an operator refuses.
        if torch.is_grad_enabled() or needs_dispatcher((d_out, *saved)):
            return self.differentiate(d_out, *saved)
        # Hooks on saved tensors may give back others.
        form = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (d_out, *saved))
        known = self.backward.get(form)
        if known is None:
            return self._first_gradients(form, (d_out, *saved))
        query, key, value, *_ = saved
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        if known.run((d_out, *saved, *gradients)):
            return gradients
        return self.differentiate(d_out, *saved)

    def _first_gradients(self, form: Any, tensors: tuple[Tensor, ...]) -> Sequence[Tensor]:
        with recorded_launches() as recorded:
            gradients = self.differentiate(*tensors)
        # `empty_like` must give what the implementation gave.
        layouts = (torch.empty_like(each).stride() for each in tensors[1:4])
        if all(each.stride() == layout for each, layout in zip(gradients, layouts)):
            found = bind_pass(recorded, (*tensors, *gradients), self.constants)
            if found is not None and len(self.backward) < MAX_BACKWARD:
                self.backward[form] = found
        return gradients


class _Replayed(torch.autograd.Function):
    """A call of a `Replay` as autograd records it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: tuple[Tensor, ...],
        replay: Replay,
    ) -> Tensor:
        out, lse = replay.results(query, key, value, *positions)
        # In the order of a call without a record: checkpointing saves by one, and loads by another.
        ctx.save_for_backward(query, key, value, out, lse, *positions)
        ctx.replay = replay
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.replay.gradients(d_out, ctx.saved_tensors), None, None


_record = apply_without_transforms(_Replayed)


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
