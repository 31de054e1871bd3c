"""The benchmarks' own arithmetic.

test_benchmarks.py  commands, tables, pictures, checks
test_measure.py     times, counts, memory and limits
"""
