"""NamedTuples in an op's functions: the flat list that the dispatcher knows, made in one place."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastloss.core.structs import flattened


class Inputs(NamedTuple):
    image: Tensor
    weight: Tensor | None
    sides: list[int]


class Saved(NamedTuple):
    stats: Tensor


class Grads(NamedTuple):
    image: Tensor
    weight: Tensor


class Needs(NamedTuple):
    image: bool
    weight: bool


def forward(x: Inputs) -> tuple[Tensor, Saved]:
    return x.image.sum(), Saved(x.image + sum(x.sides))


def backward(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    return Grads(grad * saved.stats if needs.image else grad, x.image if needs.weight else grad)


def plain(image: Tensor, power: float) -> Tensor:
    return image**power


def test_the_schema_lists_the_fields():
    assert torch.library.infer_schema(flattened(forward), mutates_args=()) == (
        "(Tensor image, Tensor? weight, SymInt[] sides) -> (Tensor, Tensor)"
    )
    assert torch.library.infer_schema(flattened(backward), mutates_args=()) == (
        "(Tensor grad, Tensor image, Tensor? weight, SymInt[] sides, Tensor stats, bool needs_image, bool needs_weight)"
        " -> (Tensor, Tensor)"
    )


def test_values_go_through_in_order():
    image = torch.tensor([1.0, 2.0])
    out, stats = flattened(forward)(image, None, [3, 4])
    assert out.item() == 3.0 and stats.tolist() == [8.0, 9.0]
    grads = flattened(backward)(torch.tensor(2.0), image, None, [3, 4], stats, True, False)
    assert type(grads) is tuple and grads[0].tolist() == [16.0, 18.0] and grads[1].item() == 2.0


def test_a_function_without_structs_stays_itself_and_the_rest_is_made_once():
    assert flattened(plain) is plain
    assert flattened(forward) is flattened(forward)
    assert list(inspect.signature(flattened(forward)).parameters) == ["image", "weight", "sides"]


def test_a_missing_field_raises():
    with pytest.raises(TypeError, match="sides"):
        flattened(forward)(torch.ones(1), None)


def test_compiled_whole():
    image = torch.tensor([1.0, 2.0])
    out, stats = torch.compile(flattened(forward), fullgraph=True, backend="eager")(image, None, [3, 4])
    assert out.item() == 3.0 and stats.tolist() == [8.0, 9.0]
