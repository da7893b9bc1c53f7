"""Timing, competitors and results files of `spattention bench` and of benchmarks/."""
