"""How large the numbers are that cancel in the gradients of normalised embeddings of width 1, which are exactly 0.

A row x of unit vector u = x / |x| has the gradient (v - <v, u> u) / |x|, v that by u. In one dimension both terms are
equal and what is left is their rounding, eps |v| / |x|, which no relative error knows. The second gradient, of a
product with the numbers w, has in the same way terms of the size of the second gradient by u over two lengths, and of
v w over two lengths, since the projection and 1 / |x| are differentiated too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from unittest import mock

import torch
from torch import Tensor

from tests.fuzz.draw import Call
from tests.fuzz.outcome import run

W = 4.0  # the largest of the normal numbers that the gradients are multiplied with, about


def _unit(args: tuple) -> tuple:
    def one(x: object) -> object:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.nn.functional.normalize(x.detach(), dim=-1).requires_grad_(x.requires_grad)

    return tuple(one(x) for x in args)


def _largest(outcome: list[tuple[str, Tensor]], kind: str) -> float:
    of_kind = [t.detach().abs().max().item() for name, t in outcome if name.startswith(kind) and t.numel()]
    return max(of_kind, default=0.0)


def cancelled(call: Call, index: int, exact: Tensor) -> float | None:
    """The size of what cancels in output `index` of the call, whose exact value is noise around 0; None where it is
    another kind of output, or no noise."""
    lengths: list[Tensor] = []

    def measured(args: tuple) -> tuple:
        found = [x for x in args if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and x.shape[-1] == 1]
        lengths.extend(x.detach().abs().flatten() for x in found)
        return _unit(args)

    with contextlib.ExitStack() as stack:
        for name in ("info_nce", "nt_xent"):  # the vectors are of unit length, as a debiased loss demands
            module = sys.modules[f"fastloss.contrastive.{name}"]
            stack.enter_context(mock.patch.object(module, "check_sampling", lambda *_: None))
        plain = run(dataclasses.replace(call, options=call.options | {"normalize": False}), "exact", measured)
    if plain.error is not None or not lengths or len(plain.tensors) <= index:
        return None
    name = plain.tensors[index][0]
    all_lengths = torch.cat(lengths)
    some = all_lengths[all_lengths > 0]
    if not some.numel() or not name.startswith(("gradient", "second")):
        return None
    least, first = some.min().item(), _largest(plain.tensors, "gradient")
    size = first / least if name.startswith("gradient") else (_largest(plain.tensors, "second") + W * first) / least**2
    noise = 64 * torch.finfo(torch.float64).eps * size
    return size if (exact.detach().abs().nan_to_num(0.0) <= noise).all() else None
