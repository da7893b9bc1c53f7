"""How vLLM keeps the blocks of a class of heads: those in the window, and those of the prefix.

vLLM finds the manager of a spec by the spec's class. It learns of this one when this module is
imported, which also happens where a worker's specs are unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class PrefixWindowSpec(SlidingWindowSpec):
    """A sliding window, and the first `prefix` tokens of a request for good."""

    prefix: int

    @property
    def prefix_blocks(self) -> int:
        return -(-self.prefix // self.block_size)

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """The most blocks that a request holds at once."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(window + self.prefix_blocks, -(-max_model_len // self.block_size) + 1)


class PrefixWindowManager(SlidingWindowManager):
    """Frees the blocks between the prefix and the window."""

    def __init__(self, kv_cache_spec: PrefixWindowSpec, **keywords: Any) -> None:
        super().__init__(kv_cache_spec, **keywords)
        self.prefix_blocks = kv_cache_spec.prefix_blocks

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        if request_id not in self.req_to_blocks:
            return
        # vLLM frees backward, down to a block that is gone already.
        blocks = self.req_to_blocks[request_id]
        kept = blocks[: self.prefix_blocks]
        blocks[: len(kept)] = [self.block_pool.null_block] * len(kept)
        super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)
        blocks[: len(kept)] = kept

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *rest: Any,
        **keywords: Any,
    ) -> int:
        found = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *rest, **keywords
        )
        # Blocks of the prefix that are cached and unused stop being free, too.
        kept = self._kept(new_computed_blocks, total_computed_tokens)
        return int(found + sum(block.ref_cnt == 0 and not block.is_null for block in kept))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            num_local_computed_tokens,
            num_external_computed_tokens,
        )
        tokens = num_local_computed_tokens + num_external_computed_tokens
        kept = self._kept(new_computed_blocks, tokens)
        if kept:
            self.block_pool.touch(kept)
            self.req_to_blocks[request_id][: len(kept)] = kept

    def _kept(self, blocks: Sequence[KVCacheBlock], computed_tokens: int) -> list[KVCacheBlock]:
        """The blocks of the prefix among those that a sliding window alone would skip."""
        skipped = self.get_num_skipped_tokens(computed_tokens) // self.block_size
        return list(blocks[: min(self.prefix_blocks, skipped)])

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **worlds: int,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prompt start whose window is cached, and whose prefix is too."""
        found, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            **worlds,
        )
        hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size
        )
        for index in range(min(kv_cache_spec.prefix_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if cached is None:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, cached):
                blocks[index] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, *rest: Any, kv_cache_spec: Any, **keywords: Any
    ) -> list[bool] | None:
        """The blocks that a later request can use; those of the prefix always are."""
        mask = super().reachable_block_mask(
            start_block, end_block, *rest, kv_cache_spec=kv_cache_spec, **keywords
        )
        if mask is not None:
            kept = min(kv_cache_spec.prefix_blocks, end_block) - start_block
            mask[: max(kept, 0)] = [True] * max(kept, 0)
        return mask


# vLLM registers its own specs on first use, but only while there are no others.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
KVCacheSpecRegistry.register(
    PrefixWindowSpec, PrefixWindowManager, uniform_type_base_spec=SlidingWindowSpec
)
