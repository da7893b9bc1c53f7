"""Measurements that the docs cite; each module runs by `python -m benchmarks.NAME`."""
