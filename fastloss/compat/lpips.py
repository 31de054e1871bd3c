"""lpips' LPIPS (lpips 0.1), its head by :func:`fastloss.lpips_distance`.

A subclass of lpips' class, with its constructor, networks, weight files and state_dict. The features of both images and
the gradients of both are as there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..perceptual import lpips_distance
from ._common import NotServed, as_theirs, check_plain, hands_on, required

_theirs = required("lpips")
_LPIPS: Any = _theirs.LPIPS


class LPIPS(_LPIPS):
    """lpips' module: ``LPIPS(net="alex")(in0, in1)``, ``[N, 1, 1, 1]``, or ``[N, 1, H, W]`` with ``spatial=True``.

    In evaluation mode, in which lpips makes it, its linear layers get no gradient: they are constants of the metric. In
    training mode they get one, and what has dropout is lpips' own. A pixel whose features are all 0 gets a gradient of
    0, where lpips' is NaN.
    """

    @hands_on("lpips.LPIPS", _theirs.LPIPS.forward)
    def forward(self, in0: Tensor, in1: Tensor, retPerLayer: bool = False, normalize: bool = False) -> Any:
        check_plain(in0, in1)
        if self.lpips and any(isinstance(m, nn.Dropout) and m.training for m in self.lins.modules()):
            raise NotServed("dropout of the linear layers, in training mode")
        if in0.shape != in1.shape:
            raise NotServed(f"images of {tuple(in0.shape)} and {tuple(in1.shape)}")
        features, targets = (self._features(2 * image - 1 if normalize else image) for image in (in0, in1))
        lins = [lin.model[-1].weight for lin in self.lins] if self.lpips else None
        if lins is not None and not self.training:
            lins = [lin.detach() for lin in lins]
        size: Any = in0.shape[2:] if self.spatial else None
        if not retPerLayer:
            return self._shaped(lpips_distance(features, targets, lins, spatial=self.spatial, size=size), features)
        layers = []
        for i, (feature, target) in enumerate(zip(features, targets, strict=True)):
            lin = None if lins is None else [lins[i]]
            value = lpips_distance([feature], [target], lin, spatial=self.spatial, size=size)
            layers.append(self._shaped(value, features))
        return sum(layers[1:], layers[0]), layers

    def _features(self, image: Tensor) -> list[Tensor]:
        return list(self.net(self.scaling_layer(image) if self.version == "0.1" else image))

    def _shaped(self, value: Tensor, features: list[Tensor]) -> Tensor:
        return as_theirs(value if self.spatial else value.view(-1, 1, 1, 1), *features)


SWAPS = {"lpips.LPIPS": LPIPS}
LEFT: dict[str, str] = {}
