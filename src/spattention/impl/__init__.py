"""Implementations of band attention, one module each; they never import one another.

Each has two functions of one form:

    attend(query, key, value, pattern, *, scale, sinks, query_start, key_start, deterministic)
    attend_varlen(query, key, value, pattern, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, *, scale, sinks, deterministic)

They take checked arguments (`checks.py`), with `scale` a float and `query_start` an int or an int32
tensor `[]` or `[B]`, and return `(out, lse)`.
"""
