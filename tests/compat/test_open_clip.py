"""open_clip's losses and their drop-ins."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from fastloss.compat import _common
from tests.compat.tools import Draws

theirs = pytest.importorskip("open_clip.loss")
from fastloss.compat import open_clip as ours  # noqa: E402


def features(draw, count=2):
    rows, dim = draw.size(9, 32), draw.size(8, 40)
    return [torch.nn.functional.normalize(draw.normal(rows, dim).float(), dim=1).to(draw.dtype) for _ in range(count)]


def test_clip_loss():
    for draw in Draws(48):
        options = {"cache_labels": draw.one_of(True, False), "local_loss": draw.one_of(True, False)}
        tensors, frozen = [*features(draw), draw.number(1.0, 14.3, 100.0)], 0
        if draw.one_of(True, False):  # its gradient is 0, and in theirs the rounding of a sum
            tensors, frozen = [*tensors, draw.number(-3.0)], 1
        pair = [module.ClipLoss(**options) for module in (ours, theirs)]
        draw.compare(*pair, tensors, frozen=frozen, output_dict=draw.one_of(True, False))


def test_siglip_loss():
    for draw in Draws(48):
        options = {"cache_labels": draw.one_of(True, False), "dist_impl": draw.one_of(None, "gather", "shift")}
        pair = [module.SigLipLoss(**options) for module in (ours, theirs)]
        tensors = [*features(draw), draw.number(1.0, 10.0), draw.number(-10.0, 0.0)]
        draw.compare(*pair, tensors, output_dict=draw.one_of(True, False))


def test_coca_loss():
    for draw in Draws(24):
        tensors = features(draw)
        rows, words, tokens = len(tensors[0]), draw.size(1, 5), draw.size(2, 7)
        logits, labels = draw.normal(rows, words, tokens), draw.integers(tokens - 1, rows, words) + 1
        weights = {"caption_loss_weight": 2.0, "clip_loss_weight": draw.one_of(0.0, 1.0, 0.5)}
        pair = [module.CoCaLoss(**weights) for module in (ours, theirs)]
        draw.compare(*pair, [*tensors, logits, labels, draw.number(14.3)], output_dict=draw.one_of(True, False))


def test_distill_clip_loss():
    for draw in Draws(24):
        image, text, teacher_image, teacher_text = features(draw, 4)
        tensors = [image, text, draw.number(14.3), teacher_image, teacher_text, draw.number(10.0)]
        pair = [module.DistillClipLoss() for module in (ours, theirs)]
        draw.compare(*pair, tensors, output_dict=draw.one_of(True, False))


def test_distillation_of_many_rows_makes_no_logits(monkeypatch):
    monkeypatch.setattr(ours, "MANY_ROWS", 1)
    made = []
    distilled = ours._distilled
    monkeypatch.setattr(ours, "_distilled", lambda *both: made.append(distilled(*both)) or made[-1])
    for draw in Draws(8):
        image, text, teacher_image, teacher_text = features(draw, 4)
        tensors = [image, text, draw.number(14.3), teacher_image, teacher_text, draw.number(10.0)]
        pair = [module.DistillClipLoss() for module in (ours, theirs)]
        draw.compare(*pair, tensors, output_dict=draw.one_of(True, False))
    assert len(made) >= 8


def test_a_bias_cancels():
    bias = torch.tensor(-3.0, requires_grad=True)
    ours.ClipLoss()(torch.randn(4, 8), torch.randn(4, 8), 10.0, bias).backward()
    assert bias.grad is not None and bias.grad.item() == 0


def test_they_are_open_clips_own_classes():
    for name in ("ClipLoss", "SigLipLoss", "DistillClipLoss"):
        mine, other = getattr(ours, name)(cache_labels=True), getattr(theirs, name)(cache_labels=True)
        assert isinstance(mine, getattr(theirs, name)) and mine.state_dict() == {}
        assert {k: v for k, v in vars(other).items() if k[0] != "_"}.items() <= vars(mine).items()
        for other in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)):
            assert type(other) is type(mine) and other.cache_labels
    assert isinstance(ours.CoCaLoss(1.0, 1.0), ours.ClipLoss)
    with pytest.raises(AssertionError):
        ours.SigLipLoss(dist_impl="no such")


def test_a_numbers_scale_and_autocast():
    image, text = torch.randn(5, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for scale in (3.0, torch.tensor(3.0)):
            mine, other = ours.ClipLoss()(image, text, scale), theirs.ClipLoss()(image, text, scale)
            assert mine.dtype == other.dtype == torch.float32
            torch.testing.assert_close(mine, other, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("local_loss", [False, True])
def test_several_processes(name, local_loss, monkeypatch):
    """What open_clip sends and gathers, whatever that does; with real ranks: tests/distributed/drop_ins.py."""
    image, text, bias = torch.randn(4, 8), torch.randn(4, 8), torch.tensor(-1.0)
    monkeypatch.setattr(theirs, "gather_features", lambda i, t, **options: (torch.cat((t, i)), torch.cat((i, t))))
    monkeypatch.setattr(theirs, "neighbour_exchange_with_grad", lambda left, right, tensor, group=None: tensor + 1)
    options = {"local_loss": local_loss} if name == "ClipLoss" else {}
    mine, other = (getattr(module, name)(rank=1, world_size=2, **options) for module in (ours, theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(mine(image, text, 5.0, bias), other(image, text, 5.0, bias))


def test_a_subclass_with_logits_of_its_own_keeps_them():
    class Doubled(ours.ClipLoss):
        def get_logits(self, *args, **options):
            return [2 * logits for logits in super().get_logits(*args, **options)]

    image, text = torch.randn(4, 8), torch.randn(4, 8)
    _common._said.clear()
    with pytest.warns(UserWarning, match="Doubled has its own get_logits"):
        found = Doubled()(image, text, 1.0)
    torch.testing.assert_close(found, theirs.ClipLoss()(image, text, 2.0))


def test_what_open_clip_refuses_or_spreads():
    """Errors are open_clip's own, and so is a loss of scales per row, or of a negative one."""
    image, text = torch.randn(4, 8), torch.randn(4, 8)
    _common._said.clear()
    with pytest.raises(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.ClipLoss()(image, torch.randn(4, 7), 1.0)
    with pytest.warns(UserWarning, match="logit_scale"):
        found = ours.ClipLoss()(image, text, torch.full((4, 1), 2.0))
    torch.testing.assert_close(found, theirs.ClipLoss()(image, text, 2.0))
    assert torch.equal(ours.ClipLoss()(image, text, -2.0), theirs.ClipLoss()(image, text, -2.0))
