"""A call -> its failure, if it has one.

Three runs: the float64 reference, the call itself, and where these differ by more than one rounding the eager
reference in the call's own dtype. The rule of conformance/tools.py (Errors) then decides. It speaks of all samples of
a kind, since on one of them eager may be exact by luck, and a drawn call is one: so where it fails on the call alone,
eager's error is the largest of that and of some runs with random rounding to the dtype (rounding.py).

The dtype whose eps counts: that of the inputs for the contrastive losses, whose kernels multiply in it, as eager does;
of the value or gradient itself for all others, which compute in float32 whatever comes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings

import torch
from torch import Tensor

from tests.conformance.tools import Errors
from tests.fuzz import targets
from tests.fuzz.draw import Call
from tests.fuzz.drawer import FLOATS
from tests.fuzz.outcome import Outcome, named_leaves, run
from tests.fuzz.rounding import RandomRounding
from tests.fuzz.unit_width import cancelled
from tests.fuzz.values import make, tensors

ROUNDED_RUNS = 16
NOTHING = 1e-28  # of errors: the noise around an exact 0 has no relative size
CONTRASTIVE = (
    "info_nce",
    "clip_loss",
    "siglip_loss",
    "supcon_loss",
    "nt_xent_loss",
    "loss_and_grads",
    "ContrastiveLoss",
)
REFUSALS = (  # documented, of calls that are otherwise in order
    r"reduction: the mean of an empty batch",
    r"window: expected at most the image's sides",
    r"features\[\d+\]: expected (at least one pixel|channels and pixels)",
    r"bank: expected at least one image",
    r"image(_pred)?: expected at least one pixel",
)
SQUARED = torch.finfo(torch.float32).max ** 0.5  # kernels compute in float32: larger values may have no square
# A second gradient is a sum of parts that autograd rounds to their tensor's dtype, and a part may be larger than the
# sum: of sums above this share of the dtype's largest number none is judged.
PARTS = 0.25
NO_SECOND = ("double backward is not provided", "once_differentiable")  # documented, with what to do instead


@dataclasses.dataclass(frozen=True)
class Failure:
    """What went wrong: its kind and where, which group failures, and the figures."""

    kind: str
    what: str
    figures: str = ""

    @property
    def group(self) -> tuple[str, str]:
        return self.kind, re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", self.what)[:160]


def judge(call: Call) -> Failure | None | str:
    """The failure; None where all is well, or the message with which the call is refused, as documented."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(call.threads)
        if call.mode == "compile":
            from tests.fuzz.compiled import judge_compiled

            return judge_compiled(call)
        return compare(call, run(call, "got"))


def compare(call: Call, got: Outcome) -> Failure | None | str:
    """What was computed against the references."""
    if got.unmade:
        return f"no argument: {got.error}"
    if got.error is not None:
        return _of_error(call, got.error)
    if call.sure:
        return Failure("accepted nonsense", str(call.spoiled))
    if got.changed:
        return Failure("an input is changed", "")
    if any(t.is_meta for _, t in got.tensors):  # of meta tensors: there is nothing to compare
        return None
    exact = run(call, "exact")
    if exact.error is not None:
        if call.spoiled:  # in a form that has no plain one
            return None
        if any(re.match(pattern, str(exact.error)) for pattern in REFUSALS):
            return Failure("refused by the reference only", str(exact.error))
        return Failure("the reference fails", f"{type(exact.error).__name__}: {exact.error}")
    if got.graph != exact.graph:
        told = f"requires a gradient: {list(got.graph)}, expected {list(exact.graph)}"
        return None if _has_empty_leaf(call) else Failure("graph", told)
    if [name for name, _ in got.tensors] != [name for name, _ in exact.tensors]:
        names = [set(n for n, _ in outcome.tensors) for outcome in (got, exact)]
        return Failure("outputs", f"extra {sorted(names[0] - names[1])}, missing {sorted(names[1] - names[0])}")
    return _numbers(call, got, exact)


def _of_error(call: Call, error: Exception) -> Failure | None | str:
    text = f"{type(error).__name__}: {error}"
    if call.mode == "double" and isinstance(error, RuntimeError) and any(p in str(error) for p in NO_SECOND):
        return "double backward is not provided"
    if not isinstance(error, (TypeError, ValueError)):
        return Failure("raw error", text.split("\n")[0][:120])
    if not _is_named(str(error)):
        return Failure("unnamed error", text.split("\n")[0][:120])
    if call.spoiled or any(re.match(pattern, str(error)) for pattern in REFUSALS):
        return str(error)
    return Failure("a legitimate call is refused", text)


@functools.cache
def _words() -> set[str]:
    return targets.all_parameters()


def _is_named(message: str) -> bool:
    """Begins with the name of an argument (or several, an entry of one, or the class)."""
    start = re.match(r"(\w+)(\[[^\]]*\])*(, \w+)*( w)?(: |\()", message)
    return (
        start is not None
        and start.group(1) in _words()
        or bool(re.match(r"\w+(\.__init__)?\(\) (missing|got an)", message))
    )


def _numbers(call: Call, got: Outcome, exact: Outcome) -> Failure | None:
    """The rule, tensor by tensor; the eager reference runs only where it is asked."""
    eager: Outcome | None = None
    overflows = any(
        _largest_share(right, got.tensors[i][1].dtype) > limit
        for i, (name, right) in enumerate(exact.tensors)
        for start, limit in (("gradient", 1.0), ("second", PARTS))
        if name.startswith(start)
    )
    for i, (name, mine) in enumerate(got.tensors):
        right = exact.tensors[i][1]
        if overflows and name.startswith("second"):  # of what its dtype cannot hold
            continue
        if mine.shape != right.shape:
            return Failure("shape", f"{name}: {tuple(mine.shape)} for {tuple(right.shape)}")
        if one_rounding_off(mine, right):
            continue
        eager = eager or run(call, "eager")
        if eager.error is not None or len(eager.tensors) != len(got.tensors):
            return Failure("the reference fails", f"{type(eager.error).__name__}: {eager.error}")
        theirs = eager.tensors[i][1]
        if mine.dtype != theirs.dtype:
            return Failure("dtype", f"{name}: {mine.dtype} for {theirs.dtype}")
        if not mine.is_floating_point():
            if _has_equal_rows(call) or _has_no_square(call) or _loses_denormals(call):
                continue  # rounding decides which similarity is the largest
            wrong = (mine != theirs) & (mine != right) & ~_near_ties(call, i, right)
            if wrong.any():
                return Failure("value", f"{name}: another answer", f"{int(wrong.sum())} of {wrong.numel()}")
            continue
        no_step = i > 0 and not exact.tensors[0][1].isfinite().all()
        later = call.name == "loss_and_grads" or name.startswith(("gradient", "second"))
        seen = [t for _, t in got.tensors[1:] if t.is_floating_point()] if later and i > 0 else [mine]
        spread = call.name in CONTRASTIVE and not all(t.isfinite().all() for t in seen)
        where = _not_a_number(call, name, mine, theirs, right, (no_step, i > 0 and not no_step, spread))
        if where is not None:
            return where
        if failure := _by_the_rule(call, i, mine, theirs, right):
            return failure
    return None


def _largest_share(right: Tensor, dtype: torch.dtype) -> float:
    """The largest number as a share of what the dtype holds; NaN counts as none."""
    if not right.numel() or not dtype.is_floating_point:
        return 0.0
    return (right.detach().double().nan_to_num(0.0).abs().max() / torch.finfo(dtype).max).item()


def one_rounding_off(mine: Tensor, right: Tensor) -> bool:
    """Equal but for the rounding to its dtype, the common case."""
    if not mine.is_floating_point():
        return torch.equal(mine, right)
    finite = right.isfinite()
    if not (finite.all() and mine.isfinite().all()):
        return False
    if not right.numel():
        return True
    error = (mine.detach().double() - right.detach()).abs().max()
    return bool(error <= torch.finfo(mine.dtype).eps * right.detach().abs().max())


def _near_ties(call: Call, index: int, right: Tensor) -> Tensor:
    """Where rounding decides the answer."""
    found = torch.zeros_like(right, dtype=torch.bool)
    for seed in range(ROUNDED_RUNS):
        rounded = run(call, RandomRounding(torch.finfo(rule_dtype(call, torch.empty(0))).eps, seed))
        if rounded.error is None:
            found |= rounded.tensors[index][1] != right
    return found


def _not_a_number(
    call: Call, name: str, mine: Tensor, eager: Tensor, exact: Tensor, of_gradient: tuple[bool, bool, bool]
) -> Failure | None:
    """Infinities and NaN: as float64 has them after rounding to the dtype, or as eager in the dtype has them. Of inputs
    that float32 cannot square, no finite number is asked; a wrong one is still a failure.

    One NaN of an embedding reaches, by the order of products and sums, gradients of rows that it is no negative of: of
    contrastive gradients it is asked only that some number of them is not finite either; an infinite logit may leave
    their loss finite, and then its gradient too, 0 instead of infinity times 0. Where a loss is not finite already, no
    gradient has to be: nobody takes that step.
    """
    no_step, finite_loss, spread = of_gradient
    mine, eager, exact = mine.detach(), eager.detach(), exact.detach().to(mine.dtype)
    lost = ~mine.isfinite() & exact.isfinite() & eager.isfinite()
    if lost.any() and not no_step and not _has_no_square(call):
        at = tuple(lost.nonzero()[0].tolist())
        return Failure(
            "not finite", f"{name}: {mine[at].item()}", f"for {exact[at].item():g} (eager {eager[at].item():g}) at {at}"
        )
    hidden = ~exact.isfinite() & ~_same(mine, exact) & ~_same(mine, eager)
    if call.name in CONTRASTIVE and finite_loss:
        hidden = torch.zeros_like(hidden)
    if hidden.any() and not spread:
        at = tuple(hidden.nonzero()[0].tolist())
        seen = mine[at].item()
        told = f"{seen}" if not mine[at].isfinite() else "a number"
        return Failure(
            "hides", f"{name}: {told} for {exact[at].item()}", f"{seen:g} (eager {eager[at].item():g}) at {at}"
        )
    return None


def _largest_finite(call: Call) -> float:
    given = [t for _, t in named_leaves(make(call.args)) if t.is_floating_point() and t.numel()]
    return max((t.detach().double().nan_to_num(0, 0, 0).abs().max().item() for t in given), default=0.0)


def _has_no_square(call: Call) -> bool:
    limit = SQUARED if call.name != "style_distance" else SQUARED**0.5  # its features are multiplied before
    given = [t for _, t in named_leaves(make((call.args, call.options))) if t.is_floating_point() and t.numel()]
    return any(bool(t.detach().double().nan_to_num(0, 0, 0).abs().max() > limit) for t in given)


def _has_equal_rows(call: Call) -> bool:
    equal = ("flat", "ones", "zeros", "rows")
    return any(t.fill in equal or t.layout == "expanded" or t.shape[-1] == 1 for t in tensors(call.args))


def _loses_denormals(call: Call) -> bool:
    """A CPU's products of bfloat16 take denormal numbers as 0."""
    return any(t.fill == "denormal" and t.dtype == "bfloat16" for t in tensors(call.args))


def _has_empty_leaf(call: Call) -> bool:
    """A tensor of no elements that requires a gradient: whether the loss is said to depend on it decides nothing."""
    return any(t.requires_grad and not t.numel() for _, t in named_leaves(make((call.args, call.options))))


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def rule_dtype(call: Call, mine: Tensor) -> torch.dtype:
    """Whose eps counts, see above."""
    given = [getattr(torch, t.dtype) for t in tensors(call.args) if t.dtype in FLOATS]
    if call.name == "PerceptualLoss":  # its network is of float32
        given = [torch.float32]
    elif call.name not in CONTRASTIVE:
        given = [torch.float32] if any(dtype != torch.float64 for dtype in given) else []
    return max([mine.dtype, *given], key=lambda dtype: torch.finfo(dtype).eps)


def sample(mine: Tensor, eager: Tensor, exact: Tensor) -> tuple[float, float, float, str] | None:
    """(our error, eager's, the largest number): over what is finite in all three."""
    mine, eager, right = mine.detach().double(), eager.detach().double(), exact.detach().double()
    kept = mine.isfinite() & eager.isfinite() & exact.to(mine.dtype).isfinite()
    mine, eager, right = mine[kept], eager[kept], right[kept]
    if not right.numel():
        return None
    return ((mine - right).abs().max().item(), (eager - right).abs().max().item(), right.abs().max().item(), "")


def _by_the_rule(call: Call, index: int, mine: Tensor, eager: Tensor, exact: Tensor) -> Failure | None:
    dtype, name = rule_dtype(call, mine), "tensor"
    errors = Errors(dtype)
    found = sample(mine, eager, exact)
    if found is None:
        return None
    floor = torch.finfo(mine.dtype).smallest_normal  # below it numbers have no more digits than it has,
    if call.name in CONTRASTIVE:  # and a CPU's products may take them as 0, be it in the factors of large embeddings
        floor *= max(1.0, _largest_finite(call)) / torch.finfo(dtype).eps
    errors.samples[name] = [found, (0.0, 0.0, floor, "")]
    if found[0] < NOTHING or _holds(errors) is None:
        return None
    if call.name in CONTRASTIVE and (size := cancelled(call, index, exact)) is not None:
        errors.samples[name].append((0.0, 0.0, size, ""))
        if _holds(errors) is None:
            return None
    for seed in range(ROUNDED_RUNS):
        rounded = run(call, RandomRounding(torch.finfo(dtype).eps, seed, alike=seed % 2 == 1))
        if rounded.error is not None:
            return Failure("the reference fails", f"rounded: {type(rounded.error).__name__}: {rounded.error}")
        one = sample(mine, rounded.tensors[index][1], exact)
        if one is not None:
            errors.samples[name].append((0.0, one[1], 0.0, ""))
    told = _holds(errors)
    if told is None:
        return None
    what, (error, eagers, largest, _) = _what(call, index), found
    return Failure("numbers", what, f"{told}; alone: error {error:.3g}, eager {eagers:.3g}, largest {largest:.3g}")


def _holds(errors: Errors) -> str | None:
    try:
        errors.check()
    except AssertionError as error:
        return str(error).split("\n")[0]
    return None


def _what(call: Call, index: int) -> str:
    outcome = run(call, "eager")
    return outcome.tensors[index][0]
