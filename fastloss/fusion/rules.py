"""The rules by which a fusion of losses weighs its parts: fixed, or following the losses, all on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.checks import check_integer, check_number


def _state_dtype() -> torch.dtype:
    """Of the state: float32 at least, whatever the default dtype is."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class Rule(nn.Module):
    """How much each part counts, beyond its own weight. This one: always 1.

    `total` gets the K losses as one vector, and for each whether it is constant in this step. State lives in buffers of
    K numbers in the alphabetical order of the parts, so that a checkpoint does not depend on the order in which the
    weights were given.
    """

    base: Tensor
    multipliers: Tensor

    def __init__(self, names: list[str], base: list[float]) -> None:
        super().__init__()
        self.names = names
        given = torch.tensor(base, dtype=_state_dtype())
        self.register_buffer("base", given, persistent=False)  # the arguments' business, not the state's

    def effective(self) -> Tensor:
        """The K weights as of the last step, those given included."""
        return self.base

    def total(
        self, losses: Tensor, constant: list[bool], parts: Mapping[str, Tensor], last_layer: Tensor | None
    ) -> Tensor:
        return (self.base.to(losses.dtype) * losses).sum()


class AdaptiveRule(Rule):
    """Multipliers that change from step to step; in eval mode the last ones are used and nothing changes. A constant
    part keeps its own, is no part of the others' balance, and leaves 0 as its past."""

    step: Tensor

    def __init__(self, names: list[str], base: list[float]) -> None:
        super().__init__(names, base)
        self.register_buffer("multipliers", torch.ones(len(names), dtype=_state_dtype()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def effective(self) -> Tensor:
        return self.base * self.multipliers

    def total(
        self, losses: Tensor, constant: list[bool], parts: Mapping[str, Tensor], last_layer: Tensor | None
    ) -> Tensor:
        multipliers = self.multipliers.clone()
        if self.training and not all(constant):
            detached = losses.detach().to(multipliers.dtype)
            gradients = self.gradients(constant, parts, last_layer)
            with torch.no_grad():
                state = self.update(_chosen(constant, torch.zeros_like(detached), detached), constant, gradients)
                state["multipliers"] = _chosen(constant, self.multipliers, state["multipliers"])
                # one overflow (a step that the gradient scaler skips, say) must not stay in the averages for ever
                fine = torch.isfinite(detached).all()
                for values in state.values():
                    fine = fine & torch.isfinite(values).all()
                for name, values in state.items():
                    buffer = getattr(self, name)
                    buffer.copy_(torch.where(fine, values, buffer))
                multipliers = self.multipliers.clone()  # autograd keeps it; the buffer changes in the next step
        return ((self.base * multipliers).to(losses.dtype) * losses).sum()

    def gradients(self, constant: list[bool], parts: Mapping[str, Tensor], last_layer: Tensor | None) -> Tensor | None:
        return None

    def update(self, losses: Tensor, constant: list[bool], gradients: Tensor | None) -> dict[str, Tensor]:
        """The new state by buffer name, the multipliers among it; constant losses are 0."""
        return {}


class UncertaintyRule(Rule):
    """Homoscedastic uncertainty: exp(-s) / 2 with a learnable log-variance s per part, and s / 2 on top."""

    def __init__(self, names: list[str], base: list[float], *, log_variance: float = 0.0) -> None:
        super().__init__(names, base)
        start = check_number("log_variance", log_variance, -80, 80)  # e^-80 and e^80 are float32 numbers
        self.log_variances = nn.Parameter(torch.full((len(names),), start, dtype=_state_dtype()))

    def effective(self) -> Tensor:
        return self.base * (0.5 * torch.exp(-self.log_variances.detach()))

    def total(
        self, losses: Tensor, constant: list[bool], parts: Mapping[str, Tensor], last_layer: Tensor | None
    ) -> Tensor:
        s = self.log_variances.to(losses.dtype)
        s = _chosen(constant, s.detach(), s)  # that of a loss of 0 would fall without end
        return (0.5 * torch.exp(-s) * self.base.to(losses.dtype) * losses + 0.5 * s).sum()


class DynamicAverageRule(AdaptiveRule):
    """Dynamic weight average: K softmax(r / T), r the ratio of the last two losses (of their means over `period`)."""

    sums: Tensor
    previous: Tensor
    before: Tensor

    def __init__(self, names: list[str], base: list[float], *, temperature: float = 2.0, period: int = 1) -> None:
        super().__init__(names, base)
        self.temperature = check_number("temperature", temperature, 0, open_low=True)
        self.period = int(check_number("period", period, 1))
        if period != self.period:
            raise ValueError(f"period: expected a whole number of steps, got {period!r}")
        for name in ("sums", "previous", "before"):
            self.register_buffer(name, torch.zeros(len(names), dtype=_state_dtype()))

    def update(self, losses: Tensor, constant: list[bool], gradients: Tensor | None) -> dict[str, Tensor]:
        multipliers = _balance(_ratio(self.previous, self.before), self.temperature, constant)
        sums, step = self.sums + losses, self.step + 1
        ends = step % self.period == 0
        return {
            "multipliers": torch.where(self.step >= 2 * self.period, multipliers, 1.0),
            "step": step,
            "before": torch.where(ends, self.previous, self.before),
            "previous": torch.where(ends, sums / self.period, self.previous),
            "sums": torch.where(ends, 0.0, sums),
        }


class RelativeBalanceRule(AdaptiveRule):
    """ReLoBRaLo: a running average of softmax(L / (tau L')), L' the last losses, or by chance the first ones."""

    first: Tensor
    previous: Tensor

    def __init__(
        self,
        names: list[str],
        base: list[float],
        *,
        alpha: float = 0.95,
        beta: float = 0.99,
        tau: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(names, base)
        self.alpha, self.beta = check_number("alpha", alpha, 0, 1), check_number("beta", beta, 0, 1)
        self.tau, self.seed = check_number("tau", tau, 0, open_low=True), check_integer("seed", seed, 0)
        for name in ("first", "previous"):
            self.register_buffer(name, torch.zeros(len(names), dtype=_state_dtype()))

    def update(self, losses: Tensor, constant: list[bool], gradients: Tensor | None) -> dict[str, Tensor]:
        start = self.step == 0
        since_first, since_last = (
            _balance(_ratio(losses, past), self.tau, constant) for past in (self.first, self.previous)
        )
        kept = torch.where(_uniform(self.step, self.seed) < self.beta, self.multipliers, since_first)
        multipliers = self.alpha * kept + (1 - self.alpha) * since_last
        return {
            "multipliers": torch.where(start, 1.0, multipliers),
            "step": self.step + 1,
            "first": torch.where(self.first == 0, losses, self.first),  # of a part that began later: its own first
            "previous": losses,
        }


class GradientRatioRule(AdaptiveRule):
    """VQGAN: |dL_reference / d last_layer| / (|dL_i / d last_layer| + eps), at most `max_ratio`."""

    def __init__(
        self, names: list[str], base: list[float], *, reference: str, eps: float = 1e-4, max_ratio: float = 1e4
    ) -> None:
        super().__init__(names, base)
        if not isinstance(reference, str):
            raise TypeError(f"reference: expected the name of a part, one of {names}, got {type(reference).__name__}")
        if reference not in names:
            raise ValueError(f"reference: expected a part with a weight > 0, one of {names}, got {reference!r}")
        self.reference, self.eps = reference, check_number("eps", eps, 0, open_low=True)
        self.max_ratio = check_number("max_ratio", max_ratio, 0, open_low=True)

    def gradients(self, constant: list[bool], parts: Mapping[str, Tensor], last_layer: Tensor | None) -> Tensor:
        """The K norms of the parts' gradients at the last layer."""
        if not isinstance(last_layer, Tensor):
            raise TypeError(
                f"last_layer: weighting 'vqgan' in training mode expects the last layer's weight tensor, "
                f"got {type(last_layer).__name__}"
            )
        norms = []
        for name, fixed in zip(self.names, constant, strict=True):
            if fixed:
                norms.append(self.multipliers.new_zeros(()))
                continue
            grad = None
            if parts[name].requires_grad and last_layer.requires_grad:
                (grad,) = torch.autograd.grad(parts[name], last_layer, retain_graph=True, allow_unused=True)
            if grad is None:
                raise ValueError(
                    f"last_layer: part {name!r} has no gradient with respect to it; pass a tensor that every part "
                    "depends on, and a part that is constant as a number (under no_grad: .eval() keeps the last ratios)"
                )
            norms.append(torch.linalg.vector_norm(grad.detach().to(self.multipliers.dtype)))
        return torch.stack(norms)

    def update(self, losses: Tensor, constant: list[bool], gradients: Tensor | None) -> dict[str, Tensor]:
        assert gradients is not None
        at = self.names.index(self.reference)
        if constant[at]:  # there is nothing to compare with
            return {"multipliers": self.multipliers, "step": self.step + 1}
        ratios = (gradients[at] / (gradients + self.eps)).clamp(0, self.max_ratio)
        one = torch.ones_like(ratios[:1])
        return {"multipliers": torch.cat((ratios[:at], one, ratios[at + 1 :])), "step": self.step + 1}


def _chosen(constant: list[bool], of_constant: Tensor, of_others: Tensor) -> Tensor:
    """By element: that of the first vector where the part is constant. No mask is sent to the device."""
    if not any(constant):
        return of_others
    pairs = zip(constant, of_constant.unbind(), of_others.unbind(), strict=True)
    return torch.stack([fixed if chosen else other for chosen, fixed, other in pairs])


def _balance(ratios: Tensor, temperature: float, constant: list[bool]) -> Tensor:
    """n softmax(ratios / temperature) over the n parts that are not constant; 1 for those that are."""
    at = [i for i, fixed in enumerate(constant) if not fixed]
    own = ratios if len(at) == len(constant) else torch.stack([ratios[i] for i in at])
    shares = len(at) * torch.softmax((own - own.amax()) / temperature, 0)
    if len(at) == len(constant):
        return shares
    each = dict(zip(at, shares.unbind(), strict=True))
    return torch.stack([each.get(i, ratios.new_ones(())) for i in range(len(constant))])


def _ratio(now: Tensor, past: Tensor) -> Tensor:
    """now / past, and 1 where the past is 0."""
    zero = past == 0
    return torch.where(zero, 1.0, now / torch.where(zero, 1.0, past))


def _uniform(step: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) from the step: an integer hash, so that the state dict holds all there is to resume, ranks
    agree, and the random numbers of the training run stay as they are. Products stay below 2**63."""
    mask = 2**31 - 1
    x = (step * 0x1E3779B1 + seed * 0x5BD1E995 + 0x3C6EF372) & mask
    for multiplier in (0x7FEB352D, 0x5B9F3B15, 0x31848BAB):
        x = ((x ^ (x >> 15)) * multiplier) & mask
    return (x ^ (x >> 16)).to(torch.float32) / 2**31


WEIGHTINGS: dict[str, type[Rule]] = {
    "fixed": Rule,
    "uncertainty": UncertaintyRule,
    "dwa": DynamicAverageRule,
    "relobralo": RelativeBalanceRule,
    "vqgan": GradientRatioRule,
}
