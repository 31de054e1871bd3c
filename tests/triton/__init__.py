"""Triton without a GPU.

interpreter.py           a plugin that mends Triton's interpreter: bfloat16, addresses, time
aot.py                   every launch compiled for GPUs that are not here, and what came out
fake_driver.py           a driver without a device
element_count_kernel.py  a kernel that says how many elements others count
test_aot.py              launches compiled, and the tests of kernels interpreted, in processes of their own
compilations.py          how many kernels a step compiles, counted over a stub driver
test_compilations.py     those of a first step, and of steps of other shapes
test_wide_launches.py    grids and offsets of tensors that no test can hold
"""
