"""Implementations of band attention, one module each; they never import one another.

Each has three functions of one form, which take an `AttentionCall` (`attention_call.py`):

    attend(call)                    (out, lse), recorded for autograd
    attend_part(call)               the same over a part of the keys, every one of which some query
                                    sees; without sinks and without a graph
    differentiate_part(call, whole) gradients of query, key and value that these keys give to
                                    attention over more keys, given the `WholeResults` of all
"""
