"""pytorch_msssim's ssim, ms_ssim, SSIM and MS_SSIM (version 1.0), by fastloss's SSIM and MS-SSIM losses.

They return the similarity, 1 minus the loss, of images ``[N, C, H, W]`` or volumes ``[N, C, D, H, W]``. Windows of
one's own, and images that the window does not fit into (which pytorch_msssim filters along their other sides alone)
are its own code's. Where it is installed the modules are subclasses of its classes; else they stand alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..image import ms_ssim_loss, ssim_loss
from ._common import NotServed, as_theirs, check_plain, hands_on, library

_theirs = library("pytorch_msssim")
_HALVINGS = 4  # of ms_ssim, by which it judges sizes however many weights there are
_K = (0.01, 0.03)


@hands_on("pytorch_msssim.ssim", None if _theirs is None else _theirs.ssim)
def ssim(
    X: Tensor,
    Y: Tensor,
    data_range: float = 255,
    size_average: bool = True,
    win_size: int = 11,
    win_sigma: float = 1.5,
    win: Tensor | None = None,
    K: Sequence[float] = _K,
    nonnegative_ssim: bool = False,
) -> Tensor:
    """SSIM of whole windows: the mean over the batch, or ``[N]`` without `size_average`; in the dtype of `X`.

    With `nonnegative_ssim` a channel's mean counts as 0 where it is negative.
    """
    _check(X, Y, win)
    k1, k2 = K
    options: dict[str, Any] = dict(
        window=win_size, sigma=win_sigma, data_range=data_range, padding="valid", k1=k1, k2=k2
    )
    if nonnegative_ssim:
        planes = [image.flatten(0, 1).unsqueeze(1) for image in (X, Y)]
        channels = torch.relu(1 - ssim_loss(*planes, reduction="none", **options)).view(X.shape[:2])
        values = channels.mean() if size_average else channels.mean(1)
    else:
        values = 1 - ssim_loss(X, Y, reduction="mean" if size_average else "none", **options)
    return as_theirs(values, X)


@hands_on("pytorch_msssim.ms_ssim", None if _theirs is None else _theirs.ms_ssim)
def ms_ssim(
    X: Tensor,
    Y: Tensor,
    data_range: float = 255,
    size_average: bool = True,
    win_size: int = 11,
    win_sigma: float = 1.5,
    win: Tensor | None = None,
    weights: Sequence[float] | None = None,
    K: Sequence[float] = _K,
) -> Tensor:
    """MS-SSIM of whole windows: the mean over the batch, or ``[N]`` without `size_average`; in the dtype of `X`."""
    _check(X, Y, win)
    k1, k2 = K
    if min(X.shape[-2:]) <= (win_size - 1) * 2**_HALVINGS:
        raise NotServed(f"images of {tuple(X.shape[2:])} pixels are too small")
    if weights is not None and (isinstance(weights, Tensor) or 0 in weights):
        raise NotServed("weights: a tensor, or one of them is 0")
    levels: dict[str, Any] = {} if weights is None else {"level_weights": weights}
    loss = ms_ssim_loss(
        X, Y, window=win_size, sigma=win_sigma, data_range=data_range, padding="valid", k1=k1, k2=k2,
        reduction="mean" if size_average else "none", **levels,
    )  # fmt: skip
    return as_theirs(1 - loss, X)


def _check(X: Tensor, Y: Tensor, win: Tensor | None) -> None:
    check_plain(X, Y)
    if win is not None:
        raise NotServed("win: a window of one's own")
    if X.ndim not in (4, 5) or 1 in X.shape[2:]:
        raise NotServed(f"expected images [N, C, H, W] or volumes [N, C, D, H, W], got {tuple(X.shape)}")


class _Module(nn.Module):
    """What both modules have of pytorch_msssim's: its attributes, and the window's sigma beside the window."""

    def __init__(
        self,
        data_range: float,
        size_average: bool,
        win_size: int,
        win_sigma: float,
        shape: list[int],
        K: Sequence[float],
    ) -> None:
        nn.Module.__init__(self)
        self.win_size = win_size
        self.win_sigma = win_sigma
        offsets = torch.arange(win_size, dtype=torch.float) - win_size // 2
        self.win = torch.softmax(-(offsets**2) / (2 * win_sigma**2), 0).repeat(shape)
        self.size_average = size_average
        self.data_range = data_range
        self.K = K


_SSIM: Any = nn.Module if _theirs is None else _theirs.SSIM
_MS_SSIM: Any = nn.Module if _theirs is None else _theirs.MS_SSIM


class SSIM(_Module, _SSIM):
    """pytorch_msssim's module, see :func:`ssim`. `channel` is not looked at: any number of channels will do."""

    def __init__(
        self,
        data_range: float = 255,
        size_average: bool = True,
        win_size: int = 11,
        win_sigma: float = 1.5,
        channel: int = 3,
        spatial_dims: int = 2,
        K: Sequence[float] = _K,
        nonnegative_ssim: bool = False,
    ) -> None:
        super().__init__(data_range, size_average, win_size, win_sigma, [channel, 1] + [1] * spatial_dims, K)
        self.nonnegative_ssim = nonnegative_ssim

    def forward(self, X: Tensor, Y: Tensor) -> Tensor:
        window: dict[str, Any] = dict(win_size=self.win_size, win_sigma=self.win_sigma)
        return ssim(
            X, Y, self.data_range, self.size_average, K=self.K, nonnegative_ssim=self.nonnegative_ssim, **window
        )


class MS_SSIM(_Module, _MS_SSIM):
    """pytorch_msssim's module, see :func:`ms_ssim`. `channel` is not looked at: any number of channels will do."""

    def __init__(
        self,
        data_range: float = 255,
        size_average: bool = True,
        win_size: int = 11,
        win_sigma: float = 1.5,
        channel: int = 3,
        spatial_dims: int = 2,
        weights: Sequence[float] | None = None,
        K: Sequence[float] = _K,
    ) -> None:
        super().__init__(data_range, size_average, win_size, win_sigma, [channel, 1] + [1] * spatial_dims, K)
        self.weights = weights

    def forward(self, X: Tensor, Y: Tensor) -> Tensor:
        window: dict[str, Any] = dict(win_size=self.win_size, win_sigma=self.win_sigma)
        return ms_ssim(X, Y, self.data_range, self.size_average, weights=self.weights, K=self.K, **window)


SWAPS = {
    "pytorch_msssim.ssim": ssim,
    "pytorch_msssim.ms_ssim": ms_ssim,
    "pytorch_msssim.SSIM": SSIM,
    "pytorch_msssim.MS_SSIM": MS_SSIM,
}
LEFT: dict[str, str] = {}
