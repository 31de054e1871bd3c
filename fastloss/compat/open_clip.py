"""open_clip's losses: ClipLoss, CoCaLoss, DistillClipLoss and SigLipLoss (open_clip 2.20 to 3.3).

Where open_clip is installed they are subclasses of its classes, with its constructors and methods; else they stand
alone. :func:`fastloss.clip_loss` and :func:`fastloss.siglip_loss` compute them, without the logits. With
``world_size > 1`` SigLIP's texts travel as open_clip sends them, and CLIP's rows as open_clip gathers them; where each
of its ranks makes the loss of the whole batch (``local_loss=False``), a rank makes its own rows' part and the parts are
summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attention_consistency_from_qk
from ..contrastive import clip_loss, info_nce, siglip_loss
from ._common import NotServed, as_theirs, check_not_overridden, check_plain, hands_on, library

_theirs = library("open_clip.loss")
MANY_ROWS = 8192  # whose logits are 256 MiB; a step of distillation holds eight such matrices


class _ClipAlone(nn.Module):
    """What the losses of softmax have of open_clip's where it is not installed: the arguments, and the logits."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        return torch.arange(num_logits, device=device)

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Any, logit_bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        logits = logit_scale * image_features @ text_features.T
        logits = logits if logit_bias is None else logits + logit_bias
        return logits, logits.T


class _CoCaAlone(_ClipAlone):
    def __init__(self, caption_loss_weight: float, clip_loss_weight: float, pad_id: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Any,
        output_dict: bool = False,
    ) -> Any:
        clip = torch.tensor(0, device=logits.device)
        if self.clip_loss_weight:  # super(): the drop-in of ClipLoss, which comes next among CoCaLoss's classes
            clip = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        caption = self.caption_loss_weight * self.caption_loss(logits.mT, labels)
        return {"contrastive_loss": clip, "caption_loss": caption} if output_dict else (clip, caption)


class _DistillAlone(_ClipAlone):
    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return F.cross_entropy(student_logits, teacher_logits.softmax(1))


class _SigLipAlone(nn.Module):
    _loss: Callable[..., Tensor]

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        assert self.dist_impl in ("bidir", "shift", "reduce", "gather")  # the error that open_clip has
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any,
        output_dict: bool = False,
    ) -> Any:
        if self.world_size > 1:
            raise NotImplementedError(
                "open_clip.SigLipLoss: world_size > 1; the library computes that, and is not installed"
            )
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


_Clip: Any = _ClipAlone if _theirs is None else _theirs.ClipLoss
_CoCa: Any = _CoCaAlone if _theirs is None else _theirs.CoCaLoss
_Distill: Any = _DistillAlone if _theirs is None else _theirs.DistillClipLoss
_SigLip: Any = _SigLipAlone if _theirs is None else _theirs.SigLipLoss


def _scalar(name: str, value: Any) -> Any:
    """A number or a one-element tensor; scales and biases of other shapes are open_clip's."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise NotServed(f"{name}: {tuple(value.shape)} numbers, not one")
    return value


class ClipLoss(_Clip):
    """open_clip's ``ClipLoss``, by :func:`fastloss.clip_loss`: the mean cross entropy of both directions.

    The labels are the rows' own numbers: nothing is cached. A `logit_bias` cancels, and gets a gradient of exactly 0.
    """

    @hands_on("open_clip.ClipLoss", None if _theirs is None else _theirs.ClipLoss.forward)
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any = None,
        output_dict: bool = False,
    ) -> Any:
        loss = _contrastive(self, image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


def _contrastive(loss: Any, image: Tensor, text: Tensor, logit_scale: Any, logit_bias: Any = None) -> Tensor:
    check_not_overridden(loss, _Clip, "get_logits", "get_ground_truth")
    check_plain(image, text)
    scale = _scalar("logit_scale", logit_scale)
    value = (
        clip_loss(image, text, logit_scale=scale) if loss.world_size == 1 else _across_ranks(loss, image, text, scale)
    )
    if isinstance(_scalar("logit_bias", logit_bias), Tensor):
        value = value + 0.0 * logit_bias.sum()
    return as_theirs(value, image, text)


def _across_ranks(loss: Any, image: Tensor, text: Tensor, scale: Any) -> Tensor:
    """The loss of all ranks' rows or, with `local_loss`, of this rank's against them, and open_clip's gradients."""
    if not loss.local_loss and not loss.use_horovod and _ranks() == loss.world_size:
        if not loss.gather_with_grad:  # then a rank's rows get their gradient of one loss, not of one on each rank
            image, text = (_Share.apply(side, 1 / loss.world_size) for side in (image, text))
        return clip_loss(image, text, logit_scale=scale, group=torch.distributed.group.WORLD)
    if _theirs is None:
        raise NotServed("world_size > 1: a gathering of open_clip's")
    how = {
        name: getattr(loss, name) for name in ("local_loss", "gather_with_grad", "rank", "world_size", "use_horovod")
    }
    images, texts = _theirs.gather_features(image, text, **how)
    if not loss.local_loss:
        return clip_loss(images, texts, logit_scale=scale)
    own = torch.arange(len(image), device=image.device) + len(image) * loss.rank
    options: dict[str, Any] = {"targets": own, "temperature": 1 / scale, "normalize": False}
    return (info_nce(image, texts, **options) + info_nce(text, images, **options)) / 2


def _ranks() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


class _Share(torch.autograd.Function):
    """A tensor, and a share of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:  # type: ignore[override]
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.share, None


class CoCaLoss(_CoCa, ClipLoss):
    """open_clip's ``CoCaLoss``: the contrastive part by :func:`fastloss.clip_loss`, the caption's as it is there."""


class DistillClipLoss(_Distill, ClipLoss):
    """open_clip's ``DistillClipLoss``: the contrastive part by :func:`fastloss.clip_loss`.

    The distillation compares the logits of student and teacher, [M, M] each, which are made for it. On a CPU, from
    8,192 rows on, it takes :func:`fastloss.attention_consistency_from_qk` instead: slower, and without them.
    """

    @hands_on("open_clip.DistillClipLoss", None if _theirs is None else _theirs.DistillClipLoss.forward)
    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Any,
        output_dict: bool = False,
    ) -> Any:
        contrastive = _contrastive(self, image_features, text_features, logit_scale)
        student = image_features, text_features, logit_scale
        teacher = dist_image_features, dist_text_features, dist_logit_scale
        large = image_features.device.type == "cpu" and len(image_features) >= MANY_ROWS
        if large and self.world_size == 1 and type(self).dist_loss is _Distill.dist_loss:
            distill = as_theirs(_distilled(student, teacher), image_features, text_features)
        else:
            both = zip(self.get_logits(*teacher), self.get_logits(*student), strict=True)
            distill = sum(self.dist_loss(t, s) for t, s in both) / 2
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)


def _distilled(student: tuple[Tensor, Tensor, Any], teacher: tuple[Tensor, Tensor, Any]) -> Tensor:
    """The mean over both directions of the cross entropy of the student's softmax under the teacher's: the divergence
    of the two, and the teacher's entropy, which is log M less its divergence from equal shares."""
    total: Any = 0.0
    rows = student[0].shape[0]
    for one, other in ((0, 1), (1, 0)):
        q1, k1, q2, k2 = (
            t.to(torch.promote_types(t.dtype, torch.float32))[None, None]
            for t in (teacher[one] * teacher[2], teacher[other], student[one] * student[2], student[other])
        )
        none = q1.new_zeros(1, 1, rows, 1)
        entropy = math.log(rows) - attention_consistency_from_qk(q1, k1, none, none, metric="kl", scale=1.0)
        total = total + entropy + attention_consistency_from_qk(q1, k1, q2, k2, metric="kl", scale=1.0)
    return total / 2


class SigLipLoss(_SigLip):
    """open_clip's ``SigLipLoss``, by :func:`fastloss.siglip_loss`."""

    @hands_on("open_clip.SigLipLoss", None if _theirs is None else _theirs.SigLipLoss._loss)
    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any = None,
        negative_only: bool = False,
    ) -> Tensor:
        if _theirs is not None:
            check_not_overridden(self, _SigLip, "get_logits", "get_ground_truth")
        check_plain(image_features, text_features)
        scale, bias = _scalar("logit_scale", logit_scale), _scalar("logit_bias", logit_bias)
        value = siglip_loss(
            image_features, text_features, logit_scale=scale, logit_bias=bias, negative_only=negative_only
        )
        return as_theirs(value, image_features, text_features)


SWAPS = {
    "open_clip.loss.ClipLoss": ClipLoss,
    "open_clip.loss.CoCaLoss": CoCaLoss,
    "open_clip.loss.DistillClipLoss": DistillClipLoss,
    "open_clip.loss.SigLipLoss": SigLipLoss,
}
LEFT: dict[str, str] = {}
