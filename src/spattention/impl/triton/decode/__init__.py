"""Kernels in Triton for few queries against many keys, and for writing tokens into a `BandStore`.

`kernels.py` has the kernel that reads a chunk of keys, on the ground of `storage.py` (where keys
are) and `rows.py` (sums over them); `merge.py` merges chunks. `plan.py` cuts bands into chunks by
the rule of `config.py`; `launch.py` launches, with the counters of `counters.py`, and `op.py`
registers the operators. `append.py` writes.
"""
