"""SGLang's attention back end for bands: extending and decoding over its pool of slots.

Decoding reads the pool through the table of pages, by kernels on CUDA, inside CUDA graphs too.
Extending is one call for all requests of a step. Kernels read the pool in place where the pages
allow it; else the keys that bands and prefixes reach are gathered. Nothing is read back from the
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from torch import Tensor

from ..attention import kernels_for
from ..bands import BandPattern
from .paged import Decodes
from .slots import NewTokens, attend_new_tokens, attend_newest_token, fill_pages


@dataclass(frozen=True)
class LayerBands:
    """The bands that an attention layer of SGLang carries as `bands`.

    Attributes:
        pattern: the bands of this rank's query heads.
        sinks: float32 `[H]` of this rank, or None.
    """

    pattern: BandPattern
    sinks: Tensor | None


def create(model_runner: Any) -> BandAttentionBackend:
    """The back end for `--attention-backend spattention`; SGLang calls this."""
    return BandAttentionBackend(model_runner)


class BandAttentionBackend(AttentionBackend):
    """Attention of all layers of a model with bands; those without a pattern are dense."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        check_pool(model_runner)
        self.req_to_token: Tensor = model_runner.req_to_token_pool.req_to_token
        self.pool = model_runner.token_to_kv_pool
        self.page_size: int = model_runner.page_size
        self.forward_metadata: Decodes | NewTokens | None = None
        self.graph_decodes: Decodes | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Make what all layers of a step share, outside of CUDA graphs."""
        mode = forward_batch.forward_mode
        if mode.is_decode():
            length = int(forward_batch.seq_lens_cpu.max())
            self.forward_metadata = self._decodes(forward_batch.batch_size, length)
            self._fill(forward_batch)
        elif mode.is_idle():
            self.forward_metadata = None
        elif mode.is_target_verify() or not mode.is_extend():
            raise NotImplementedError(f"`forward_mode` {mode.name} is not served by spattention")
        else:
            computed, new = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
            longest = max(map(sum, zip(computed, new)))
            slots = self.req_to_token[forward_batch.req_pool_indices.long(), :longest]
            self.forward_metadata = NewTokens(slots, computed, new, self.page_size)

    def _decodes(self, requests: int, length: int) -> Decodes:
        device = self.req_to_token.device
        columns = -(-length // self.page_size)
        table = torch.zeros(requests, columns, dtype=torch.int32, device=device)
        return Decodes(table, torch.zeros_like(table[:, 0]))

    def _fill(self, forward_batch: Any) -> None:
        """Read the tables and lengths of the engine."""
        assert isinstance(self.forward_metadata, Decodes)
        rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        fill_pages(self.forward_metadata, self.page_size, self.req_to_token, rows, seq_lens)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what the graphs of decoding read at each replay."""
        check_kernels(self.pool)
        self.graph_decodes = self._decodes(max_bs, self.req_to_token.shape[1])

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        mode = forward_batch.forward_mode
        if not mode.is_decode():
            raise NotImplementedError(
                f"`forward_mode` {mode.name} in a CUDA graph is not served by spattention"
            )
        assert self.graph_decodes is not None
        table, seq_lens = self.graph_decodes.block_table, self.graph_decodes.seq_lens
        requests = forward_batch.batch_size
        self.forward_metadata = Decodes(table[:requests], seq_lens[:requests])

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Captured: each replay reads the tables and lengths again."""
        self._fill(forward_batch)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1  # of requests that only pad: their one token is in the slot that SGLang keeps free

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> Tensor:
        """`[T, H * D]` of all new tokens."""
        assert isinstance(self.forward_metadata, NewTokens)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        bands = self._bands(layer)
        return attend_new_tokens(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.pool.get_key_buffer(layer.layer_id),
            self.pool.get_value_buffer(layer.layer_id),
            self.forward_metadata,
            bands.pattern,
            scale=layer.scaling,
            sinks=bands.sinks,
        ).flatten(1)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> Tensor:
        """`[B, H * D]` of the newest token of each request."""
        assert isinstance(self.forward_metadata, Decodes)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        bands = self._bands(layer)
        return attend_newest_token(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.pool.get_key_buffer(layer.layer_id),
            self.pool.get_value_buffer(layer.layer_id),
            self.forward_metadata,
            self.page_size,
            bands.pattern,
            scale=layer.scaling,
            sinks=bands.sinks,
        ).flatten(1)

    def _save(
        self, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any, save: bool
    ) -> None:
        """Write new keys and values into the pool, before anything is read."""
        if save and k is not None and v is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)

    def _bands(self, layer: Any) -> LayerBands:
        """The bands of a layer; those of dense attention for a layer without a pattern."""
        found: LayerBands | None = getattr(layer, "bands", None)
        if found is None:
            dense = BandPattern.dense(layer.tp_q_head_num, self.req_to_token.shape[1])
            found = layer.bands = LayerBands(dense, None)
        return found


def check_pool(model_runner: Any) -> None:
    """SGLang's pool keeps keys and values as they are; raises `ValueError` for other pools."""
    pool = model_runner.token_to_kv_pool
    if type(pool) is not MHATokenToKVPool:
        raise ValueError(
            "`token_to_kv_pool` must be SGLang's MHATokenToKVPool for spattention: no MLA, no "
            "pool of sliding windows, no quantized, hybrid, unified or offloaded pool; got "
            f"{type(pool).__name__}"
        )
    is_plain = pool.dtype.is_floating_point and pool.dtype.itemsize >= 2
    if not is_plain or pool.is_quantized_kv_cache:
        raise ValueError(
            "`kv_cache_dtype` must be float16, bfloat16 or float32 for spattention, which reads "
            f"keys and values unquantized, got {pool.dtype}"
        )
    model_dtype = model_runner.model_config.dtype
    if pool.dtype != model_dtype:
        raise ValueError(
            f"`kv_cache_dtype` must be the model's {model_dtype} for spattention, got {pool.dtype}"
        )
    if pool.kv_cache_layout != "nhd":
        raise ValueError(
            "`kv_cache_layout` of SGLang's pool must be 'nhd' for spattention, got "
            f"{pool.kv_cache_layout!r}"
        )


def check_kernels(pool: Any) -> None:
    """CUDA graphs need kernels, since gathering copies the pool; raises `ValueError`."""
    query = torch.empty(1, pool.head_dim, dtype=pool.dtype, device=pool.device)
    value = torch.empty(1, pool.v_head_dim, dtype=pool.dtype, device=pool.device)
    if kernels_for(query, value) is None:
        raise ValueError(
            f"`disable_decode_cuda_graph` must be set for spattention with head_dim "
            f"{pool.head_dim} and {pool.dtype} on {pool.device}, for which it has no kernels"
        )
