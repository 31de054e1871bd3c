"""info_nce's InfoNCE and its drop-in."""

from __future__ import annotations

import pytest
import torch

from fastloss.compat import _common
from tests.compat.tools import Draws

theirs = pytest.importorskip("info_nce")
from fastloss.compat import info_nce as ours  # noqa: E402


def test_info_nce():
    for draw in Draws(60):
        rows, dim, count = draw.size(9, 32), draw.size(8, 40), draw.size(1, 20)
        tensors, mode = [draw.normal(rows, dim), draw.normal(rows, dim)], draw.one_of("paired", "unpaired")
        if draw.one_of(True, True, False):
            tensors.append(draw.normal(*((rows, count, dim) if mode == "paired" else (count, dim))))
        options = {
            "temperature": draw.one_of(0.07, 0.1, 1.0),
            "reduction": draw.one_of("mean", "sum", "none"),
            "negative_mode": mode,
        }
        if draw.one_of(True, False):
            draw.compare(ours.info_nce, theirs.info_nce, tensors, **options)
        else:
            draw.compare(ours.InfoNCE(**options), theirs.InfoNCE(**options), tensors)


def test_a_learned_temperature():
    for draw in Draws(12):
        tensors = [draw.normal(12, 16), draw.normal(12, 16), draw.number(0.2)]
        pair = [lambda q, k, t, f=module.info_nce: f(q, k, temperature=t) for module in (ours, theirs)]
        draw.compare(*pair, tensors)


def test_a_temperature_for_each_row_is_info_nces():
    for draw in Draws(4):
        tensors = [draw.normal(12, 16), draw.normal(12, 16), 0.1 + draw.uniform(12, 1)]
        pair = [lambda q, k, t, f=module.info_nce: f(q, k, temperature=t) for module in (ours, theirs)]
        draw.compare(*pair, tensors, quiet=False)


def test_attributes_and_errors():
    loss = ours.InfoNCE(0.3, negative_mode="paired")
    assert isinstance(loss, theirs.InfoNCE) and (loss.temperature, loss.reduction) == (0.3, "mean")
    _common._said.clear()
    q = torch.randn(4, 8)
    wrong = [(q[0], q), (q, q[:2]), (q, q[:, :4]), (q, q, q[None]), (q, q, q[:, :4]), (q, q[0])]
    for args in wrong:
        with pytest.raises(ValueError) as found:
            ours.info_nce(*args)
        with pytest.raises(ValueError) as wanted:
            theirs.info_nce(*args)
        assert str(found.value) == str(wanted.value)


def test_compiled_whole():
    """What fastloss computes, and what goes on to info_nce, in one graph each."""
    q, k = torch.randn(4, 8), torch.randn(4, 8)
    for options in ({"temperature": 0.2}, {"temperature": torch.full((4, 1), 0.2)}):
        compiled = torch.compile(ours.InfoNCE(**options), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k), theirs.InfoNCE(**options)(q, k))
