"""`BandStore` as a cache of Transformers: each layer keeps what its own bands can still reach."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from ..bands import BandPattern
from ..cache import BandStore
from ..cache_layout import MAX_ROLLBACK, UNSET, checked_int, rollback, tokens_in_reach
from ..cached_attention import band_attention_cached
from ..checks import readable
from ..compat.pytorch import mark_static_address
from ..impl.layout import under_autocast
from ..scalars import LARGEST_SIZE, as_int, int_at_least, shown_number
from .config import read_section
from .mask import Rows
from .tensor_parallel import HeadShard

CACHE_ARGUMENTS = ("past_key_values", "layer_past")


class BandCache(Cache):
    """A cache for `model.generate(..., past_key_values=BandCache(model.config))`, of constant size.

    Every layer with bands has a `BandStore`, allocated by the first forward pass for the batch that
    it sees. From then on the batch may change only with the cache (`batch_select_indices`,
    `batch_repeat_interleave`). Layers without bands have what Transformers' dynamic cache gives
    them. Padding is not kept, wherever it is: what the `attention_mask` says about a token when it
    comes holds from then on.

    Args:
        config: config of the model, after `spattention.hf.apply`.
        max_rollback: tokens that can be taken back (`crop`). Assisted generation makes room for
            longer drafts by itself.
        capacity: tokens per sequence to allocate room for at first. Default: the model's
            `max_position_embeddings`, or all that the bands reach where that is less. Layers whose
            bands reach farther grow with the text, and do not compile until they have all the room
            that they can need.
        slack: former name of `max_rollback`.

    Raises:
        ValueError: if the config names no bands, or a number breaks a rule above.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_rollback: int = MAX_ROLLBACK,
        capacity: int | None = None,
        slack: int = UNSET,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise ValueError(f"`config` must be a model's config, got {type(config).__name__}")
        max_rollback = rollback(max_rollback, slack)
        if capacity is not None:
            capacity = checked_int("capacity", capacity, at_least=1)
        text_config = config.get_text_config(decoder=True)
        section = read_section(text_config)
        if section is None:
            raise ValueError(
                "`config` must have a section `spattention` (call `spattention.hf.apply` first), "
                "got none"
            )
        if capacity is None:
            positions = getattr(text_config, "max_position_embeddings", None)
            if positions is not None:
                name = "config.max_position_embeddings"
                capacity = min(int_at_least(name, positions, 1, sys.maxsize), LARGEST_SIZE)
        own = DynamicCache(config=text_config).layers
        layers = [
            own[index] if pattern is None else BandLayer(pattern, max_rollback, capacity)
            for index, pattern in enumerate(section.layer_patterns)
        ]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values; 0 before the first forward pass."""
        held = [getattr(layer, "store", None) or layer for layer in self.layers]
        tensors = [t for each in held for t in (each.keys, each.values)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str) -> BandCache:
        """Move all layers to another device; returns the cache itself."""
        for layer in self.layers:
            if isinstance(layer, BandLayer):
                layer.to(device)
            elif layer.keys is not None:
                layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
                layer.device = layer.keys.device
        return self


def passed_cache(keywords: Mapping[str, Any]) -> Any:
    """The cache that a model hands an attention module, or None."""
    return next((keywords[k] for k in CACHE_ARGUMENTS if keywords.get(k) is not None), None)


class EndlessLayer(CacheLayerMixin):
    """A layer whose texts have no longest, and whose mask counts all tokens, kept or not."""

    is_sliding = False

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        """Number of keys that a mask would have, and 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1, under the name that earlier versions of Transformers call."""
        return -1


class BandLayer(EndlessLayer):
    """One layer's store, for its bands; arguments as in `BandCache` and `BandStore`."""

    is_croppable = True

    def __init__(
        self, pattern: BandPattern, max_rollback: int = MAX_ROLLBACK, capacity: int | None = None
    ) -> None:
        super().__init__()
        self.pattern = pattern
        self.max_rollback = max_rollback
        self.capacity = capacity
        self.store: BandStore | None = None
        self.shard: HeadShard | None = None  # this rank's heads under tensor parallelism
        self.expects_bands = False  # the layer that asks next is to attend with bands
        self.record_past = False  # Transformers' name: what comes next may be taken back
        self._uncropped = False  # tokens came since, and nobody said yet how many of them stay

    @property
    def is_compileable(self) -> bool:
        """True if shapes are static, as in a static cache; the length is a tensor."""
        if self.store is not None:
            return self.store.capacity is None
        return self.capacity is None or self.capacity >= tokens_in_reach(self.pattern)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the store for keys `[B, Hkv, n, D]` and values of this shape."""
        kind = under_autocast(key_states)[0]
        capacity = self.capacity
        if capacity is not None:
            capacity = max(capacity, key_states.shape[2])
        pattern = self.pattern
        if self.shard is not None:
            pattern = self.shard.for_key_heads(pattern, key_states.shape[1])
        self.store = BandStore(
            pattern,
            key_states.shape[0],
            key_states.shape[1],
            key_states.shape[3],
            value_dim=value_states.shape[3],
            max_rollback=self.max_rollback,
            capacity=capacity,
            dtype=kind.dtype,
            device=kind.device,
        )
        self.is_initialized = True
        self._store_changed()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """A handle in place of keys, and the same in place of values. The store takes the tokens up
        after attention, because a long chunk overwrites tokens that it still has to see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        if self._uncropped:  # two passes without a `crop` between them: nothing is taken back
            self.record_past = self._uncropped = False
            self._set_rollback(self.max_rollback)
        if self.record_past:
            self._set_rollback(max(self.max_rollback, key_states.shape[2] - 1))
            self._uncropped = True
        self.store.reserve(key_states.shape[2])
        if self.keys is not self.store.keys:
            self._store_changed()
        handle = BandHandle(self.store, key_states, value_states, for_bands=self.expects_bands)
        self.expects_bands = False
        return handle, handle

    def activate_past_recording(self) -> None:
        """Expect a `crop` after every pass, of any number of its tokens: assisted generation
        starts."""
        self.record_past = True

    def get_seq_length(self) -> Any:
        """Number of tokens so far, padding included: 0 before the first, then a tensor `[]`."""
        return 0 if self.store is None else self.store.columns[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back `-tokens_to_remove` tokens, at most `max_rollback`."""
        tokens = _removed(tokens_to_remove)
        if self.store is None:
            return
        self.store.crop(tokens)
        self._uncropped = False
        if tokens > self.max_rollback:
            self.max_rollback = 2 * tokens
        self._set_rollback(self.max_rollback)
        self._store_changed()

    def reset(self) -> None:
        """Empty the store and keep its memory."""
        self.record_past = self._uncropped = False
        if self.store is not None:
            self.store.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row b what row `beam_idx[b]` was."""
        if self.store is not None:
            self.store.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copy every row `repeats` times."""
        if self.store is not None:
            self.store.repeat(repeats)
            self._store_changed()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows alone."""
        if self.store is not None:
            self.store.select(indices)
            self._store_changed()

    def to(self, device: torch.device | str) -> None:
        """Move the store to another device."""
        if self.store is not None:
            self.store.to(device)
            self._store_changed()

    def offload(self) -> NoReturn:
        """Refuse: a store stays small, and compiled graphs rely on its addresses."""
        raise ValueError("`past_key_values` must not be offloaded when it is a BandCache")

    def _set_rollback(self, tokens: int) -> None:
        assert self.store is not None
        if self.store.max_rollback != tokens:
            self.store.set_max_rollback(tokens)
            self._store_changed()

    def _store_changed(self) -> None:
        """Refresh the attributes that Transformers reads from a layer."""
        assert self.store is not None
        self.keys, self.values = self.store.keys, self.store.values
        self.batch_size = self.store.batch_size
        self.dtype, self.device = self.store.dtype, self.store.device
        if not torch.compiler.is_compiling():
            # As Transformers does for its static cache: CUDA graphs may then write to them.
            for tensor in (self.keys, self.values, self.store.counts, self.store.documents):
                mark_static_address(tensor)


class BandHandle:
    """Stand-in for keys and for values, which a `BandLayer` hands to the attention function.

    Attention that does not know it fails on first use, whatever it asks of the tensor that it
    expects.
    """

    def __init__(
        self, store: BandStore, key: torch.Tensor, value: torch.Tensor, *, for_bands: bool = True
    ) -> None:
        self.store = store
        self.for_bands = for_bands
        self.key = key
        self.value = value

    def attend(
        self,
        query: torch.Tensor,
        pattern: BandPattern,
        rows: Rows,
        *,
        scale: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention `[B, H, Q, Dv]` of a layer's queries `[B, H, Q, D]`; the store has the keys
        afterwards."""
        if pattern != self.store.pattern:
            raise ValueError(
                f"`past_key_values` must have been made for this layer's pattern, {pattern}, got a "
                f"BandCache for {self.store.pattern}"
            )
        _check_padding(self.store, rows)
        out = band_attention_cached(
            query,
            self.store,
            pattern,
            self.key,
            self.value,
            scale=scale,
            sinks=sinks,
            key_start=_document_starts(rows),
            mask=rows.valid_queries(query.shape[2]),
        )
        assert isinstance(out, torch.Tensor)  # no log-sum-exp was asked for
        return out

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions, such as those of `copy`
            raise AttributeError(name)
        _refuse(self, f"`key.{name}`")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handle = next((each for each in args if isinstance(each, BandHandle)), None)
        _refuse(handle, f"`{getattr(function, '__name__', function)}`")


def _refuse(handle: BandHandle | None, asked: str) -> NoReturn:
    if handle is not None and handle.for_bands:
        raise ValueError(
            "`past_key_values` must not be a BandCache for a model that computes keys from what a "
            "cache returns, such as multi-head latent attention (DeepSeek), got one that asks for "
            f"{asked}: use Transformers' DynamicCache or StaticCache"
        )
    raise ValueError(
        "`past_key_values` must be read by the bands that it was made for when it is a BandCache, "
        f"got another attention, which asks for {asked}"
    )


def _document_starts(rows: Rows) -> torch.Tensor | None:
    """`[B, Q]` of packed documents; else None: a row starts late only because of padding, which the
    store does not keep."""
    start = rows.key_start
    return None if rows.padded or start is None or start.dim() == 1 else start


def _check_padding(store: BandStore, rows: Rows) -> None:
    """Check that a mask says of earlier tokens what it said when they came: a store cannot bring
    back what it dropped, or drop what it kept."""
    if rows.before is None or not readable(rows.before):
        return
    changed = store.position != rows.before
    if bool(changed.any()):
        row = int(changed.nonzero()[0])
        raise ValueError(
            "`attention_mask` must say of earlier tokens what it said when they came for a "
            f"BandCache, got {int(rows.before[row])} tokens in row {row} before these, and "
            f"{int(store.position[row])} in the cache"
        )


def _removed(tokens_to_remove: Any) -> int:
    """The number of tokens that `crop(tokens_to_remove)` takes back."""
    found = as_int(tokens_to_remove)
    if found is None:
        raise ValueError(f"`tokens_to_remove` must be an int, got {tokens_to_remove!r}")
    if found > 0:
        raise ValueError(
            f"`tokens_to_remove` must be minus the number of tokens, got {shown_number(found)}"
        )
    return -found
