"""Several losses as one.

test_composite.py           weights and rules, state, ranks
test_composite_constant.py  a part that is constant for a while
"""
