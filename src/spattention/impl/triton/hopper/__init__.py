"""Kernels in Gluon for Hopper GPUs (compute capability 9.0).

They cover training and the first pass over a prompt: half precision, head_dim 64 or 128, packed
documents or queries from position 0, with left padding or not, and rows of documents by their first
keys. The gradients of a long prefix's keys and values are those of `portable/prefix_gradient.py`.
`plan` tells how they run a call, or None.

Packed documents share tensors that TMA reads in whole blocks. Blocks of keys therefore start at
their document's first key or later, and what a block holds of another document, or of keys that no
query sees, is zeroed in shared memory before a product reads it.

Reading order: `planning.py`, `pipeline.py`, `forward.py`, `prefix.py`, `forward_persistent.py`,
`forward_queue.py`, `forward_work.py`, `forward_consumer.py`, `backward_preprocess.py`,
`backward.py`, `fused_backward.py`, `query_sums.py`, `documents.py`, `launch.py`.
"""

from functools import cache
from types import ModuleType

from .planning import HopperLaunches, HopperPlan, TileOrder, plan, refusal

__all__ = ["HopperLaunches", "HopperPlan", "TileOrder", "kernels", "plan", "refusal"]


@cache
def kernels() -> ModuleType:
    """The module `launch`, for calls that have a plan: another Triton may not import it."""
    from . import launch

    return launch
