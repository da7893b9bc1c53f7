"""Kernels in Triton for every GPU and every call: `forward.py`, `backward.py`, `launch.py`."""
