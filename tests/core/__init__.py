"""The mechanism under the losses.

test_op.py               ops, reductions, the module form, docstrings, imports without what is optional
test_structs.py          NamedTuples in the functions of an op
test_backends.py         which backend is forced, where and when
test_gpus.py             which GPUs the Triton kernels serve, and the reference on others
test_missing_kernels.py  installations without the C++ kernels
test_cpp.py              what all C++ kernels share: instruction sets, threads, the stable ABI
test_matmul.py           the CPU's products of bfloat16
test_scaled_sum.py       sums times factors in one launch
test_interrupt.py        Ctrl-C in a long call
test_warmup.py           what a warm-up leaves as it was
"""
