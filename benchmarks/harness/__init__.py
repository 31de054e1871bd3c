"""How the benchmarks measure.

measure.py       the machine: clocks, counts, peaks, ceilings, the limit of memory
session.py       an item with all its providers: checked, timed, made into rows
errors.py        every provider's error against float64
memory.py        peaks on the CPU, asked of a child process
memory_child.py  that process
progress.py      where a run stands
results.py       the result files
"""
