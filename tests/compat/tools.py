"""A drawn call of a drop-in and of the library itself: values, gradients and dtypes by the one tolerance rule."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastloss.compat import _common
from tests.conformance.tools import Errors

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


class Draws:
    """Drawn calls: `for draw in Draws(40): draw.compare(ours, theirs, tensors)`, and the rule over all of them.

    FASTLOSS_DRAWS=10 draws ten times as many.
    """

    def __init__(self, count: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
        self.count, self.dtypes = count * int(os.environ.get("FASTLOSS_DRAWS", 1)), dtypes
        self.errors: dict[torch.dtype, Errors] = {}

    def __iter__(self) -> Iterator[Draw]:
        for seed in range(self.count):
            yield Draw(seed, self.dtypes[seed % len(self.dtypes)], self.errors)
        for errors in self.errors.values():
            errors.check()


def check_errors(calls: Iterable[Callable[[Any], Any]], ours: Any, theirs: Any) -> None:
    """Each call of a wrong argument raises the library's own error, with its words."""
    for call in calls:
        with pytest.raises(Exception) as wanted:
            call(theirs)
        with pytest.raises(type(wanted.value)) as found:
            call(ours)
        assert str(found.value) == str(wanted.value)


class Draw:
    def __init__(self, seed: int, dtype: torch.dtype, errors: dict[torch.dtype, Errors]) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype, self.errors = dtype, errors.setdefault(dtype, Errors(dtype))

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def number(self, *choices: float) -> Tensor:
        return torch.tensor(self.one_of(*choices), dtype=self.dtype)

    def compare(
        self,
        ours: Callable[..., Any],
        theirs: Callable[..., Any],
        tensors: list[Tensor],
        exact: Callable[..., Any] | None = None,
        frozen: int = 0,
        quiet: bool = True,
        **options: Any,
    ) -> None:
        """Both with the same arguments in the draw's dtype, and theirs (or `exact`) in float64.

        The last `frozen` tensors get no gradient. `quiet`: fastloss itself must have computed ours, so that no warning
        says that theirs did.
        """
        _common._said.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            mine = _run(ours, tensors, self.dtype, frozen, options)
        handed = [str(w.message) for w in said if "is computed by the library itself" in str(w.message)]
        assert bool(handed) != quiet, handed
        other = _run(theirs, tensors, self.dtype, frozen, options)
        wanted = _run(exact or theirs, tensors, torch.float64, frozen, options)
        for kind, got, eager, true in zip(("value", "gradient"), mine, other, wanted, strict=True):
            assert len(got) == len(eager) == len(true)
            for i, (g, e, t) in enumerate(zip(got, eager, true, strict=True)):
                assert g.shape == e.shape and g.dtype == e.dtype, (kind, i, g.shape, e.shape, g.dtype, e.dtype)
                self.errors.add(f"{kind} {i}", g, e, t, f"shapes {[tuple(x.shape) for x in tensors]}")


def _run(
    fn: Callable[..., Any], tensors: list[Tensor], dtype: torch.dtype, frozen: int, options: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """(values, gradients of the floating-point tensors) of a call with copies of the tensors in `dtype`."""
    copies = [t.detach().clone().to(dtype) if t.is_floating_point() else t for t in tensors]
    wrt = [t.requires_grad_() for t in copies[: len(copies) - frozen] if t.is_floating_point()]
    values = [v for v in tree_flatten(fn(*copies, **options))[0] if isinstance(v, Tensor)]
    upstream = torch.Generator().manual_seed(1)
    total = sum((v.double() * torch.randn(v.shape, generator=upstream)).sum() for v in values)
    gradients = torch.autograd.grad(total, wrt, allow_unused=True) if wrt else ()
    return values, [torch.zeros_like(t) if g is None else g for t, g in zip(wrt, gradients, strict=True)]


def autoencoder_step(perceptual: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """A step of taming's and latent diffusion's LPIPSWithDiscriminator, whose lines diffusers' training of autoencoders
    has too: the decoder's loss, the adversarial weight by the gradients of its last layer, the discriminator's loss,
    and all gradients."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    discriminator = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 1, 1))
    log_variance = nn.Parameter(torch.zeros(()))
    images, made = 2 * torch.rand(2, 3, 32, 32) - 1, decoder(torch.randn(2, 4, 32, 32))
    distance = (images - made).abs() + perceptual(images.contiguous(), made.contiguous())
    likelihood = (distance / log_variance.exp() + log_variance).sum() / len(images)
    adversarial, last = -discriminator(made).mean(), decoder[-1].weight
    ours, others = (torch.autograd.grad(part, last, retain_graph=True)[0] for part in (likelihood, adversarial))
    weight = (ours.norm() / (others.norm() + 1e-4)).clamp(0, 1e4).detach()
    (likelihood + weight * adversarial).backward()
    of_decoder = [p.grad for p in (*decoder.parameters(), log_variance)]
    real, fake = discriminator(images), discriminator(made.detach())
    hinge = (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
    of_discriminator = torch.autograd.grad(hinge, list(discriminator.parameters()))
    return [likelihood.detach(), weight, hinge.detach(), *of_decoder, *of_discriminator]
