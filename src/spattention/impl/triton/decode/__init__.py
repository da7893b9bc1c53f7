"""Kernels in Triton for few queries against many keys: `kernels.py`, `config.py`, `launch.py`,
`op.py`; and `append.py`, which writes new tokens into a `BandStore`.
"""
