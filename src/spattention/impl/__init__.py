"""Implementations of band attention, one module each; they never import one another.

Each has three functions of one form. The first takes an `AttentionCall` (`attention_call.py`), the
others a `Part` (`partial.py`), and write into tensors that they are given:

    attend(call)        (out, lse), recorded for autograd
    attend_part         the same over a part of the keys, without sinks and without a graph, joined
                        on request to what is there
    differentiate_part  gradients of query, key and value that these keys give to attention over
                        more keys, given the `WholeResults` of all
"""
