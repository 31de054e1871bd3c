"""SigLIP's loss over the texts of all ranks, which come piece by piece: one op.

    siglip_of_pieces    with `row_weight` the loss and its gradients in one lap; of rows [m] the backward is a lap

As in the family's op a gradient needs no normaliser: so the texts' gradients go back as soon as a piece is computed,
and the backward only multiplies. `text_ids` and `text_shares` are those of all ranks [B], own ones first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contrastive.save_plan import IMAGE, SCALE_AND_BIAS, TEXT
from ..contrastive.siglip import Inputs, Saved, loss_and_gradients
from ..core import full_precision
from ..core.autograd import _save, _saved
from ..core.structs import flattened
from .agreement import NO_CALL, Call
from .collectives import _op
from .pieces import Route, _blocks, compare, recording


def _siglip_fwd(x: Inputs, route: Route, comparison: Call) -> tuple[Tensor, Saved]:
    compare(comparison, route, x.text)
    loss, saved = _made(x)
    loss.zero_()
    for total in saved:
        total.zero_()
    walk = route.walk(x.text, False)
    needs = 0 if x.row_weight is None else x.needs
    with torch.no_grad(), full_precision(x.image):
        for piece in walk.pieces():
            grads = [walk.home.new_zeros(s.rows.shape) for s in piece]
            for block in _blocks(piece, x.image.shape[0], False, route):
                negative_only = x.negative_only or not (block.own or x.image_shares is not None)
                ids, shares = block.columns(x.text_ids), block.columns(x.text_shares)
                with recording():
                    part, found = loss_and_gradients(
                        x._replace(
                            text=block.keys, text_ids=ids, text_shares=shares, negative_only=negative_only, needs=needs
                        )
                    )
                loss += part
                if needs & IMAGE:
                    saved.image_grad.add_(found.image_grad)
                if needs & SCALE_AND_BIAS:
                    saved.scale_grad.add_(found.scale_grad), saved.bias_grad.add_(found.bias_grad)
                if needs & TEXT:
                    for place, grad in zip(
                        block.places, found.text_grad.split([p.end - p.start for p in block.places]), strict=True
                    ):
                        grads[place.stretch][place.start : place.end] = grad
            if needs & TEXT:
                walk.give(grads)
    return loss, saved._replace(text_grad=walk.gradient() if needs & TEXT else saved.text_grad)


def _made(x: Inputs) -> tuple[Tensor, Saved]:
    needs, like = 0 if x.row_weight is None else x.needs, x.scale
    return like.new_empty(x.image.shape[0] if x.row_weight is None else ()), Saved(
        image_grad=like.new_empty(x.image.shape if needs & IMAGE else (0, x.image.shape[1])),
        text_grad=like.new_empty(x.text.shape if needs & TEXT else (0, x.text.shape[1])),
        scale_grad=like.new_empty(1 if needs & SCALE_AND_BIAS else 0),
        bias_grad=like.new_empty(1 if needs & SCALE_AND_BIAS else 0),
    )


def _siglip_fake(x: Inputs, route: Route, comparison: Call) -> tuple[Tensor, Saved]:
    return _made(x)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _save(ctx, [*inputs, *output[1:]])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    none = [None] * len(ctx.needs_input_grad)
    if grad is None:
        return tuple(none)
    values = _saved(ctx)
    count = len(Inputs._fields)
    x, saved = Inputs(*values[:count]), Saved(*values[-len(Saved._fields) :])
    wanted = {name: ctx.needs_input_grad[Inputs._fields.index(name)] for name in ("image", "text", "scale", "bias")}
    if x.row_weight is None:
        needs = IMAGE * wanted["image"] + TEXT * wanted["text"] + SCALE_AND_BIAS * (wanted["scale"] or wanted["bias"])
        again = x._replace(row_weight=grad.contiguous(), needs=needs)
        route = values[count : count + len(Route._fields)]
        with torch.no_grad():
            saved = Saved(*siglip_of_pieces(*again, *route, *NO_CALL)[1:])
        grad = grad.new_ones(())
    found = {name: getattr(saved, f"{name}_grad") * grad for name, flag in wanted.items() if flag}
    return *[found[n].to(getattr(x, n).dtype) if n in found else None for n in Inputs._fields], *none[count:]


siglip_of_pieces = _op("siglip_of_pieces", flattened(_siglip_fwd), flattened(_siglip_fake), _backward, _setup)
