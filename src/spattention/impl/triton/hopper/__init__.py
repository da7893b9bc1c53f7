"""Kernels in Gluon for Hopper GPUs (compute capability 9.0).

They cover training and the first pass over a prompt: half precision, head_dim 64 or 128, queries
from position 0, no `key_start`, no packing. The gradients of a prefix's keys and values are those
of `portable/prefix_gradient.py`. `plan` tells how they run a call, or None.

Reading order: `planning.py`, `pipeline.py`, `forward.py`, `forward_persistent.py`,
`backward_preprocess.py`, `backward.py`, `launch.py`.
"""

from .planning import HopperLaunches, HopperPlan, TileOrder, plan, refusal

__all__ = ["HopperLaunches", "HopperPlan", "TileOrder", "plan", "refusal"]
