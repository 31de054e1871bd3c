"""Random rounding: the float64 reference as if every operation's result were rounded, at random, to a narrower dtype.

The change of the result is how much an eager formula in that dtype loses, whatever it happens to lose on one input,
where it may be exact by luck (Monte Carlo arithmetic: Parker, Pierce, Eggert, 2000).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROUNDED = frozenset(
    "add sub rsub mul div pow sqrt rsqrt reciprocal exp exp2 expm1 log log1p log2 sigmoid softplus softplus_backward "
    "log_sigmoid_forward log_sigmoid_backward sigmoid_backward addcmul addcdiv square lerp prod upsample_bilinear2d "
    "upsample_bilinear2d_backward huber_loss smooth_l1_loss mse_loss _cdist_forward".split()
)
SUMS = frozenset(  # many roundings inside: of their terms too
    "sum mean mm bmm addmm baddbmm mv dot convolution convolution_backward _softmax _log_softmax logsumexp cumsum "
    "_softmax_backward_data _log_softmax_backward_data linalg_vector_norm norm avg_pool2d "
    "avg_pool2d_backward var".split()
)


class RandomRounding(TorchDispatchMode):
    """Inside the block float64 results are off by up to half an `eps` of themselves: each by its own share, or, as
    equal numbers round `alike`, all of an operation by one."""

    def __init__(self, eps: float, seed: int, alike: bool = False) -> None:
        super().__init__()
        self.eps, self.alike, self.generator = eps, alike, torch.Generator().manual_seed(seed)

    def _rounded(self, t: Tensor) -> Tensor:
        if t.dtype != torch.float64 or not t.numel():
            return t
        shape = () if self.alike else t.shape
        return t * (1 + self.eps * (torch.rand(shape, generator=self.generator, dtype=torch.float64) - 0.5))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        if name in SUMS:
            args = tree_map_only(Tensor, self._rounded, args)
        out = func(*args, **kwargs)
        if name in SUMS or name in ROUNDED:
            return tree_map_only(Tensor, self._rounded, out)
        if name[-1] == "_" and name[:-1] in ROUNDED and isinstance(out, Tensor) and out.dtype == torch.float64:
            out.copy_(self._rounded(out))
        return out
