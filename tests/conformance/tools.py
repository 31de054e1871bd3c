"""The tools of the conformance tests: running a Case anywhere, recording its ops, and the one tolerance rule."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from fastloss import core
from tests.conformance.cases import CASES, Case, Draw

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Errors:
    """The one tolerance rule: error against float64 at most 2x eager's in that dtype, plus eps of the largest value.

    It holds over all samples added under one name (all shapes of a row, say): on a single scalar eager may be exact by
    luck. Where the exact result is not finite, ours must be the same infinity or NaN. In float64 the oracle rounds as
    much as what it judges, so there 64 eps are allowed (two summation orders of the same terms).
    """

    dtype: torch.dtype
    samples: dict[str, list[tuple[float, float, float, str]]] = field(default_factory=dict)

    def add(self, name: str, got: Tensor, eager: Tensor, exact: Tensor, where: str = "") -> None:
        got, eager, exact = got.detach().double(), eager.detach().double(), exact.detach().double()
        assert got.shape == exact.shape, f"{name} {where}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
        finite = exact.isfinite()
        torch.testing.assert_close(got[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
        got, eager, exact = got[finite], eager[finite], exact[finite]
        if exact.numel():
            error, eagers = (got - exact).abs().max().item(), (eager - exact).abs().max()
            assert error == error, f"{name} {where}: NaN where float64 gives numbers"
            sample = (error, eagers.nan_to_num(float("inf")).item(), exact.abs().max().item(), where)
            self.samples.setdefault(name, []).append(sample)

    def failures(self) -> list[str]:
        slack, found = 64 if self.dtype == torch.float64 else 1, []
        for name, samples in self.samples.items():
            error, _, _, where = max(samples)
            allowed = 2 * max(s[1] for s in samples) + slack * torch.finfo(self.dtype).eps * max(s[2] for s in samples)
            if not error <= allowed:
                found.append(f"{name} {where}: error {error:.3e}, allowed {allowed:.3e} ({self.dtype})")
        return found

    def check(self) -> None:
        found = self.failures()
        assert not found, "; ".join(found)

    def draws(self, first: int = 1, most: int = 12) -> Iterator[int]:
        """Seeds to add samples of: `first` of them, and more while the rule fails on all so far.

        On the few numbers of one draw eager may be exact by luck, on one processor or another; of more it is judged
        by what it usually is, while an error of ours that is no rounding remains the largest.
        """
        for seed in range(most):
            if seed >= first and not self.failures():
                return
            yield seed


def check_error(name: str, got: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The rule on one sample."""
    errors = Errors(dtype)
    errors.add(name, got, eager, exact)
    errors.check()


def cast(args: Any, dtype: torch.dtype) -> Any:
    """Floating-point leaves in `dtype`; labels, ids and masks as they are."""
    return tree_map_only(Tensor, lambda t: t.detach().to(dtype) if t.is_floating_point() else t, args)


def cast_options(options: dict, dtype: torch.dtype) -> dict:
    return {k: cast((v,), dtype)[0] if isinstance(v, Tensor) else v for k, v in options.items()}


def leaves(case: Case, args: tuple) -> list[Tensor]:
    """The tensors that get gradients, in order, through lists of tensors too."""
    return [t for i in case.grads for t in tree_flatten(args[i])[0] if isinstance(t, Tensor)]


def first(out: Any) -> Tensor:
    """The loss of a function that may return more than it."""
    return out if isinstance(out, Tensor) else out[0]


def run(case: Case, fn: Any, args: tuple, options: dict, upstream: Tensor | None = None) -> tuple:
    """(loss, gradients of the grad leaves, upstream gradient used)."""
    wrt = leaves(case, args)
    for t in wrt:
        t.requires_grad_()
    loss = first(fn(*args, **options))
    if upstream is None:
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(7)).to(loss.device)
    grads = torch.autograd.grad(loss, wrt, upstream.to(loss.dtype), allow_unused=True)
    return loss, [torch.zeros_like(t) if g is None else g for t, g in zip(wrt, grads, strict=True)], upstream


def with_reduction(case: Case, options: dict, reduction: str | None) -> dict:
    return options if reduction is None else options | {"reduction": reduction}


def reductions(case: Case) -> tuple[str | None, ...]:
    """Those to try: to a kernel a sum is a mean with another factor, which the interpreter's time is too dear for."""
    kept = [r for r in case.reductions if not (INTERPRETING and r == "sum" and "mean" in case.reductions)]
    return tuple(kept) or (None,)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[core.Op, tuple]]]:
    """The op calls (and their arguments) that happen inside the block."""
    calls: list[tuple[core.Op, tuple]] = []
    original = core.Op.__call__

    def spy(self: core.Op, *args: Any, **options: Any) -> Tensor:
        calls.append((self, args))
        return original(self, *args, **options)

    core.Op.__call__ = spy  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        core.Op.__call__ = original  # type: ignore[method-assign]


@functools.cache
def ops_of(name: str) -> tuple[core.Op, ...]:
    case = next(c for c in CASES if c.name == name)
    with recorded() as calls, core.use_backend("reference"):
        case.fn(*case.make(Draw(), case.shapes[0]), **case.options[0])
    return tuple({id(op): op for op, _ in calls}.values())


def places(case: Case) -> list[Any]:
    """(device, backend) pairs to check: the reference everywhere, kernels where the case has them."""
    import pytest  # here, for the benchmarks take the rest of this file into the installed package

    kernels = {name for op in ops_of(case.name) for name, there in op.kernels.items() if there}
    if INTERPRETING:
        return [("cpu", "triton")] if "triton" in kernels else []
    found: list[Any] = [("cpu", "reference")]
    if "cpp" in kernels:
        found.append(("cpu", "cpp"))
    found.append(pytest.param(("cuda", "triton" if "triton" in kernels else "reference"), marks=pytest.mark.gpu))
    return found


def _thinned(options: Sequence[dict], dtypes: Sequence[torch.dtype]) -> list[tuple[dict, torch.dtype]]:
    """The interpreter's share: each option in one dtype, in turn; where there is but one dtype, two options."""
    dtypes = [d for d in dtypes if d != torch.float64]
    if len(dtypes) == 1:
        options = options[:2]
    return [(option, dtypes[i % len(dtypes)]) for i, option in enumerate(options)]


def grid(*, options: bool = True, dtypes: tuple[torch.dtype, ...] = DTYPES, only_ops: bool = False) -> Any:
    """parametrize over case x place x option x dtype, with readable ids."""
    import pytest

    rows = []
    for case in CASES:
        if only_ops and not ops_of(case.name):
            continue
        for place in places(case):
            values, marks = (place.values[0], place.marks) if hasattr(place, "values") else (place, ())
            chosen = case.options if options else case.options[:1]
            for option, dtype in (_thinned if INTERPRETING else itertools.product)(chosen, dtypes):
                if dtype == torch.float64 and values[1] not in ("reference",):
                    continue  # float64 always goes to the reference
                label = ",".join(f"{k}={_short(v)}" for k, v in option.items()) or "default"
                ident = f"{case.name}-{values[0]}-{values[1]}-{label}-{str(dtype).removeprefix('torch.')}"
                rows.append(pytest.param(case, values, option, dtype, id=ident, marks=marks))
    return pytest.mark.parametrize(("case", "place", "options", "dtype"), rows)


def _short(value: Any) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


def to_device(tree: Any, device: str) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(device), tree)
