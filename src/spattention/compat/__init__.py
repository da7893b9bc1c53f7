"""Private symbols of other libraries, each under a name of our own; no other file names them.

A symbol has a line that says why nothing public will do. `tests/test_compat.py` checks that each
one exists, and `tests/test_house.py` that none is named elsewhere.
"""
