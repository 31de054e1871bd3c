"""Every loss through every check.

case.py                   a row: what a loss is, and all that the checks need to know of it
cases/                    the rows
tools.py                  running a row anywhere, and the one rule of accuracy
eager_contrastive.py      contrastive losses in plain torch, written independently
spellings.py              each option in each spelling that is taken
test_every_loss.py        values and gradients, dtypes, layouts, compile, opcheck, double backward
test_edges.py             axes of no elements, weights of 0, NaN that must arrive
test_options.py           each option alone, on kernels and reference
test_arguments.py         every argument in each spelling, and in nonsense
test_module_arguments.py  the same of what has no row
test_changing_floats.py   floats that change between calls of a compiled function
test_properties.py        shapes, strides and values that hypothesis draws
test_gpu.py               what only a device can show
"""
