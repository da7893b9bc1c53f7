"""A cache for attention whose past is not its keys: core tokens, moments, recurrent states.

Transformers makes a `DynamicCache` for a model by default. Before an attention module with a state
runs, its empty layer in that cache becomes a `StateLayer`. `update` then returns handles in place
of keys and values, and the attention function continues the state.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..compat.huggingface import attention_name
from ..compat.pytorch import has_pre_hook, remove_pre_hook
from ..hf.cache import EndlessLayer, passed_cache


class State:
    """The past of one layer: the number of tokens, and tensors whose first axis is the batch."""

    def __init__(self) -> None:
        self.length = 0
        self.tensors: dict[str, Tensor] = {}

    def keep(self, **tensors: Tensor) -> None:
        """Replace tensors, without their graph."""
        self.tensors.update({name: tensor.detach() for name, tensor in tensors.items()})


class Handle:
    """Stand-in for the keys and values `[B, Hkv, n, D]` of a layer with a state, to which these
    tokens are new."""

    def __init__(self, state: State, key: Tensor, value: Tensor) -> None:
        self.state = state
        self.key = key
        self.value = value

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python's own questions, such as those of `copy`
            raise AttributeError(name)
        raise ValueError(
            "`past_key_values` must be read by the attention that filled it, got another one, "
            f"which asks for `key.{name}`"
        )


class StateLayer(EndlessLayer):
    """One layer of a cache that holds a `State`, filled by the attention of a config section."""

    def __init__(self, section: Any) -> None:
        super().__init__()
        self.section = section
        self.state = State()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """A handle in place of keys, and the same in place of values."""
        self.lazy_initialization(key_states, value_states)
        handle = Handle(self.state, key_states, value_states)
        return handle, handle

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.state.tensors.values())

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return self.state.length

    def reset(self) -> None:
        """Forget all tokens."""
        self.state = State()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back, which a state has taken in for good."""
        if tokens_to_remove != 0:
            raise ValueError(
                "`past_key_values` must not be cropped when it holds states, got "
                f"{tokens_to_remove}: assisted generation needs a cache of keys"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row b what row `beam_idx[b]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copy every row `repeats` times."""
        tensors = self.state.tensors
        self.state.keep(**{n: t.repeat_interleave(repeats, dim=0) for n, t in tensors.items()})

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        tensors = self.state.tensors
        self.state.keep(**{n: t[indices.to(t.device)] for n, t in tensors.items()})

    def offload(self) -> NoReturn:
        """Refuse: states are small, and are needed in every step."""
        raise ValueError("`past_key_values` must not be offloaded when it holds states")


def keep_state(module: Any) -> None:
    """Have an attention module keep a state in Transformers' caches."""
    if not has_pre_hook(module, _before_forward):
        module.register_forward_pre_hook(_before_forward, with_kwargs=True)


def stop_keeping_state(module: Any) -> None:
    """Undo `keep_state`."""
    remove_pre_hook(module, _before_forward)


def _before_forward(module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    cache = passed_cache(keywords)
    kind = attention_name(module.config)
    section = getattr(module.config, kind, None)
    if cache is None or section is None:  # with another attention for now, such as "sdpa"
        return
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"`past_key_values` must be a DynamicCache for {kind}, got {type(cache).__name__}"
        )
    index = module.layer_idx
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, StateLayer):
        if layer.section != section:
            raise ValueError(
                f"`past_key_values` must have been filled by {kind} of {section}, got "
                f"{layer.section}"
            )
    elif type(layer) is not DynamicLayer or layer.get_seq_length() > 0:
        raise ValueError(
            f"`past_key_values` must be empty or filled by {kind}, got "
            f"{layer.get_seq_length()} tokens of another attention in layer {index}"
        )
    else:
        cache.layers[index] = StateLayer(dict(section))
