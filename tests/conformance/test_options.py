"""Each option alone, in each spelling that the API allows, on kernels and reference: see spellings.py."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastloss import core
from tests.conformance.cases import CASES, Case, Draw
from tests.conformance.spellings import SHAPES, SPELLINGS
from tests.conformance.tools import (
    INTERPRETING,
    Errors,
    cast,
    first,
    leaves,
    places,
    reductions,
    to_device,
    with_reduction,
)

BY_NAME = {case.name: case for case in CASES}


def rows() -> list[Any]:
    found = []
    for name, (required, groups) in SPELLINGS.items():
        for place in places(BY_NAME[name]):
            values, marks = (place.values[0], place.marks) if hasattr(place, "values") else (place, ())
            for label, group in groups.items():
                given = BY_NAME[name], values, required, group
                found.append(pytest.param(*given, id=f"{name}-{'-'.join(values)}-{label}", marks=marks))
    return found


def prepared(options: dict, dtype: torch.dtype | None, device: str) -> tuple[dict, list[Tensor]]:
    """The options anew, in another dtype if given, and those of them that get gradients."""
    learned: list[Tensor] = []

    def anew(t: Tensor) -> Tensor:
        new = t.detach().to(device)
        new = new.to(dtype) if dtype is not None and t.is_floating_point() else new.clone()
        if t.requires_grad:
            learned.append(new.requires_grad_())
        return new

    return tree_map_only(Tensor, anew, options), learned


def value(case: Case, args: tuple, options: dict, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The loss, the gradients of the arguments, and the sums of those of the options."""
    given = cast(args, dtype or torch.float32)
    device = leaves(case, given)[0].device.type
    wrt = [t.requires_grad_() for t in leaves(case, given)]
    options, learned = prepared(options, dtype, device)
    with core.use_backend(backend):
        loss = first(case.fn(*given, **options))
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(7)).to(device, loss.dtype)
    grads = torch.autograd.grad(loss, [*wrt, *learned], upstream, materialize_grads=True)
    return [loss, *grads]


SEEDS = 2 if INTERPRETING else 6  # of one sample eager is exact by luck


def samples(group: list[dict]) -> list[tuple[int, dict]]:
    """(seed, options): every spelling with some inputs, all inputs with some spelling."""
    if INTERPRETING and len(group) > 6:  # the interpreter's time is dear
        group = group[:1] + group[-4:]
    return [(i % SEEDS, group[i % len(group)]) for i in range(max(SEEDS, len(group)))]


@pytest.mark.parametrize(("case", "place", "required", "group"), rows())
def test_each_option_alone_in_each_spelling(case, place, required, group):
    """Every spelling has the value and the gradients that float64 has of the group's first."""
    shape = SHAPES.get(case.name, case.shapes[0])
    inputs = [to_device(case.make(Draw(seed=seed), shape), place[0]) for seed in range(SEEDS)]
    common = 1 + len(leaves(case, inputs[0]))
    for reduction in reductions(case)[-1:] if INTERPRETING else reductions(case):
        errors, meant = Errors(torch.float32), with_reduction(case, required | group[0], reduction)
        truths = [value(case, args, meant, "reference", torch.float64) for args in inputs]
        for seed, options in samples(group):
            options, args = with_reduction(case, required | options, reduction), inputs[seed]
            ours, eager = (value(case, args, options, backend) for backend in (place[1], "reference"))
            exact = value(case, args, options, "reference", torch.float64)
            exact[:common] = truths[seed][:common]
            for k, (mine, theirs, right) in enumerate(zip(ours, eager, exact, strict=True)):
                errors.add(f"{reduction} {k}", mine, theirs, right, str(options))
        errors.check()


def test_every_contrastive_option_is_spelled():
    """A new option of a loss stands in its table."""
    for name in ("info_nce", "clip_loss", "siglip_loss", "supcon_loss", "nt_xent_loss"):
        case, (required, groups) = BY_NAME[name], SPELLINGS[name]
        spelled = {key for group in groups.values() for options in group for key in options} | {"reduction"}
        options = inspect.signature(case.fn).parameters.values()
        elsewhere = {"group", "exchange", "negatives_mask"}  # tests/distributed; bool alone
        assert {p.name for p in options if p.kind is p.KEYWORD_ONLY} <= spelled | set(required) | elsewhere, name
