"""The mechanism under every loss, which knows none of them.

op.py          an op: its schema, its backends, and which of them a call gets
structs.py     NamedTuples in an op's functions, their fields one by one in its schema
autograd.py    what an op keeps for its backward, the backward, double backward
plans.py       what a launcher of kernels does on the host, decided once for each signature
backends.py    which backends there are, which one is forced, and why one is missing
gpus.py        which GPUs the Triton kernels serve, and what is known of each kind
checks.py      checks of arguments, each with the argument's name in its error
reduction.py   reductions, with weights of rows or without, and the dtype of a loss
explanation.py which backend computes a call, and why
warming.py     what a loss needs, compiled before training
scaled_sum.py  a loss's mean as one op: an op's sums, times factors, added up in one more launch
weighted_sum.py  a weighted sum of numbers on a GPU as one op
module.py      the module form of a loss
traced.py      floats that change from call to call of a compiled function
entry.py       what every public function does first: other libraries' names for its arguments
inference.py   tensors made under torch.inference_mode, as arguments
kernels/       what the Triton kernels of the families share
"""

from .autograd import transformed
from .backends import BACKENDS, backend_report, is_forced, is_interpreting, use_backend
from .explanation import explain
from .module import Loss
from .op import Op
from .reduction import check_not_empty, check_reduction, full_precision, reduce, reduce_rows, result_dtype, row_shares
from .warming import warmup

__all__ = [
    "BACKENDS",
    "Loss",
    "Op",
    "backend_report",
    "check_not_empty",
    "check_reduction",
    "explain",
    "full_precision",
    "is_forced",
    "is_interpreting",
    "reduce",
    "reduce_rows",
    "result_dtype",
    "row_shares",
    "transformed",
    "use_backend",
    "warmup",
]
