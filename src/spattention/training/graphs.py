"""Forward and backward pass of training as one CUDA graph.

A small model keeps a GPU waiting for Python. A graph holds the launches of a whole pass: embedding,
layers, loss, backward pass and the sums of gradients. `torch.compile(mode="reduce-overhead")` would
record each compiled layer by itself. It would copy every layer's input into place, and leave all
between the layers to Python.

Clipping, optimizer and schedule stay outside, because their numbers change from step to step. They
are a few launches per step, over all parameters at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..choice import is_other
from ..compat.huggingface import packing_known
from ..compat.pytorch import zero_each
from .recipe import Recipe

WARM_UP = 3  # passes before the recording: they compile, tune, and allocate
WAITS = "called a synchronizing CUDA operation"  # PyTorch's warning
WATCHED = "Synchronization debug mode"  # start of its warning that it may overlook some

Inputs = dict[str, Any]


def asks_for_graphs(recipe: Recipe) -> bool:
    """True if a recipe wants CUDA graphs where they are possible."""
    return recipe.compile if recipe.cuda_graphs == "auto" else bool(recipe.cuda_graphs)


def refusal(recipe: Recipe, device: torch.device, devices: int) -> str | None:
    """Why a run has no CUDA graphs, or None if nothing is known that forbids them.

    Raises:
        ValueError: if there is a reason and the recipe insists on graphs.
    """
    reason = None
    if device.type != "cuda":
        reason = f"training runs on {device.type}"
    elif devices > 1 or recipe.parallel == "fsdp2":
        reason = f"{devices} devices under `parallel` = {recipe.parallel!r} exchange in each pass"
    elif recipe.loss == "liger":
        reason = 'the loss "liger" waits for the GPU in each pass; "chunked" does not'
    elif recipe.checkpointing:
        reason = "`checkpointing` reads the state of random numbers in each pass"
    elif recipe.cuda_graphs == "auto" and any(map(is_other, _names(recipe))):
        reason = "recorded passes were tested with dense attention and bands alone"
    if reason and recipe.cuda_graphs is True:
        raise ValueError(f'`cuda_graphs` must be false or "auto" here, got true: {reason}')
    return reason


def _names(recipe: Recipe) -> Sequence[str]:
    return (recipe.attention,) if isinstance(recipe.attention, str) else recipe.attention


class Recorder:
    """Runs and records passes on a CUDA stream of their own, for `PassGraph`."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run on the stream of the recordings, after and before the work of the current one."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            found = function()
        current.wait_stream(self.stream)
        return found

    def run_watched(self, function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, str | None]:
        """The same; also where it first waits for the GPU, if it does."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = self.run(function)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [each for each in caught if WAITS in str(each.message)]
        for each in caught:
            if each not in waits and not str(each.message).startswith(WATCHED):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return found, f"{waits[0].filename}:{waits[0].lineno}" if waits else None

    def record(
        self, function: Callable[[], torch.Tensor]
    ) -> tuple[Callable[[], None], torch.Tensor]:
        """Record a function without running it: what replays it, and where its result will lie."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins batches, may call CUDA meanwhile.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            found = function()
        return graph.replay, found


class PassGraph:
    """Forward and backward passes over inputs of one form, recorded once and replayed.

    The first `WARM_UP` passes run as they are, and so do all over inputs of another form. The graph
    adds to gradients that stay in place. A step may set gradients to None: the next pass gives
    their parameters the ones in place, zeroed.

    Args:
        run: a pass over inputs by name; it adds to the gradients and returns the detached loss.
        parameters: those that it may give gradients.
        tell: called once with the reason where passes run without the graph.
        recorder: that of another `PassGraph`, never replayed at the same time, to share its
            memory; None makes one.
    """

    def __init__(
        self,
        run: Callable[[Inputs], torch.Tensor],
        parameters: Iterable[torch.nn.Parameter],
        tell: Callable[[str], None],
        recorder: Recorder | None = None,
    ) -> None:
        self.run, self.parameters, self.tell = run, list(parameters), tell
        self.recorder = recorder or Recorder()
        self.form: Any = None
        self.passes: float = 0  # of this form; infinite once there will be no graph
        self.reason: str | None = None
        self.replay: Callable[[], None] | None = None
        self.inputs: Inputs = {}
        self.gradients: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """The loss of a pass over these inputs, whose gradients it adds."""
        form = {name: _form(value) for name, value in inputs.items()}
        self.form = self.form or form
        if form != self.form:
            self._without(f"a pass over {form} came after one over {self.form}")
        if form != self.form or self.passes == math.inf:
            self._attach()
            return self._pass(inputs)
        self.passes += 1
        if self.passes < WARM_UP:
            return self.recorder.run(lambda: self._pass(inputs))
        if self.passes == WARM_UP:
            return self._last_of_warm_up(inputs)
        if self.replay is None:
            self._record(inputs)
        self._attach()
        for name, value in self.inputs.items():
            value.copy_(inputs[name], non_blocking=True)
        assert self.replay is not None
        self.replay()
        return self.loss.clone()

    def forget(self) -> None:
        """Record again, after as many passes: from now on they compute something else."""
        self.recorder = Recorder()
        self.form, self.passes, self.replay = None, 0, None
        self.gradients = []

    def _pass(self, inputs: Inputs) -> torch.Tensor:
        # Transformers reads positions to tell whether rows hold documents. Here they do wherever
        # positions are given.
        with packing_known(inputs.get("position_ids") is not None):
            return self.run(inputs)

    def _last_of_warm_up(self, inputs: Inputs) -> torch.Tensor:
        loss, where = self.recorder.run_watched(lambda: self._pass(inputs))
        if where is None:
            # A parameter without a gradient gets none from the graph either.
            self.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        else:
            self.passes = math.inf
            self._without(f"a pass waits for the GPU at {where}")
        return loss

    def _without(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            self.tell(reason)

    def _record(self, inputs: Inputs) -> None:
        self.inputs = {
            name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)
        }
        self._attach()
        given = {**inputs, **self.inputs}
        try:
            self.replay, self.loss = self.recorder.record(lambda: self._pass(given))
        except RuntimeError as error:
            raise RuntimeError(
                "`cuda_graphs` must be false for this model, whose passes cannot be recorded: "
                f"{error}"
            ) from error

    def _attach(self) -> None:
        """Give parameters without gradients those in place, zeroed."""
        fresh = [(each, kept) for each, kept in self.gradients if each.grad is None]
        if fresh:
            zero_each([kept for _, kept in fresh])
        for each, kept in fresh:
            each.grad = kept


def _form(value: Any) -> Any:
    """Shape, dtype and device of a tensor; any other value itself."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    return value
